"""Which examples a rank reads at a step: a pure function of (seed, step, rank), with no state.

Every epoch is a fresh permutation of all examples, cut into global batches; the last one of an
epoch is smaller where the sizes do not divide. A global batch does not depend on the number of
ranks, each rank takes one contiguous part of it (parts differ by at most one example and may be
empty), so no example is lost or seen twice, a run on N ranks sees the batches of a run on one, and
resuming needs no more than the step number, on any number of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ShardedSampler:
    """Training batches for one rank.

    Attributes:
        num_examples: size of the data set.
        batch_size: examples in a global batch.
        seed: of the permutations.
        rank: this rank.
        num_ranks: ranks that share a batch.
    """

    num_examples: int
    batch_size: int
    seed: int
    rank: int = 0
    num_ranks: int = 1

    def __post_init__(self) -> None:
        if self.num_examples < 1:
            raise ValueError("ShardedSampler: expected at least one example, got an empty data set")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {self.batch_size}")

    @property
    def batches_per_epoch(self) -> int:
        """Global batches in one pass over the data."""
        return -(-self.num_examples // self.batch_size)

    def global_batch(self, step: int) -> np.ndarray:
        """Row numbers of the global batch of a step, int64."""
        epoch, position = divmod(step, self.batches_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)
        return order[position * self.batch_size : (position + 1) * self.batch_size]

    def own_batch(self, step: int) -> np.ndarray:
        """Row numbers of this rank's part of the global batch of a step, possibly none."""
        return np.array_split(self.global_batch(step), self.num_ranks)[self.rank]


def in_order(
    num_examples: int, batch_size: int, rank: int = 0, num_ranks: int = 1
) -> Iterator[np.ndarray]:
    """Yield this rank's row numbers in order, each example on exactly one rank, for evaluation.

    Every rank gets equally many batches, the last ones possibly empty, so that all ranks take part
    in what a batch needs of them.
    """
    parts = np.array_split(np.arange(num_examples), num_ranks)
    for begin in range(0, len(parts[0]), batch_size):
        yield parts[rank][begin : begin + batch_size]
