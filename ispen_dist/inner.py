"""One step of the inference network on `L_MLE + lambda E`, and of the local energy on L_MLE."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ispen_dist.data.batch import Batch
from ispen_dist.linalg.reduction import Reduction
from ispen_dist.linalg.trees import Tree, scaled
from ispen_dist.objectives import inner_terms, mle
from ispen_dist.optim import Optimizer
from ispen_dist.players import Players

Statistics = Mapping[str, Tensor]


def _global_mean(
    total: Tensor, parameters: Tree, also: list[Tensor], count: Tensor, reduction: Reduction
) -> tuple[Tree, list[Tensor]]:
    """Return the gradient and further sums as means over the global batch, in one collective."""
    own = torch.autograd.grad(total, list(parameters.values()))
    sums = reduction.sum([*own, *(s.detach() for s in also), count])
    global_count = sums.pop()
    gradient = dict(zip(parameters, sums, strict=False))
    return scaled(gradient, 1.0 / global_count), [s / global_count for s in sums[len(own) :]]


def inner_step(
    players: Players,
    optimizer: Optimizer,
    batch: Batch,
    energy_weight: float,
    reduction: Reduction,
) -> Statistics:
    """Update theta once on the inner loss.

    Args:
        players: both networks; the energy is held constant.
        optimizer: of theta.
        batch: this rank's examples.
        energy_weight: lambda; at 0 the energy is not evaluated.
        reduction: sums over ranks.

    Returns:
        Means over the global batch: `inner_loss`, `likelihood`, `energy`, and `gradient_norm`.
    """
    players.inference_net.train()
    view = players.view(batch, players.inference_net(batch.inputs))
    if energy_weight > 0.0:
        likelihood, energy = inner_terms(view)
    else:
        likelihood = mle(view)
        energy = torch.zeros_like(likelihood)
    sums = [(term * batch.weight).sum() for term in (likelihood, energy)]
    gradient, (likelihood, energy) = _global_mean(
        sums[0] + energy_weight * sums[1], players.theta, sums, batch.weight.sum(), reduction
    )
    return {
        "inner_loss": likelihood + energy_weight * energy,
        "likelihood": likelihood,
        "energy": energy,
        "gradient_norm": optimizer.step(gradient),
    }


def pretrain_local_step(
    players: Players, optimizer: Optimizer, batch: Batch, reduction: Reduction
) -> Statistics:
    """Update the local potentials of the energy once, as the logits of an independent model.

    Returns:
        Mean over the global batch: `local_likelihood`.
    """
    players.energy.train()
    view = players.view(batch, players.energy.local_logits(batch.inputs))
    total = (mle(view) * batch.weight).sum()
    gradient, (likelihood,) = _global_mean(
        total, players.local, [total], batch.weight.sum(), reduction
    )
    players.energy.eval()
    optimizer.step(gradient)
    return {"local_likelihood": likelihood}
