"""Training batches on the device, as a function of the step."""

from collections.abc import Callable, Sequence

import torch

from ispen_dist import ranges
from ispen_dist.config import CompileConfig
from ispen_dist.data.batch import Batch
from ispen_dist.data.datasets import Dataset
from ispen_dist.data.sampler import ShardedSampler
from ispen_dist.distributed import Session


class Source:
    """Batches of one data set for one purpose, as a function of the step.

    Args:
        dataset: the examples.
        batch_size: of a global batch.
        seed: of the order.
        session: this process and its device.
        dtype: of floating-point tensors.
        buckets: numbers of tokens that batches are padded to, see `compile.buckets`; without any
            a batch is as large as its examples make it.
        augment: what a batch goes through before, as a function of the step.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        session: Session,
        dtype: torch.dtype,
        buckets: Sequence[int] = (),
        augment: Callable[[Batch, int], Batch] | None = None,
    ) -> None:
        self.dataset, self.session, self.dtype = dataset, session, dtype
        self._buckets, self._augment = buckets, augment
        self._num_rows = -(-batch_size // session.num_ranks)
        self.sampler = ShardedSampler(
            len(dataset), batch_size, seed, session.rank, session.num_ranks
        )

    @ranges.marked("data")
    def batch(self, step: int) -> Batch:
        """Return this rank's part of the global batch of a step."""
        batch = self.dataset.collate(self.sampler.own_batch(step))
        if self._augment:
            batch = self._augment(batch, step)
        if self._buckets:
            num_tokens = batch.inputs["mask"].shape[1] if "mask" in batch.inputs else 0
            batch = batch.padded(self._num_rows, bucket_of(num_tokens, self._buckets))
        return batch.to(self.session.device, self.dtype)


POWERS_OF_TWO = tuple(2**i for i in range(3, 13))


def buckets_of(config: CompileConfig) -> Sequence[int]:
    """Return the numbers of tokens that batches are padded to; none where nothing is compiled."""
    if config.buckets or not config.any:
        return config.buckets
    return POWERS_OF_TWO


def bucket_of(num_tokens: int, buckets: Sequence[int]) -> int:
    """Return the smallest bucket that is large enough, beyond the last a multiple of it."""
    for bucket in buckets:
        if num_tokens <= bucket:
            return bucket
    return -(-num_tokens // buckets[-1]) * buckets[-1]
