"""Training batches on the device, as a function of the step."""

import torch

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
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, seed: int, session: Session, dtype: torch.dtype
    ) -> None:
        self.dataset, self.session, self.dtype = dataset, session, dtype
        self.sampler = ShardedSampler(
            len(dataset), batch_size, seed, session.rank, session.num_ranks
        )

    def batch(self, step: int) -> Batch:
        """Return this rank's part of the global batch of a step."""
        batch = self.dataset.collate(self.sampler.own_batch(step))
        return batch.to(self.session.device, self.dtype)
