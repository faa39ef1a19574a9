"""How the parameters of a network lie over ranks, as far as the mathematics needs to know.

A solver vector is a tree of *own parts*: what this rank holds of every parameter. For replicas
that is the whole tensor, for shards (`ispen_dist.distributed.shards`) a flat piece, empty on some
ranks. The arithmetic of `trees` works on own parts as it does on whole trees; what crosses ranks
is here: inner products, gathering one stage, and summing one stage's gradient into own parts.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from ispen_dist.linalg.reduction import Reduction, agreed_dots, sum_tree
from ispen_dist.linalg.trees import Tree


class Layout(Protocol):
    """Where the parts of a parameter tree are."""

    @property
    def reduction(self) -> Reduction:
        """Sums over all ranks."""
        ...

    def gather(self, trees: Sequence[Tree]) -> Callable[[], list[Tree]]:
        """Start to collect whole tensors from own parts, in one collective.

        Args:
            trees: trees of own parts with the keys that are wanted, such as the parameters of
                one stage and a direction. All ranks call with the same keys in the same order.

        Returns:
            A function that waits and returns the trees in whole tensors; what it returns must
            not be written to.
        """
        ...

    def reduce(self, whole: Tree) -> Tree:
        """Add whole tensors over ranks and return the own parts of the sums."""
        ...

    def own(self, whole: Tree) -> Tree:
        """Cut this rank's parts out of whole tensors that are alike on all ranks."""
        ...

    def dots(self, pairs: Sequence[tuple[Tree, Tree]]) -> Tensor:
        """Return the inner products of pairs of own parts over all ranks, in one all-reduce."""
        ...

    def draw_seed(self, seed: int) -> int:
        """Return the seed for random own parts: alike where ranks hold the same, else not."""
        ...

    def of(self, prefix: str) -> "Layout":
        """Return the layout of a submodule, whose names lack the prefix."""
        ...


class Replicas:
    """Every rank holds the whole tree.

    Args:
        reduction: sums over the ranks.
    """

    def __init__(self, reduction: Reduction) -> None:
        self._reduction = reduction
        self._dots = agreed_dots(reduction)

    @property
    def reduction(self) -> Reduction:
        """Sums over all ranks."""
        return self._reduction

    def gather(self, trees: Sequence[Tree]) -> Callable[[], list[Tree]]:
        """Return the trees as they are."""
        return lambda: list(trees)

    def reduce(self, whole: Tree) -> Tree:
        """Add over ranks, in one all-reduce."""
        return sum_tree(whole, self._reduction)

    def own(self, whole: Tree) -> Tree:
        """Return the tree as it is."""
        return whole

    def dots(self, pairs: Sequence[tuple[Tree, Tree]]) -> Tensor:
        """Return inner products with the same bits on every rank, see `agreed_dots`."""
        return self._dots(pairs)

    def draw_seed(self, seed: int) -> int:
        """Return the same seed on every rank."""
        return seed

    def of(self, prefix: str) -> "Replicas":
        """Return itself: nothing depends on names."""
        return self


def norms(layout: Layout, *trees: Tree) -> list[float]:
    """Return the Euclidean norms of trees of own parts from one all-reduce, on the host."""
    return layout.dots([(tree, tree) for tree in trees]).clamp(min=0.0).sqrt().tolist()
