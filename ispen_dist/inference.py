"""Structures inferred from the energy, or from the energy and the inference network together.

With ybar(z) = relax(z), mean field takes the distribution P(y | x) of the network, with logits z_0,
and the energy for the factors of one, p(y | x) ~ P(y | x) exp(-w E(x, y)), w the `energy_weight`,
and approaches it by an independent one in `inference.steps` steps, all positions at once:

    z_{k+1} = z_0 - w dE/dybar (x, ybar(z_k))

The outer loss `nce` draws its noise from P, and its minimum is where P exp(-E) is the distribution
of the data (Ma and Collins 2018): then w = 1, and what the network leaves undone the energy does.
Such a product of a network and an energy is that of Deng et al. (2020), who draw from it. Steps on
logits are exact mean field where E is linear in every position, as chains are; where it is not, as
in the softplus of label_interaction, E is replaced by its tangent. Both networks are trained as
with `network`: inner and outer loss see the network's own structures.

With m the margin scale, gradient descent does without the network, and takes from z_0, zeros or
the local potentials, `inference.steps` steps on the logits z of each example:

    g_k = d/dz [ E(x, ybar(z_k)) - m cost(ybar(z_k), y) ],   m = 0 unless it is cost-augmented
    v_k = momentum v_{k-1} + g_k,                            z_{k+1} = z_k - learning_rate v_k

(Belanger and McCallum 2016; unrolled and differentiated: Belanger, Yang and McCallum 2017.)
Departures: 1. they project ybar, or take mirror steps; steps on logits keep it relaxed as well, and
the result is logits like the network's. 2. The number of steps is fixed, so that ranks stay alike.

`infer` reads local potentials and a head, which are small, so it is the same whatever shards the
energy; `predict` collects them.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ispen_dist.config import InferenceConfig
from ispen_dist.data.batch import Batch
from ispen_dist.engine import Engines
from ispen_dist.linalg.trees import Tree
from ispen_dist.models.output_spaces import Inputs
from ispen_dist.objectives import OUTER_OBJECTIVES, View
from ispen_dist.players import LOCAL, Players, is_local
from ispen_dist.views import averaged

CERTAIN = 100.0
"""Logit of a tag that was decided exactly; those of all others are 0."""


def predict(players: Players, engines: Engines, inputs: Inputs) -> Tensor:
    """Return the logits of the predicted structures, without dropout, as `inference` says.

    Every rank calls it: parameters may be sharded.
    """
    return averaged(partial(_predict, players, engines), players.config.inference)(inputs)


def _predict(players: Players, engines: Engines, inputs: Inputs) -> Tensor:
    if players.config.inference.by_network:
        logits = engines.inference_net.staged(inputs, keep_states=False).value()
        logits = logits.chunk(players.config.inference.num_heads, dim=-1)[0]
        if players.config.inference.name == "network":
            return logits
        return mean_field(players, inputs, logits, *potentials_and_head(engines, inputs))
    return infer(players, inputs, *potentials_and_head(engines, inputs))


def mean_field(
    players: Players, inputs: Inputs, logits: Tensor, potentials: Tensor, head: Tree | None = None
) -> Tensor:
    """Return the logits of the network, corrected by the energy.

    Args:
        players: definition of the energy, kind of structure and settings.
        inputs: of the examples.
        logits: z_0, of the structures that the network predicts.
        potentials: see `Players.view`.
        head: see `Players.view`.
    """
    config, energy = players.config.inference, players.energy_at(potentials, head)
    z = logits
    for _ in range(config.steps):
        with torch.enable_grad():
            ybar = players.space.relax(z, inputs).detach().requires_grad_()
            (slope,) = torch.autograd.grad(energy(ybar.unsqueeze(0)).sum(), ybar)
        z = logits - config.energy_weight * slope
    return z


def potentials_and_head(engines: Engines, inputs: Inputs) -> tuple[Tensor, Tree]:
    """Return what `EnergyNetwork.score` reads at inputs, as constants."""
    features = engines.energy.staged(inputs, part=LOCAL.removesuffix("."), keep_states=False)
    names = [n for n, _ in engines.energy.network.named_parameters() if not is_local(n)]
    return features.value(), engines.energy.collect(names)


def outer_view(
    players: Players,
    batch: Batch,
    logits: Tensor,
    potentials: Tensor,
    head: Tree | None = None,
    generator: torch.Generator | None = None,
) -> View:
    """Return `Players.view` as the outer loss reads it: with the inferred structure, if one is.

    The arguments are those of `Players.view`; logits are not read where the network does not
    predict.
    """
    config = players.config
    view = players.view(batch, logits, potentials, head, generator)
    reads = OUTER_OBJECTIVES[config.outer.objective].reads_structure
    if config.inference.by_network or not (reads or config.outer.task_weight):
        return view
    gold = view.y if config.inference.cost_augmented else None
    unrolled = config.inference.unrolled
    inferred = infer(players, batch.inputs, potentials, head, gold, unrolled=unrolled)
    return dataclasses.replace(view, logits=inferred, augmented=None)


def infer(
    players: Players,
    inputs: Inputs,
    potentials: Tensor,
    head: Tree | None = None,
    gold: Tensor | None = None,
    *,
    unrolled: bool = False,
) -> Tensor:
    """Return the logits of the structures of low energy, shaped like those of the network.

    Args:
        players: definition of the energy, kind of structure and settings.
        inputs: of the examples.
        potentials: see `Players.view`.
        head: see `Players.view`.
        gold: encoded gold structures, from which the cost is added; None adds none.
        unrolled: keep the graph of the steps, into potentials and head.
    """
    config, space = players.config, players.space
    if config.inference.name == "viterbi":
        return CERTAIN * players.minimum(inputs, potentials, head)
    energy = players.energy_at(potentials, head)

    def loss(z: Tensor) -> Tensor:
        ybar = space.relax(z, inputs)
        value = energy(ybar.unsqueeze(0))[0]
        if gold is not None:
            value = value - config.outer.margin_scale * space.cost(ybar, gold)
        return value.sum()

    local = players.energy.local(potentials)
    start = local if config.inference.start == "potentials" else torch.zeros_like(local)
    return descend(loss, start, config.inference, unrolled=unrolled)


@torch.enable_grad()
def descend(
    loss: Callable[[Tensor], Tensor], z: Tensor, config: InferenceConfig, *, unrolled: bool = False
) -> Tensor:
    """Return z after gradient descent with momentum on a loss.

    Args:
        loss: a scalar function of z, a sum over examples.
        z: where it starts.
        config: number and size of the steps.
        unrolled: keep the graph of the steps; otherwise the result is a constant.
    """
    z = z.clone()  # The loss may read the same tensor, as potentials; its share is no step of z.
    velocity = torch.zeros_like(z)
    for _ in range(config.steps):
        z = z if unrolled and z.requires_grad else z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(z), z, create_graph=unrolled)
        velocity = config.momentum * velocity + gradient
        z = z - config.learning_rate * velocity
    return z if unrolled else z.detach()
