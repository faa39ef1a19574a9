"""Other systems on the problems of `bench_problems.py`, each at its best setting.

Every adapter computes

    dL/dphi = d_phi L - d_phi <d_theta G, q>,     (H + damping I) q = d_theta L

with a fixed number of conjugate-gradient steps from zero, tolerances switched off, so that all run
equally long. What a user would do once per training run (building objects, moving data,
compiling) is done before the callable is returned; what every outer step pays is inside.

An adapter corrects nothing: where a system is wrong, its number is returned as it is.

To add one: derive from `Peer` and add a row to `PEERS`.
"""

import copy
import importlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import torch
from bench_problems import Problem
from torch import Tensor, nn

from ispen_dist.linalg.operators import Loss
from ispen_dist.linalg.trees import Tree, add_scaled, as_leaves
from ispen_dist.ops.choice import using_kernels

Work = Callable[[], Tree]
"""What is timed: no arguments, returns a tree of torch tensors."""


class Peer(ABC):
    """A system under comparison.

    Attributes:
        name: as in the table.
        packages: names under which its releases are installed.
        modules: what must be importable.
        install: how to get it.
        kernels: what operations of the model it runs on, see `ispen_dist.ops.choice`: "auto" where
            it can differentiate ours, which are faster, and "reference" where it cannot.
    """

    name: str
    packages: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    install: str = 'pip install -e ".[peers]"'
    kernels: str = "reference"

    def versions(self) -> str:
        """Return the versions of its packages and of torch, as "name version name version"."""
        return " ".join(f"{name} {metadata.version(name)}" for name in (*self.packages, "torch"))

    def available(self) -> str | None:
        """Return None where the system can be imported, else the reason why not."""
        for module in self.modules:
            try:
                importlib.import_module(module)
            except (ImportError, OSError, RuntimeError) as error:
                return f"{module}: {error}; {self.install}"
        return None

    def gradient(self, problem: Problem) -> Work | None:
        """Return one gradient of G in theta, where the system has its own."""
        return self._told(lambda: self._gradient(problem))

    def product(self, problem: Problem, v: Tree) -> Work | None:
        """Return one exact product `H v` without damping, where the system exposes one.

        The point is fixed and everything that is constant during a solve has been computed.
        """
        return self._told(lambda: self._product(problem, v))

    def hypergradient(self, problem: Problem, num_steps: int) -> Work:
        """Return the whole hypergradient, a tree like phi, with that many steps."""
        work = self._told(lambda: self._hypergradient(problem, num_steps))
        assert work is not None
        return work

    def _gradient(self, problem: Problem) -> Work | None:
        return None

    def _product(self, problem: Problem, v: Tree) -> Work | None:
        return None

    @abstractmethod
    def _hypergradient(self, problem: Problem, num_steps: int) -> Work: ...

    def _told(self, build: Callable[[], Work | None]) -> Work | None:
        """Build work, and have it run, under the system's choice of kernels."""
        with using_kernels(self.kernels):
            work = build()
        if work is None:
            return None

        def told() -> Tree:
            with using_kernels(self.kernels):
                return work()

        return told


def mean_of(loss: Loss) -> Callable[[Tree, Tree], Tensor]:
    """Return a loss of this package as a scalar function."""

    def mean(theta: Tree, phi: Tree) -> Tensor:
        total, count = loss(theta, phi)
        return total / count

    return mean


def outer_gradients(problem: Problem, theta: Tree, phi: Tree) -> tuple[list[Tensor], list[Tensor]]:
    """Return `d_theta L` and `d_phi L` from one backward pass, zeros where nothing depends."""
    leaves = [*theta.values(), *phi.values()]
    value = mean_of(problem.outer())(theta, phi)
    grads = torch.autograd.grad(value, leaves, materialize_grads=True, allow_unused=True)
    return list(grads[: len(theta)]), list(grads[len(theta) :])


