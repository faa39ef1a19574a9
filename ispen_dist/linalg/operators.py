"""Curvature of the inner loss at one point, as products on trees.

Notation: G(theta, phi) inner loss, z = model(theta) outputs, g(z, phi) output loss, J = dz/dtheta.

An operator evaluates its loss exactly once, when it is built, and keeps the graph of the
first-order gradient; a product is one reverse pass through that graph. So (1) forward values and
adjoints are paid once per solve and not once per product, and (2) whatever randomness the loss
draws (a dropout mask, a sample) is frozen for the whole solve, which keeps the operator
symmetric: a fresh mask per product would not even give a linear map.

Only reverse mode is used. It is right through layer norm, batch norm, LSTM and softmax attention,
where forward mode over reverse mode is not always (torch 2.13).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ispen_dist.linalg.reduction import LossValue, OneProcess, Reduction, own_share, sum_tree
from ispen_dist.linalg.tangents import Tangents
from ispen_dist.linalg.trees import Tree, as_leaves, detached
from ispen_dist.linalg.vectors import Vectors

Loss = Callable[[Tree, Tree], LossValue]


@dataclass(frozen=True)
class ComposedLoss:
    """An inner loss whose model and output loss are given apart: `G = g(model(theta), phi)`.

    Gauss-Newton curvature needs the two parts; as a function of (theta, phi) it is the plain loss.

    Attributes:
        model: `theta -> z`, one tensor of outputs of any shape.
        output_loss: `(z, phi) -> scalar` or `(sum, count)`; sees theta only through `z`.
    """

    model: Callable[[Tree], Tensor]
    output_loss: Callable[[Tensor, Tree], LossValue]

    def __call__(self, theta: Tree, phi: Tree) -> LossValue:
        """Evaluate the loss at (theta, phi)."""
        return self.output_loss(self.model(theta), phi)


class CurvatureOperator(Protocol):
    """The interface that the hypergradient needs of a curvature.

    Attributes:
        value: G over the global batch, shape `()`.
        gradient: `d_theta G` over the global batch.
    """

    value: Tensor
    gradient: Tree

    def matvec(self, v: Tree) -> Tree:
        """Return the product `H v`, summed over ranks."""
        ...

    def mixed(self, q: Tree, combination: Sequence[float] = ()) -> Tree:
        """Return `d_phi <d_theta G, q>`, summed over ranks, a tree like phi.

        Args:
            q: a tree like theta.
            combination: where known, the coefficients of q in the vectors of all products so far,
                in order; may save a pass through the model, see `tangents`.
        """
        ...


def pull_back(
    outputs: list[Tensor], inputs: Tree, cotangents: list[Tensor], *, create_graph: bool = False
) -> Tree:
    """Return the vector-Jacobian product as a tree like `inputs`; zeros where nothing depends.

    Outputs that are constant (no graph) contribute nothing. The graph is kept.
    """
    live = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not live:
        return {key: torch.zeros_like(value) for key, value in inputs.items()}
    grads = torch.autograd.grad(
        [o for o, _ in live],
        list(inputs.values()),
        [c for _, c in live],
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(inputs, grads, strict=True))


class HessianOperator:
    """The exact Hessian `H = d^2 G / d theta^2` by a kept reverse-over-reverse graph.

    Args:
        loss: `(theta, phi) -> scalar` or `(sum, count)`, called once.
        theta: the point of the solve.
        phi: the outer parameters.
        reduction: how sums are added over ranks.

    Example:
        >>> import torch
        >>> theta = {"w": torch.tensor([1.0, 2.0])}
        >>> H = HessianOperator(lambda t, p: (t["w"] ** 3).sum(), theta, {})
        >>> H.matvec({"w": torch.tensor([1.0, 1.0])})["w"]
        tensor([ 6., 12.])
    """

    def __init__(
        self, loss: Loss, theta: Tree, phi: Tree, reduction: Reduction | None = None
    ) -> None:
        self._reduction = reduction or OneProcess()
        self._theta, self._phi = as_leaves(theta), as_leaves(phi)
        share = own_share(loss(self._theta, self._phi), self._reduction, "inner_loss")
        own_gradient = pull_back([share], self._theta, [torch.ones_like(share)], create_graph=True)
        self._own_gradient = list(own_gradient.values())
        self.value = self._reduction.sum([share.detach()])[0]
        self.gradient = sum_tree(detached(own_gradient), self._reduction)

    def matvec(self, v: Tree) -> Tree:
        """Return `H v`: d_theta <d_theta G, v> with v held constant."""
        own = pull_back(self._own_gradient, self._theta, list(v.values()))
        return sum_tree(own, self._reduction)

    def mixed(self, q: Tree, combination: Sequence[float] = ()) -> Tree:
        """Return `d_phi <d_theta G, q>` from the same graph."""
        own = pull_back(self._own_gradient, self._phi, list(q.values()))
        return sum_tree(own, self._reduction)


class GaussNewtonOperator:
    """The generalised Gauss-Newton matrix `J^T g_zz J` of a `ComposedLoss`.

    Positive semidefinite where `g` is convex in `z`. The tangent `J v` comes from differentiating
    the linear map `u -> J^T u` in `u`, so every operation needs reverse mode only, and its graph
    is kept like the others.

    The mixed product is formed in output space: `d_phi <J^T g_z, q> = d_phi <g_z, J q>`, so the
    model is not differentiated again.

    Args:
        loss: the two parts of the inner loss; the model is called once.
        theta: the point of the solve.
        phi: the outer parameters.
        reduction: how sums are added over ranks.
    """

    def __init__(
        self, loss: ComposedLoss, theta: Tree, phi: Tree, reduction: Reduction | None = None
    ) -> None:
        self._reduction = reduction or OneProcess()
        self._theta, self._phi = as_leaves(theta), as_leaves(phi)
        self._z = loss.model(self._theta)
        z = self._z.detach().requires_grad_()
        share = own_share(loss.output_loss(z, self._phi), self._reduction, "inner_loss")
        self._outputs = {"z": z}
        self._g_z = pull_back([share], self._outputs, [torch.ones_like(share)], create_graph=True)
        self._u = {"u": torch.zeros_like(z, requires_grad=True)}
        self._Jt_u = list(
            pull_back([self._z], self._theta, [self._u["u"]], create_graph=True).values()
        )
        self._tangents = Tangents()
        own_gradient = pull_back([self._z], self._theta, [self._g_z["z"].detach()])
        self.value = self._reduction.sum([share.detach()])[0]
        self.gradient = sum_tree(own_gradient, self._reduction)

    def matvec(self, v: Tree) -> Tree:
        """Return `J^T g_zz J v`."""
        z_dot = self._tangents.seen(self._tangent(v))
        g_zz_zdot = pull_back([self._g_z["z"]], self._outputs, [z_dot])["z"]
        own = pull_back([self._z], self._theta, [g_zz_zdot])
        return sum_tree(own, self._reduction)

    def mixed(self, q: Tree, combination: Sequence[float] = ()) -> Tree:
        """Return `d_phi <g_z, J q>`."""
        z_dot = self._tangents.combined(combination) if combination else self._tangent(q)
        own = pull_back([self._g_z["z"]], self._phi, [z_dot])
        return sum_tree(own, self._reduction)

    def _tangent(self, v: Tree) -> Tensor:
        return pull_back(self._Jt_u, self._u, list(v.values()))["u"]


CURVATURES = ("hessian", "gauss_newton")


def build_operator(
    curvature: str, loss: Loss, theta: Tree, phi: Tree, reduction: Reduction | None = None
) -> CurvatureOperator:
    """Build the curvature operator of the given name, one of `CURVATURES`.

    Raises:
        ValueError: for an unknown name, or Gauss-Newton of a loss that is not a `ComposedLoss`.
    """
    if curvature == "hessian":
        return HessianOperator(loss, theta, phi, reduction)
    if curvature == "gauss_newton":
        if not isinstance(loss, ComposedLoss):
            raise ValueError(
                'curvature="gauss_newton": expected inner_loss to be a ComposedLoss(model, '
                f"output_loss), got {type(loss).__name__}; give the model and its output loss "
                'apart, or use curvature="hessian"'
            )
        return GaussNewtonOperator(loss, theta, phi, reduction)
    raise ValueError(f"curvature: expected one of {', '.join(CURVATURES)}, got {curvature!r}")


def symmetry_defect(
    operator: CurvatureOperator, u: Tree, v: Tree, vectors: Vectors | None = None
) -> Tensor:
    """Measure how far an operator is from symmetric, `|u.Hv - v.Hu| / (|Hv| |u| + |Hu| |v|)`.

    A probe before curvature is trusted: rounding gives about the unit roundoff; a loss that draws
    fresh randomness, or ranks that disagree, give a number near one.

    Args:
        operator: the curvature.
        u: a random direction.
        v: another one.
        vectors: arithmetic, over ranks where trees are own parts.
    """
    Hu, Hv = operator.matvec(u), operator.matvec(v)
    pairs = [(u, Hv), (v, Hu), (u, u), (v, v), (Hu, Hu), (Hv, Hv)]
    uHv, vHu, uu, vv, HuHu, HvHv = (vectors or Vectors()).dots(pairs).unbind()
    return (uHv - vHu).abs() / ((HvHv * uu).sqrt() + (HuHu * vv).sqrt())
