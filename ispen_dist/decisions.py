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
_TOGETHER = 2**16
"""Probabilities that are looked at together: 16 MiB for the nodes of each."""


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

    F(k) is at most 2 sum_i p_i / (k + 1): sizes are looked at until no larger one can be better.
    """
    num_labels, looked_at = chance.shape[-1], 32
    total = chance.sum(-1)
    t, weights = _NODES.to(chance.device), _WEIGHTS.to(chance.device)
    product = (1.0 - chance.unsqueeze(-2) * (1.0 - t).unsqueeze(-1)).prod(-1)
    nothing = empty_weights * (1.0 - chance).prod(-1)
    while True:
        p = chance[..., :looked_at].unsqueeze(-1)
        sizes = torch.arange(1, p.shape[-2] + 1, device=chance.device)
        others = (p / (1.0 - p * (1.0 - t))).cumsum(-2)
        powers = product.unsqueeze(-2) * t ** sizes.unsqueeze(-1)
        best, last = (2.0 * (others * powers) @ weights).max(-1)
        if looked_at >= num_labels or bool((2.0 * total <= best * (looked_at + 2)).all()):
            some = (best > nothing) | (empty_weights == 0.0)
            return torch.where(some, last + 1, 0)
        looked_at *= 2