class HyperTorch(Peer):
    """Own code in the style of hypertorch (Grazzi et al. 2020), which has no release to install.

    As there, the inner problem is given as a fixed-point map, whose graph is kept; a product is a
    reverse pass through it, and conjugate gradients work on lists of tensors. With the map
    `theta -> theta - (d_theta G + damping theta)`, `I - map'` is the damped Hessian.

    Departures: (1) inner products are sums over tensors and not over one concatenated copy, which
    is faster; (2) the residual is not compared with a tolerance.
    """

    name = "hypertorch"
    kernels = "auto"

    def _product(self, problem: Problem, v: Tree) -> Work:
        theta, mapped = self._fixed_point(problem, as_leaves(problem.phi), damping=0.0)
        return lambda: dict(zip(theta, _minus_map(theta, mapped, list(v.values())), strict=True))

    def _hypergradient(self, problem: Problem, num_steps: int) -> Work:
        def work() -> Tree:
            phi = as_leaves(problem.phi)
            theta, mapped = self._fixed_point(problem, phi, problem.damping)
            rhs, explicit = outer_gradients(problem, theta, phi)
            q = conjugate_gradients(lambda p: _minus_map(theta, mapped, p), rhs, num_steps)
            implicit = torch.autograd.grad(mapped, list(phi.values()), q)
            return {k: e + i for k, e, i in zip(phi, explicit, implicit, strict=True)}

        return work

    def _fixed_point(
        self, problem: Problem, phi: Tree, damping: float
    ) -> tuple[Tree, list[Tensor]]:
        theta = as_leaves(problem.theta)
        value = mean_of(problem.inner())(theta, phi)
        grads = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        scale = 1.0 - damping
        return theta, [scale * w - g for w, g in zip(theta.values(), grads, strict=True)]


def _minus_map(theta: Tree, mapped: list[Tensor], p: list[Tensor]) -> list[Tensor]:
    """Return `(I - map')^T p`."""
    image = torch.autograd.grad(mapped, list(theta.values()), p, retain_graph=True)
    return [a - b for a, b in zip(p, image, strict=True)]


def conjugate_gradients(
    matvec: Callable[[list[Tensor]], list[Tensor]], rhs: Sequence[Tensor], num_steps: int
) -> list[Tensor]:
    """Take that many steps from zero, without a stopping rule (Hestenes and Stiefel 1952)."""
    q = [torch.zeros_like(b) for b in rhs]
    r = p = list(rhs)
    rr = _dot(r, r)
    for _ in range(num_steps):
        Ap = matvec(p)
        alpha = rr / _dot(p, Ap)
        q = [a + alpha * b for a, b in zip(q, p, strict=True)]
        r = [a - alpha * b for a, b in zip(r, Ap, strict=True)]
        rr, rr_old = _dot(r, r), rr
        p = [a + (rr / rr_old) * b for a, b in zip(r, p, strict=True)]
    return q


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    pairs = zip(a, b, strict=True)
    return torch.stack([torch.dot(x.flatten(), y.flatten()) for x, y in pairs]).sum()


