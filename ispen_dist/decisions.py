"""Which labels an example is given, from the probability of each.

Either those above a threshold, or the set that maximises the expected example-F1 if labels are
independent with these probabilities (Lewis 1995; Ye, Chai, Lee and Chieu 2012). Both are the k
most probable labels for some k. With S_-i the number of true labels besides i, the expected F1 of
the first k is

    F(k) = 2 sum_{i <= k} p_i E[ 1 / (k + 1 + S_-i) ],      F(0) = w P(no label is true),

and 1 / (k + 1 + s) is the integral of t^(k + s) over t from 0 to 1, so that the expectation is
that of t^k prod_{j != i} (1 - p_j + p_j t), a polynomial in t. Gauss-Legendre integration with n
nodes is exact while a set and the truth have 2 n labels together, and beyond close to it.
Departure: Ye et al. sum over counts by dynamic programming, L steps one after the other for each
label; this is one tensor.

Probabilities that were trained are too sure or not sure enough, so their logits are divided by a
temperature before. Nor are labels independent: many improbable ones leave an example without any
by their product, where the data may give every example one. So w weighs the empty set, 1 for
independent labels and 0 where none is without. Both are tuned on dev, as the threshold is.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from ispen_dist.config.inference import UNTUNED

_NODES, _WEIGHTS = (torch.from_numpy(x) / 2.0 for x in np.polynomial.legendre.leggauss(32))
_NODES = _NODES + 0.5
_TOGETHER = 2**14
"""Probabilities that are looked at together: 4 MiB for the nodes of each, which stay in a cache."""


def decide(probability: Tensor, decoder: str, choices: Mapping[str, float]) -> Tensor:
    """Return the labels of each example.

    Args:
        probability: (B, L).
        decoder: see `InferenceConfig.decoder`.
        choices: what was tuned on dev; see `UNTUNED` for what was not.

    Returns:
        bool (B, L).
    """
    chosen = UNTUNED | dict(choices)
    if decoder == "threshold":
        return probability > chosen["threshold"]
    chance = tempered(probability, chosen["temperature"])
    (sizes,) = best_sizes(chance, [chosen["empty_weight"]])
    order = probability.argsort(dim=-1, descending=True, stable=True)
    first = torch.arange(order.shape[-1], device=order.device) < sizes.unsqueeze(-1)
    return torch.zeros_like(first).scatter(-1, order, first)


def tempered(probability: Tensor, temperature: float) -> Tensor:
    """Return the probabilities whose logits are divided by a temperature, in float64."""
    return torch.sigmoid(torch.logit(probability.double(), eps=1e-12) / temperature)


def best_sizes(probability: Tensor, empty_weights: Sequence[float] = (1.0,)) -> Tensor:
    """Return how many of the most probable labels have the largest expected F1.

    Args:
        probability: (B, L), of independent labels.
        empty_weights: by what the probability of no label is multiplied; 0 never predicts none.

    Returns:
        int64 (W, B), for each weight; of equally good sizes the smaller.
    """
    chance = probability.double().sort(dim=-1, descending=True).values
    weights = torch.tensor(empty_weights, dtype=chance.dtype, device=chance.device)
    chunks = chance.split(max(1, _TOGETHER // chance.shape[-1]))
    return torch.cat([_best_sizes(chunk, weights.unsqueeze(-1)) for chunk in chunks], dim=-1)


def _best_sizes(chance: Tensor, empty_weights: Tensor) -> Tensor:
    """Return the best number of labels, (W, B), of probabilities that fall along the last axis.

    With S = S_-i + 1 where i is true, E[1 / (k + 1 + S_-i)] lies between those of 1 / (k + 1 + S)
    and 1 / (k + S), which cost one product of matrices: only sizes whose upper bound reaches the
    best lower one, but for rounding, are looked at. The bounds hold at every node, so that the
    integration need not be exact for them.
    """
    t, weights = _NODES.to(chance.device), _WEIGHTS.to(chance.device)
    product = (1.0 - chance.unsqueeze(-2) * (1.0 - t).unsqueeze(-1)).prod(-1)
    sizes = torch.arange(chance.shape[-1] + 1, device=chance.device)
    powers = 2.0 * weights * t ** sizes.unsqueeze(-1)
    bound = product @ powers.T
    expected = chance.cumsum(-1)
    lower, upper = expected * bound[..., 1:], expected * bound[..., :-1]
    # Asked the other way round: where something is not a number every size is looked at.
    possible = (~(upper < (1.0 - 1e-9) * lower.amax(-1, keepdim=True))).any(0).int()
    first, end = int(possible.argmax()), len(possible) - int(possible.flip(0).argmax())
    p = chance[..., :end].unsqueeze(-1)
    others = (p / (1.0 - p * (1.0 - t))).cumsum(-2)[..., first:, :]
    f1 = (others * powers[first + 1 : end + 1]) @ product.unsqueeze(-1)
    best, last = f1.squeeze(-1).max(-1)
    nothing = empty_weights * (1.0 - chance).prod(-1)
    some = (best > nothing) | (empty_weights == 0.0)
    return torch.where(some, last + first + 1, 0)
