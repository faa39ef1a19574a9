"""One step of the inference network on the inner loss, and of the local energy on L_MLE."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ispen_dist import ranges
from ispen_dist.data.batch import Batch
from ispen_dist.engine import Engines
from ispen_dist.inference import potentials_and_head
from ispen_dist.objectives import fixed, inner_terms, mle
from ispen_dist.players import Players

Statistics = Mapping[str, Tensor]


@ranges.marked("inner step")
def inner_step(
    players: Players, engines: Engines, batch: Batch, energy_weight: float
) -> Statistics:
    """Update theta once on the inner loss.

    The energy is a constant here: its potentials and its head are read without its engine.

    Args:
        players: both networks.
        engines: with their optimizers.
        batch: this rank's examples.
        energy_weight: lambda; at 0 the energy is not evaluated.

    Returns:
        Means over the global batch: `inner_loss`, `fixed_loss`, `energy`, and `gradient_norm`.
    """
    logits = engines.inference_net.forward(batch.inputs)
    if energy_weight > 0.0:
        view = players.view(batch, logits, *potentials_and_head(engines, batch.inputs))
        constant, energy = inner_terms(view)
    else:
        constant = fixed(players.view(batch, logits, logits.detach()))
        energy = torch.zeros_like(constant)
    sums = [(term * batch.weight).sum() for term in (constant, energy)]
    total = sums[0] + energy_weight * sums[1]
    means, norm = engines.inference_net.step(total, sums, batch.weight.sum())
    return {
        "inner_loss": means[0] + energy_weight * means[1],
        "fixed_loss": means[0],
        "energy": means[1],
        "gradient_norm": norm,
    }


@ranges.marked("pretraining step")
def pretrain_local_step(players: Players, engines: Engines, batch: Batch) -> Statistics:
    """Update the local potentials of the energy once, as the logits of an independent model.

    Returns:
        Mean over the global batch: `local_likelihood`, and `local_gradient_norm`.
    """
    potentials = engines.energy.forward(batch.inputs)
    total = (mle(players.view(batch, potentials, potentials.detach())) * batch.weight).sum()
    (likelihood,), norm = engines.energy.step(total, [total], batch.weight.sum())
    return {"local_likelihood": likelihood, "local_gradient_norm": norm}
