"""Predictions, and metrics over a data set that is shared among ranks."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ispen_dist.data.batch import Batch
from ispen_dist.data.datasets import Dataset
from ispen_dist.data.sampler import in_order
from ispen_dist.linalg.reduction import OneProcess, Reduction
from ispen_dist.metrics import Metrics
from ispen_dist.models.output_spaces import Inputs, OutputSpace


@torch.no_grad()
def predictions(
    logits: Callable[[Inputs], Tensor],
    space: OutputSpace,
    dataset: Dataset,
    like: Tensor,
    *,
    batch_size: int = 256,
    rank: int = 0,
    num_ranks: int = 1,
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield this rank's batches in order, each with its relaxed outputs.

    Args:
        logits: `inputs -> logits` of the predicted structures, see `inference.predict`. Ranks that
            share sharded parameters call it equally often, fillers included.
        space: the kind of structure.
        dataset: examples, labelled or not.
        like: a tensor with the device and type of the parameters.
        batch_size: examples that are predicted together.
        rank: this rank.
        num_ranks: ranks that share the data set; each example is on exactly one.
    """
    for rows in in_order(len(dataset), batch_size, rank, num_ranks):
        batch = dataset.collate(rows).to(like.device, like.dtype)
        yield batch, space.relax(logits(batch.inputs), batch.inputs)


def evaluate(
    logits: Callable[[Inputs], Tensor],
    space: OutputSpace,
    metrics: Metrics,
    dataset: Dataset,
    like: Tensor,
    *,
    choices: Mapping[str, float] | None = None,
    rank: int = 0,
    reduction: Reduction | None = None,
) -> dict[str, float]:
    """Return the metrics of the whole data set, the same on every rank.

    Args:
        logits: see `predictions`.
        space: the kind of structure.
        metrics: what to compute.
        dataset: labelled examples.
        like: a tensor with the device and type of the parameters.
        choices: what was tuned elsewhere, see `decisions`; what is not there is tuned on this set.
        rank: this rank.
        reduction: sums over ranks.
    """
    reduction = reduction or OneProcess()
    sums = metrics.zero()
    shares = predictions(logits, space, dataset, like, rank=rank, num_ranks=reduction.num_ranks)
    for batch, ybar in shares:
        sums += metrics.sums(ybar, batch)
    total = reduction.sum([sums.to(like.device)])[0].cpu()
    return metrics.finish(total, choices or {})
