"""How the parameters of a network lie over ranks, as far as the mathematics needs to know.

A solver vector is a tree of *own parts*: what this rank holds of every parameter. For replicas
that is the whole tensor, for shards (`ispen_dist.distributed.shards`) a flat piece, empty on some
ranks. The arithmetic of `trees` works on own parts as it does on whole trees; what crosses ranks
is here: inner products, gathering one stage, and summing one stage's gradient into own parts.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from ispen_dist.linalg.reduction import Reduction, agreed_products, sum_tree
from ispen_dist.linalg.trees import Tree
from ispen_dist.linalg.vectors import Local, Vectors


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

    def vectors(self, local: Local | None = None) -> Vectors:
        """Return the arithmetic of own parts, with inner products over all ranks."""
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

    def vectors(self, local: Local | None = None) -> Vectors:
        """Return arithmetic whose scalars have the same bits on every rank."""
        return Vectors(agreed_products(self._reduction), local)

    def draw_seed(self, seed: int) -> int:
        """Return the same seed on every rank."""
        return seed

    def of(self, prefix: str) -> "Replicas":
        """Return itself: nothing depends on names."""
        return self


def norms(layout: Layout, *trees: Tree) -> list[float]:
    """Return the Euclidean norms of trees of own parts from one all-reduce, on the host."""
    products = layout.vectors().dots([(tree, tree) for tree in trees])
    return products.clamp(min=0.0).sqrt().tolist()
