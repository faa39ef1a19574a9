"""How sums over ranks enter the mathematics: one small interface, implemented in `distributed/`.

A loss is a mean over the *global* batch, and ranks may hold different numbers of examples, some
none. So a rank differentiates its own share, `sum_of_own_examples / global_count`, and shares of
values, gradients and products are added over ranks. Means are never averaged.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from ispen_dist.linalg.trees import Tree

LossValue = Tensor | tuple[Tensor, Tensor | float]


class Reduction(Protocol):
    """Adds tensors over the ranks that hold parts of one batch."""

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums over all ranks, identical on every rank, in one collective."""
        ...

    @property
    def num_ranks(self) -> int:
        """Number of ranks that take part."""
        ...


class OneProcess:
    """The reduction of a single process: every sum is already global."""

    num_ranks = 1

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors as they are."""
        return list(tensors)


def own_share(value: LossValue, reduction: Reduction, name: str) -> Tensor:
    """Turn what a loss function returned into this rank's share of the global mean.

    Args:
        value: a scalar mean, or a pair `(sum, count)` over this rank's examples.
        reduction: adds counts over ranks.
        name: how to call the loss in an error.

    Returns:
        Scalar of shape `()`; the shares of all ranks add up to the global mean.

    Raises:
        ValueError: for a plain scalar on several ranks (the counts are needed), or a value that
            is no scalar. A global count of zero gives NaN, which the solver reports.
    """
    if isinstance(value, tuple):
        total, count = value
        _require_scalar(total, name)
        count = count if isinstance(count, Tensor) else total.new_tensor(count)
        return total / reduction.sum([count.detach()])[0]
    _require_scalar(value, name)
    if reduction.num_ranks > 1:
        raise ValueError(
            f"{name}: expected a pair (sum, count) since {reduction.num_ranks} ranks share the "
            "batch, got a plain scalar; return the sum over this rank's examples and their number"
        )
    return value


def _require_scalar(value: Tensor, name: str) -> None:
    if value.dim() != 0:
        raise ValueError(
            f"{name}: expected a scalar of shape (), got shape {tuple(value.shape)}; "
            "sum over the examples first"
        )


def agreed_products(reduction: Reduction) -> Callable[[Tensor], Tensor]:
    """Return what makes inner products of replicated trees the same bits on every rank.

    Replicas hold the same vectors, but two machines may round their inner products differently,
    and a solver that stops on one rank only would leave the others waiting. So the decisions of a
    solve come from the average over ranks, one small all-reduce per call.
    """
    if reduction.num_ranks == 1:
        return lambda products: products
    return lambda products: reduction.sum([products / reduction.num_ranks])[0]


def agreed(scalar: Tensor, reduction: Reduction) -> float:
    """Return the average over ranks of a scalar that replicas computed alike, on the host."""
    return (reduction.sum([scalar])[0] / reduction.num_ranks).item()


def sum_tree(tree: Tree, reduction: Reduction) -> Tree:
    """Add a tree over ranks in one collective."""
    return dict(zip(tree, reduction.sum(list(tree.values())), strict=True))
