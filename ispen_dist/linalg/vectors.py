"""Arithmetic of solver vectors: what is done to own parts here, and what is summed over ranks.

An iteration of conjugate gradients reads and writes vectors as large as the network, so it is a few
passes over memory and nothing else. `Local` names them; implementations that make one pass of each
are in `ispen_dist.ops.vectors`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ispen_dist.linalg.trees import Tree

Parts = Sequence[Tensor]


class Local(Protocol):
    """Passes over this rank's parts; lists of tensors of the same shapes."""

    def dots(self, pairs: Sequence[tuple[Parts, Parts]]) -> Tensor:
        """Return inner products, (n,)."""
        ...

    def curvature(self, p: Parts, Hp: Parts, shift: Tensor) -> Tensor:
        """Return <p, Hp + shift p>, shape ()."""
        ...

    def cg_update(
        self, q: Parts, r: Parts, p: Parts, Hp: Parts, alpha: Tensor, shift: Tensor
    ) -> Tensor:
        """Set q += alpha p and r -= alpha (Hp + shift p) in place, and return <r, r>, shape ()."""
        ...

    def direction_update(self, p: Parts, r: Parts, beta: Tensor) -> None:
        """Set p = r + beta p in place."""
        ...

    def single_reduction_update(
        self, q: Parts, r: Parts, p: Parts, s: Parts, Ar: Parts, alpha: Tensor, beta: Tensor
    ) -> None:
        """Set p = r + beta p, s = Ar + beta s, q += alpha p and r -= alpha s, in place."""
        ...


class PlainLocal:
    """The passes in plain PyTorch, operation by operation: the reference of all others."""

    def dots(self, pairs: Sequence[tuple[Parts, Parts]]) -> Tensor:
        """See `Local.dots`."""
        return torch.stack([_dot(a, b) for a, b in pairs])

    def curvature(self, p: Parts, Hp: Parts, shift: Tensor) -> Tensor:
        """See `Local.curvature`."""
        return _dot(p, Hp) + shift * _dot(p, p)

    def cg_update(
        self, q: Parts, r: Parts, p: Parts, Hp: Parts, alpha: Tensor, shift: Tensor
    ) -> Tensor:
        """See `Local.cg_update`."""
        _add_multiple(q, p, alpha)
        _add_multiple(r, Hp, -alpha)
        _add_multiple(r, p, -alpha * shift)
        return _dot(r, r)

    def direction_update(self, p: Parts, r: Parts, beta: Tensor) -> None:
        """See `Local.direction_update`."""
        for p_i, r_i in zip(p, r, strict=True):
            torch.addcmul(r_i, p_i, beta, out=p_i)

    def single_reduction_update(
        self, q: Parts, r: Parts, p: Parts, s: Parts, Ar: Parts, alpha: Tensor, beta: Tensor
    ) -> None:
        """See `Local.single_reduction_update`."""
        self.direction_update(p, r, beta)
        self.direction_update(s, Ar, beta)
        _add_multiple(q, p, alpha)
        _add_multiple(r, s, -alpha)


def _dot(a: Parts, b: Parts) -> Tensor:
    both = zip(a, b, strict=True)
    return torch.stack([_inner(x, y) for x, y in both]).sum()


def _inner(x: Tensor, y: Tensor) -> Tensor:
    # Two that lie alike by columns are read as they lie.
    if x.dim() == 2 and x.T.is_contiguous() and y.T.is_contiguous():
        x, y = x.T, y.T
    return torch.dot(x.flatten(), y.flatten())


def _add_multiple(y: Parts, x: Parts, scale: Tensor) -> None:
    for y_i, x_i in zip(y, x, strict=True):
        y_i.addcmul_(x_i, scale)


class Vectors:
    """The arithmetic of one solve.

    Args:
        reduce: sums a tensor of local inner products over ranks; default one process.
        local: passes over this rank's parts.
    """

    def __init__(
        self, reduce: Callable[[Tensor], Tensor] | None = None, local: Local | None = None
    ) -> None:
        self._reduce = reduce or (lambda products: products)
        self._local = local or PlainLocal()

    def dots(self, pairs: Sequence[tuple[Tree, Tree]]) -> Tensor:
        """Return inner products of pairs of trees over all ranks, (n,), in one reduction."""
        return self._reduce(self._local.dots([(_parts(a), _parts(b)) for a, b in pairs]))

    def curvature(self, p: Tree, Hp: Tree, shift: Tensor) -> Tensor:
        """Return <p, Hp + shift p> over all ranks, shape ()."""
        return self._reduce(self._local.curvature(_parts(p), _parts(Hp), shift))

    def cg_update(
        self, q: Tree, r: Tree, p: Tree, Hp: Tree, alpha: Tensor, shift: Tensor
    ) -> Tensor:
        """Set q += alpha p and r -= alpha (Hp + shift p); return <r, r> over all ranks."""
        return self._reduce(self._local.cg_update(*map(_parts, (q, r, p, Hp)), alpha, shift))

    def direction_update(self, p: Tree, r: Tree, beta: Tensor) -> None:
        """Set p = r + beta p in place."""
        self._local.direction_update(_parts(p), _parts(r), beta)

    def single_reduction_update(
        self, q: Tree, r: Tree, p: Tree, s: Tree, Ar: Tree, alpha: Tensor, beta: Tensor
    ) -> None:
        """Set p = r + beta p, s = Ar + beta s, q += alpha p and r -= alpha s, in place."""
        self._local.single_reduction_update(*map(_parts, (q, r, p, s, Ar)), alpha, beta)


def _parts(tree: Tree) -> list[Tensor]:
    return list(tree.values())
