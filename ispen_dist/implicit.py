"""The hypergradient: the gradient of an outer loss through the solution of an inner problem.

    theta*(phi) = argmin_theta G(theta, phi),        wanted: d/dphi L(theta*(phi), phi)

At the optimum `d_theta G(theta*(phi), phi) = 0` for every phi. Differentiating that in phi,

    H dtheta*/dphi + d_phi d_theta G = 0,             H = d^2 G / d theta^2,

and inserting it in the chain rule gives, with one linear solve instead of a Jacobian,

    dL/dphi = d_phi L  -  d_phi <d_theta G, q>,       (H + damping I) q = d_theta L.
              explicit    implicit

(arXiv 2211.11649, Section 3; there the inverse is a truncated Neumann series.) Methods that learn
an energy without the implicit part, such as InfNet and SEAL, keep the first term alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ispen_dist import ranges
from ispen_dist.graphs.compiler import Compiler
from ispen_dist.graphs.operators import CompiledOperator, compiled_outer_gradients
from ispen_dist.linalg.conjugate_gradients import CG
from ispen_dist.linalg.layout import Replicas
from ispen_dist.linalg.operators import (
    CurvatureOperator,
    Loss,
    build_operator,
    pull_back,
)
from ispen_dist.linalg.reduction import OneProcess, Reduction, own_share
from ispen_dist.linalg.solution import Solution, Status
from ispen_dist.linalg.solver import Solver
from ispen_dist.linalg.staged_operators import StagedLoss, build_staged_operator
from ispen_dist.linalg.trees import Tree, add_scaled, as_leaves
from ispen_dist.linalg.vectors import Vectors
from ispen_dist.ops.vectors import local_vectors

DEFAULT_SOLVER = CG(max_steps=20, rtol=1e-6)


@dataclass(frozen=True)
class Hypergradient:
    """A hypergradient and how it came about.

    Attributes:
        explicit: `d_phi L` at fixed theta, a tree like phi.
        implicit: `- d_phi <d_theta G, q>`, a tree like phi.
        solution: the linear solve for `q`.
        outer_loss: L, shape `()`.
        inner_loss: G, shape `()`.
        inner_gradient: `d_theta G`; its norm says how far theta is from the inner optimum that
            the formula assumes.
    """

    explicit: Tree
    implicit: Tree
    solution: Solution
    outer_loss: Tensor
    inner_loss: Tensor
    inner_gradient: Tree

    @property
    def value(self) -> Tree:
        """`dL/dphi`, the sum of both parts. Look at `status` before using it."""
        return add_scaled(self.explicit, 1.0, self.implicit)

    @property
    def status(self) -> Status:
        """How the linear solve ended; `status.help` explains, `status.usable` decides."""
        return self.solution.status

    @property
    def num_steps(self) -> int:
        """Products with the curvature in the solve."""
        return self.solution.num_steps

    @property
    def residual(self) -> float:
        """Relative residual of the solve, NaN where the solver does not measure it."""
        return self.solution.residual


def hypergradient(
    inner_loss: Loss,
    outer_loss: Loss,
    theta: Tree,
    phi: Tree,
    *,
    solver: Solver = DEFAULT_SOLVER,
    damping: float = 0.0,
    curvature: str = "hessian",
    reduction: Reduction | None = None,
    start: Tree | None = None,
) -> Hypergradient:
    """Compute `d/dphi L(theta*(phi), phi)` at a given approximate inner solution `theta`.

    Both losses are functions `f(theta, phi)` of two trees (`dict[str, Tensor]`) and return a
    scalar mean, or a pair `(sum, count)`. Each is called exactly once, so randomness inside is
    frozen for the whole solve.

    Args:
        inner_loss: G; a `ComposedLoss` where the curvature is Gauss-Newton.
        outer_loss: L.
        theta: the inner parameters, at or near the inner optimum.
        phi: the outer parameters.
        solver: how to apply the inverse.
        damping: added to the diagonal of the curvature, in its units.
        curvature: "hessian" (exact) or "gauss_newton" (positive semidefinite where the output
            loss is convex).
        reduction: where several ranks hold parts of the batch, for instance
            `ispen_dist.distributed.Ranks()`; both losses then return `(sum, count)` over the
            rank's own examples and every rank gets the hypergradient of the whole batch.
        start: initial guess for the solve, such as `solution.value` of the previous call.

    Returns:
        A `Hypergradient`: `.value` is a tree like phi; `.status`, `.num_steps` and `.residual`
        tell how the solve went. No status raises: negative curvature, NaN and missing
        convergence are reported for the caller to act on.

    Raises:
        ValueError: for a negative damping, an unknown curvature, or losses of the wrong form.

    Example:
        Ridge regression, where theta* = phi / (phi + a) has a closed form:

        >>> import torch, ispen_dist
        >>> theta, phi = {"w": torch.tensor([0.5])}, {"c": torch.tensor([1.0])}
        >>> inner = lambda t, p: 0.5 * ((t["w"] - p["c"]) ** 2 + t["w"] ** 2).sum()
        >>> outer = lambda t, p: t["w"].sum()
        >>> ispen_dist.hypergradient(inner, outer, theta, phi).value["c"]
        tensor([0.5000])
    """
    if damping < 0.0:
        raise ValueError(f"damping: expected a number >= 0, got {damping}")
    reduction = reduction or OneProcess()
    outer = outer_gradients(outer_loss, theta, phi, reduction)
    with ranges.named("curvature"):
        operator = build_operator(curvature, inner_loss, theta, phi, reduction)
    vectors = Replicas(reduction).vectors(local_vectors(outer[0].device))
    return _through_solution(outer, operator, solver, damping, vectors, start)


def staged_hypergradient(
    inner_loss: StagedLoss,
    outer_loss: StagedLoss,
    *,
    solver: Solver = DEFAULT_SOLVER,
    damping: float = 0.0,
    curvature: str = "hessian",
    compiler: Compiler | None = None,
    start: Tree | None = None,
) -> Hypergradient:
    """Compute the same with players that are given by stages and may be sharded.

    Args:
        inner_loss: G at the batch of the solve.
        outer_loss: L at its batch.
        solver: how to apply the inverse.
        damping: added to the diagonal of the curvature.
        curvature: "hessian" or "gauss_newton".
        compiler: compile the stages and keep all that depends on the solve point alone, see
            `graphs.phases`; every rank must hold all parameters.
        start: initial guess for the solve, own parts.

    Returns:
        A `Hypergradient` whose trees hold this rank's own parts.
    """
    operator: CurvatureOperator
    if compiler is not None:
        outer = compiled_outer_gradients(outer_loss, compiler)
        with ranges.named("curvature"):
            operator = CompiledOperator(inner_loss, compiler, curvature)
    else:
        outer = staged_outer_gradients(outer_loss)
        with ranges.named("curvature"):
            operator = build_staged_operator(curvature, inner_loss)
    layout = inner_loss.model.layout
    vectors = layout.vectors(local_vectors(outer[0].device))
    return _through_solution(outer, operator, solver, damping, vectors, start)


@ranges.marked("outer gradient")
def staged_outer_gradients(loss: StagedLoss) -> tuple[Tensor, Tree, Tree]:
    """Return `(L, d_theta L, d_phi L)` of a staged loss, as own parts."""
    states = loss.model.states()
    output = loss.at(states[-1][0], create_graph=False)
    d_theta, _ = loss.model.pull_back(output.z_bar, states)
    psi_bar = {key: value for key, value in output.gradient.items() if key != "z"}
    return output.value, d_theta, loss.potentials.pull_back(psi_bar)


def _through_solution(
    outer: tuple[Tensor, Tree, Tree],
    operator: CurvatureOperator,
    solver: Solver,
    damping: float,
    vectors: Vectors,
    start: Tree | None,
) -> Hypergradient:
    """Solve, and insert the solution in the equation at the head of this file."""
    value, d_theta, explicit = outer
    matvec = ranges.marked("product")(operator.matvec)
    with ranges.named("solve"):
        solution = solver.solve(matvec, d_theta, shift=damping, vectors=vectors, start=start)
    with ranges.named("mixed product"):
        mixed = operator.mixed(solution.value, solution.combination)
    implicit = {key: part.neg() for key, part in mixed.items()}
    return Hypergradient(explicit, implicit, solution, value, operator.value, operator.gradient)


@ranges.marked("outer gradient")
def outer_gradients(
    outer_loss: Loss, theta: Tree, phi: Tree, reduction: Reduction | None = None
) -> tuple[Tensor, Tree, Tree]:
    """Return `(L, d_theta L, d_phi L)` over the global batch, from one backward pass."""
    reduction = reduction or OneProcess()
    theta, phi = as_leaves(theta), as_leaves(phi)
    share = own_share(outer_loss(theta, phi), reduction, "outer_loss")
    both = {f"theta.{k}": v for k, v in theta.items()} | {f"phi.{k}": v for k, v in phi.items()}
    own = pull_back([share], both, [torch.ones_like(share)])
    value, *sums = reduction.sum([share.detach(), *own.values()])
    d_theta = dict(zip(theta, sums[: len(theta)], strict=True))
    return value, d_theta, dict(zip(phi, sums[len(theta) :], strict=True))


def unrolled_hypergradient(
    inner_loss: Loss,
    outer_loss: Loss,
    theta: Tree,
    phi: Tree,
    *,
    learning_rate: float,
    num_steps: int,
) -> Tree:
    """Differentiate through `num_steps` of gradient descent on the inner loss: a reference.

    Approaches the implicit hypergradient as the inner problem converges, at a memory that grows
    with the number of steps. One process only.

    Args:
        inner_loss: G.
        outer_loss: L.
        theta: where gradient descent starts; it is treated as a constant.
        phi: the outer parameters.
        learning_rate: step size of gradient descent.
        num_steps: number of steps that are unrolled.

    Returns:
        `dL/dphi`, a tree like phi.
    """
    one = OneProcess()
    theta, phi = as_leaves(theta), as_leaves(phi)
    for _ in range(num_steps):
        value = own_share(inner_loss(theta, phi), one, "inner_loss")
        step = pull_back([value], theta, [torch.ones_like(value)], create_graph=True)
        theta = add_scaled(theta, -learning_rate, step)
    value = own_share(outer_loss(theta, phi), one, "outer_loss")
    return pull_back([value], phi, [torch.ones_like(value)])