class TorchOpt(Peer):
    """TorchOpt's `custom_root` with its conjugate gradients.

    The Hessian is symmetric, so `solve_cg` serves in place of `solve_normal_cg`, which would take
    two products a step. Its solver multiplies the zero start as well: one product more than steps.
    It differentiates the optimality condition in theta and in phi apart, each with a forward pass.
    The product is the one that it hands to a linear solver; its keyword `solve` gives access.
    It works by torch.func, which refuses our custom operators.
    """

    name = "torchopt"
    packages = ("torchopt",)
    modules = ("torchopt",)

    def _product(self, problem: Problem, v: Tree) -> Work:
        kept: list[Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]] = []

        def solve(matvec: Any, rhs: Any) -> Any:
            kept.append(matvec)
            return rhs

        self._work(problem, solve)()
        direction = tuple(v.values())

        def work() -> Tree:
            with torch.no_grad():  # as in a solve; otherwise it records a graph of the product
                return dict(zip(v, kept[0](direction), strict=True))

        return work

    def _hypergradient(self, problem: Problem, num_steps: int) -> Work:
        from torchopt.linear_solve import solve_cg

        solve = solve_cg(ridge=problem.damping, rtol=0.0, atol=0.0, maxiter=num_steps)
        return self._work(problem, solve)

    def _work(self, problem: Problem, solve: Any) -> Work:
        from torchopt.diff.implicit import custom_root

        # It calls functorch by its old name, once per solve.
        warnings.filterwarnings("ignore", "We've integrated functorch", FutureWarning)
        inner, outer = mean_of(problem.inner()), mean_of(problem.outer())
        names_theta, names_phi = list(problem.theta), list(problem.phi)

        def value(theta: tuple[Tensor, ...], phi: tuple[Tensor, ...]) -> Tensor:
            return inner(
                dict(zip(names_theta, theta, strict=True)), dict(zip(names_phi, phi, strict=True))
            )

        @custom_root(torch.func.grad(value), argnums=1, solve=solve)
        def solution(theta: tuple[Tensor, ...], phi: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return theta

        def work() -> Tree:
            phi = as_leaves(problem.phi)
            theta = solution(tuple(problem.theta.values()), tuple(phi.values()))
            loss = outer(dict(zip(names_theta, theta, strict=True)), phi)
            grads = torch.autograd.grad(loss, list(phi.values()))
            return dict(zip(phi, grads, strict=True))

        return work


class Betty(Peer):
    """Betty's `ImplicitProblem` with `type="cg"`: its own backward pass of the upper problem.

    Damping is a ridge in the lower problem's loss, as Betty has none of its own; it does not
    enter the mixed derivative. The product is inside its solver and not exposed. Release 0.1.1
    makes each search direction from the old residual, so its directions are not conjugate; later
    ones want Python below 3.11. pip from 24.1 refuses its metadata, so it is in no extra.
    """

    name = "betty"
    packages = ("betty-ml",)
    modules = ("betty",)
    install = 'pip install "pip<24.1" && pip install betty-ml==0.1.1'
    kernels = "auto"

    def _hypergradient(self, problem: Problem, num_steps: int) -> Work:
        from betty.configs import Config
        from betty.problems import ImplicitProblem

        theta, phi = _Values(problem.theta), _Values(problem.phi)
        inner, outer = mean_of(problem.inner()), mean_of(problem.outer())

        def ridged(batch: object) -> Tensor:
            square = torch.stack([(w * w).sum() for w in theta.values]).sum()
            return inner(theta.tree, phi.tree) + 0.5 * problem.damping * square

        device = str(problem.device)
        config = Config(type="cg", cg_iterations=num_steps, cg_alpha=1.0)
        lower = ImplicitProblem("lower", config, module=theta, device=device)
        upper = ImplicitProblem("upper", Config(), module=phi, device=device)
        lower.training_step = ridged
        upper.add_paths([[upper, lower, upper]])

        def work() -> Tree:
            loss = outer(theta.tree, phi.tree)
            upper.backward(loss, upper.trainable_parameters(), upper.paths, retain_graph=True)
            result = {k: p.grad for k, p in phi.tree.items() if p.grad is not None}
            phi.zero_grad()
            return result

        return work


class _Values(nn.Module):
    """A tree as the parameters of a module."""

    def __init__(self, tree: Tree) -> None:
        super().__init__()
        self._names = list(tree)
        self.values = nn.ParameterList([nn.Parameter(v.clone()) for v in tree.values()])

    @property
    def tree(self) -> Tree:
        return dict(zip(self._names, self.values, strict=True))


class Curvlinops(Peer):
    """curvlinops' Hessian operator and its inverse by conjugate gradients.

    Its product is forward over reverse mode and rebuilt every time, forward pass included. The
    energy's potentials do not depend on theta, so they are computed once per solve and not once
    per product. Its probe for determinism is off, and so are the three limits at which its solver
    would stop updating early; it multiplies the zero start as well, one product more than steps.
    It has no hypergradient: both ends are plain automatic differentiation. It works by torch.func,
    like TorchOpt.

    Through layer norm its products are wrong in the rows of the norms' weights (torch 2.13, also in
    float64: 0.05 to 0.4 of the row): forward mode over `jacrev` is, over `torch.func.grad` is not.
    """

    name = "curvlinops"
    packages = ("curvlinops-for-pytorch", "linear_operator")
    modules = ("curvlinops",)

    def _product(self, problem: Problem, v: Tree) -> Work:
        operator, direction = self._operator(problem, _network(problem)), list(v.values())
        return lambda: dict(zip(v, operator @ direction, strict=True))

    def _hypergradient(self, problem: Problem, num_steps: int) -> Work:
        from curvlinops import CGInverseLinearOperator
        from curvlinops.examples import IdentityLinearOperator

        shapes = [tuple(w.shape) for w in problem.theta.values()]
        ridge = problem.damping * IdentityLinearOperator(shapes, problem.device, problem.dtype)
        network = _network(problem)
        # In units of its normalised right-hand side; an eps of zero could divide by zero.
        limits = {"tolerance": 0.0, "stop_updating_after": 0.0, "eps": 1e-30}
        steps = {"max_iter": num_steps, "max_tridiag_iter": 0}

        def work() -> Tree:
            theta, phi = as_leaves(problem.theta), as_leaves(problem.phi)
            rhs, explicit = outer_gradients(problem, theta, phi)
            A = self._operator(problem, network) + ridge
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the tolerance of zero was not reached
                q = CGInverseLinearOperator(A, **steps, **limits) @ rhs
            value = mean_of(problem.inner())(theta, phi)
            gradient = torch.autograd.grad(value, list(theta.values()), create_graph=True)
            mixed = torch.autograd.grad(gradient, list(phi.values()), q)
            return add_scaled(
                dict(zip(phi, explicit, strict=True)), -1.0, dict(zip(phi, mixed, strict=True))
            )

        return work

    def _operator(self, problem: Problem, network: nn.Module) -> Any:
        from curvlinops import HessianLinearOperator

        parameters = dict(network.named_parameters())
        size = len(problem.batch.weight)
        return HessianLinearOperator(
            network,
            _OutputLoss(problem),
            [parameters[name] for name in problem.theta],
            [(problem.batch.inputs, problem.batch.target)],
            check_deterministic=False,
            num_data=size,
            batch_size_fn=lambda inputs: size,
        )


def _network(problem: Problem) -> nn.Module:
    """Return a copy of the inference network that holds theta."""
    network = copy.deepcopy(problem.players.inference_net)
    network.load_state_dict(problem.theta)
    return network


class _OutputLoss(nn.Module):
    """G as a function of the logits, at potentials that are computed once."""

    reduction = "mean"

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self._batch, self._phi, self._losses = problem.batch, problem.phi, problem.losses
        with torch.no_grad():
            self._potentials = problem.players.potentials(problem.batch, problem.phi)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        total, count = self._losses.inner_output(self._batch, logits, self._potentials, self._phi)
        return total / count


class Jax(Peer):
    """The model rewritten in jax.numpy: gradient linearised once, the whole solve compiled.

    See `peers_jax.py`, which is imported on first use because it must come before jax itself. It
    has a gradient of its own, and computes with dense features, as "reference" does.
    """

    name = "jax"
    packages = ("jax", "jaxlib")
    modules = ("peers_jax",)

    def _gradient(self, problem: Problem) -> Work:
        return importlib.import_module("peers_jax").gradient(problem)

    def _product(self, problem: Problem, v: Tree) -> Work:
        return importlib.import_module("peers_jax").product(problem, v)

    def _hypergradient(self, problem: Problem, num_steps: int) -> Work:
        return importlib.import_module("peers_jax").hypergradient(problem, num_steps)


PEERS: dict[str, Peer] = {
    peer.name: peer for peer in (TorchOpt(), Betty(), Curvlinops(), HyperTorch(), Jax())
}
