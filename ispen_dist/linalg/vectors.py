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
    """The passes in plain PyTorch, and the reference of all others.

    All that is done to one tensor is done before the next is touched, so that on a CPU the second
    operation finds it in the cache.
    """

    def dots(self, pairs: Sequence[tuple[Parts, Parts]]) -> Tensor:
        """See `Local.dots`."""
        size = len(pairs[0][0])
        sums = [torch.stack([_dot(a[i], b[i]) for a, b in pairs]) for i in range(size)]
        return torch.stack(sums).sum(0)

    def curvature(self, p: Parts, Hp: Parts, shift: Tensor) -> Tensor:
        """See `Local.curvature`."""
        pHp, pp = self.dots([(p, Hp), (p, p)])
        return pHp + shift * pp

    def cg_update(
        self, q: Parts, r: Parts, p: Parts, Hp: Parts, alpha: Tensor, shift: Tensor
    ) -> Tensor:
        """See `Local.cg_update`."""
        step, back, damping = (_scale(x) for x in (alpha, -alpha, -alpha * shift))
        products = []
        for q_i, r_i, p_i, Hp_i in zip(q, r, p, Hp, strict=True):
            _add_multiple(q_i, p_i, step)
            _add_multiple(r_i, Hp_i, back)
            _add_multiple(r_i, p_i, damping)
            products.append(_dot(r_i, r_i))
        return torch.stack(products).sum()

    def direction_update(self, p: Parts, r: Parts, beta: Tensor) -> None:
        """See `Local.direction_update`."""
        scale = _scale(beta)
        for p_i, r_i in zip(p, r, strict=True):
            _turn(p_i, r_i, scale)

    def single_reduction_update(
        self, q: Parts, r: Parts, p: Parts, s: Parts, Ar: Parts, alpha: Tensor, beta: Tensor
    ) -> None:
        """See `Local.single_reduction_update`."""
        step, back, turn = (_scale(x) for x in (alpha, -alpha, beta))
        for q_i, r_i, p_i, s_i, Ar_i in zip(q, r, p, s, Ar, strict=True):
            _turn(p_i, r_i, turn)
            _turn(s_i, Ar_i, turn)
            _add_multiple(q_i, p_i, step)
            _add_multiple(r_i, s_i, back)


PIECE = 65536
"""Terms that are summed at a time: torch.dot over a million float32 terms is off by 1e-6 to 1e-5 on
a CPU, in pieces by 3e-8, and unlike a product and a sum it allocates nothing."""


def _dot(x: Tensor, y: Tensor) -> Tensor:
    if x.is_cuda:
        return torch.dot(x.flatten(), y.flatten())
    # Two that lie alike by columns are read as they lie.
    if x.dim() == 2 and x.T.is_contiguous() and y.T.is_contiguous():
        x, y = x.T, y.T
    pieces = zip(x.flatten().split(PIECE), y.flatten().split(PIECE), strict=True)
    sums = [torch.dot(a, b) for a, b in pieces]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def _scale(scalar: Tensor) -> Tensor | float:
    """Return a number on a CPU, where reading it costs nothing, and leave it on a GPU."""
    return scalar if scalar.is_cuda else scalar.item()


def _add_multiple(y: Tensor, x: Tensor, scale: Tensor | float) -> None:
    """Set y += scale x in place."""
    if isinstance(scale, Tensor):
        y.addcmul_(x, scale)
    else:
        y.add_(x, alpha=scale)


def _turn(p: Tensor, r: Tensor, beta: Tensor | float) -> None:
    """Set p = r + beta p in place."""
    if isinstance(beta, Tensor):
        torch.addcmul(r, p, beta, out=p)
    else:
        torch.add(r, p, alpha=beta, out=p)


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
        q_, r_, p_, Hp_ = map(_parts, (q, r, p, Hp))
        return self._reduce(self._local.cg_update(q_, r_, p_, Hp_, alpha, shift))

    def direction_update(self, p: Tree, r: Tree, beta: Tensor) -> None:
        """Set p = r + beta p in place."""
        self._local.direction_update(_parts(p), _parts(r), beta)

    def single_reduction_update(
        self, q: Tree, r: Tree, p: Tree, s: Tree, Ar: Tree, alpha: Tensor, beta: Tensor
    ) -> None:
        """Set p = r + beta p, s = Ar + beta s, q += alpha p and r -= alpha s, in place."""
        q_, r_, p_, s_, Ar_ = map(_parts, (q, r, p, s, Ar))
        self._local.single_reduction_update(q_, r_, p_, s_, Ar_, alpha, beta)


def _parts(tree: Tree) -> list[Tensor]:
    return list(tree.values())
