"""Prediction in one forward pass, and metrics over a data set that is shared among ranks."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ispen_dist.data.batch import Batch
from ispen_dist.data.datasets import Dataset
from ispen_dist.data.sampler import in_order
from ispen_dist.linalg.reduction import OneProcess, Reduction
from ispen_dist.metrics import Metrics
from ispen_dist.models.output_spaces import OutputSpace


@torch.no_grad()
def predictions(
    network: nn.Module,
    space: OutputSpace,
    dataset: Dataset,
    *,
    batch_size: int = 256,
    rank: int = 0,
    num_ranks: int = 1,
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield this rank's batches in order, each with its relaxed outputs `A_theta(x)`.

    Args:
        network: the inference network; it is left in evaluation mode.
        space: the kind of structure.
        dataset: examples, labelled or not.
        batch_size: examples per forward pass.
        rank: this rank.
        num_ranks: ranks that share the data set; each example is on exactly one.
    """
    network.eval()
    parameter = next(network.parameters())
    for rows in in_order(len(dataset), batch_size, rank, num_ranks):
        batch = dataset.collate(rows).to(parameter.device, parameter.dtype)
        yield batch, space.relax(network(batch.inputs), batch.inputs)


def evaluate(
    network: nn.Module,
    space: OutputSpace,
    metrics: Metrics,
    dataset: Dataset,
    *,
    threshold: float | None = None,
    rank: int = 0,
    reduction: Reduction | None = None,
) -> dict[str, float]:
    """Return the metrics of the whole data set, the same on every rank.

    Args:
        network: the inference network.
        space: the kind of structure.
        metrics: what to compute.
        dataset: labelled examples.
        threshold: decision threshold tuned elsewhere; None tunes it on this data set.
        rank: this rank.
        reduction: sums over ranks.
    """
    reduction = reduction or OneProcess()
    device = next(network.parameters()).device
    sums = metrics.zero()
    shares = predictions(network, space, dataset, rank=rank, num_ranks=reduction.num_ranks)
    for batch, ybar in shares:
        sums += metrics.sums(ybar, batch)
    total = reduction.sum([sums.to(device)])[0].cpu()
    return metrics.finish(total, threshold)
