"""The kinds of structured outputs: their relaxation, likelihood, cost and samples.

Shapes: B batch, T tokens, K tags, L labels, S samples. A relaxed output is `ybar`; a gold one
that has been encoded the same way (0/1 labels, one-hot tags) is `y`. Every function also accepts
leading sample dimensions, (S, B, ...). Padded positions hold zeros in `y` and `ybar` and enter no
sum.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Inputs = Mapping[str, Tensor]


class OutputSpace(Protocol):
    """What objectives, samplers and metrics need to know of a kind of structure."""

    def relax(self, logits: Tensor, inputs: Inputs) -> Tensor:
        """Map logits to a relaxed output `ybar`."""
        ...

    def encode(self, target: Tensor, inputs: Inputs, dtype: torch.dtype) -> Tensor:
        """Encode a gold target as a `y` with the shape of `ybar`."""
        ...

    def decode(self, ybar: Tensor) -> Tensor:
        """Round a relaxed output to a target."""
        ...

    def nll(self, logits: Tensor, y: Tensor) -> Tensor:
        """Negative log likelihood of `y` under the independent distribution, per example.

        A sum over the positions of the example: `- log P(y | x)`.
        """
        ...

    def cost(self, ybar: Tensor, y: Tensor) -> Tensor:
        """Task cost in [0, 1] per example, differentiable in `ybar`."""
        ...

    def sample(
        self, logits: Tensor, inputs: Inputs, num_samples: int, generator: torch.Generator
    ) -> Tensor:
        """Draw encoded structures from the independent distribution: (S, B, ...)."""
        ...


def _nan_where_nan(x: Tensor) -> Tensor:
    """Return zeros, and NaN where x has it: nothing is drawn from NaN, and a step must see it."""
    return x - x


class LabelSets:
    """Multi-label outputs: y in {0,1}^L, ybar in [0,1]^L, cost 1 - soft F1 of the example."""

    def relax(self, logits: Tensor, inputs: Inputs) -> Tensor:
        """Map logits (B, L) to probabilities (B, L)."""
        return torch.sigmoid(logits)

    def encode(self, target: Tensor, inputs: Inputs, dtype: torch.dtype) -> Tensor:
        """Return the 0/1 target (B, L) itself."""
        return target.to(dtype)

    def decode(self, ybar: Tensor) -> Tensor:
        """Round probabilities at one half: (B, L) of 0 and 1."""
        return (ybar > 0.5).to(ybar.dtype)

    def nll(self, logits: Tensor, y: Tensor) -> Tensor:
        """Binary cross entropy summed over labels: (B,)."""
        logits = logits.expand_as(y)
        return F.binary_cross_entropy_with_logits(logits, y, reduction="none").sum(-1)

    def cost(self, ybar: Tensor, y: Tensor) -> Tensor:
        """Return `1 - 2 <ybar, y> / (sum ybar + sum y)`; 0 where both are empty: (B,)."""
        overlap, size = (ybar * y).sum(-1), ybar.sum(-1) + y.sum(-1)
        empty = size == 0
        return torch.where(empty, 0.0, 1.0 - 2.0 * overlap / torch.where(empty, 1.0, size))

    def sample(
        self, logits: Tensor, inputs: Inputs, num_samples: int, generator: torch.Generator
    ) -> Tensor:
        """Draw independent labels: (S, B, L), NaN where a logit is."""
        probability = torch.sigmoid(logits.detach())
        possible = probability.nan_to_num(0.0).expand(num_samples, *logits.shape)
        return torch.bernoulli(possible, generator=generator) + _nan_where_nan(probability)


@dataclass(frozen=True)
class TagSequences:
    """Tag sequences: y one-hot (B, T, K), ybar on the simplex, cost the expected token error.

    Attributes:
        num_tags: K.
        outside: number of the tag of tokens that are of no entity, where the tags spell entities.
        entity_weight: of a token of an entity in the cost, to that of one outside, at least 1.
    """

    num_tags: int
    outside: int | None = None
    entity_weight: float = 1.0

    def relax(self, logits: Tensor, inputs: Inputs) -> Tensor:
        """Map logits (B, T, K) to tag distributions, zeros at padding."""
        return torch.softmax(logits, dim=-1) * inputs["mask"].unsqueeze(-1)

    def encode(self, target: Tensor, inputs: Inputs, dtype: torch.dtype) -> Tensor:
        """Return one-hot tags (B, T, K), zeros at padding."""
        one_hot = F.one_hot(target, self.num_tags)
        return one_hot.to(dtype) * inputs["mask"].unsqueeze(-1)

    def decode(self, ybar: Tensor) -> Tensor:
        """Return the most probable tag of each token: (B, T) int64."""
        return ybar.argmax(-1)

    def nll(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross entropy summed over the tokens of the example: (B,)."""
        return -(torch.log_softmax(logits, dim=-1) * y).sum((-1, -2))

    def cost(self, ybar: Tensor, y: Tensor) -> Tensor:
        """Return the expected share of wrong tokens, by weight: (B,)."""
        right, tokens = (ybar * y).sum(-1), y.sum(-1)
        if self.outside is not None:
            # y is one-hot, so a token's weight is 1 outside, and entity_weight elsewhere.
            weight = self.entity_weight - (self.entity_weight - 1.0) * y[..., self.outside]
            right, tokens = weight * right, weight * tokens
        return 1.0 - right.sum(-1) / tokens.sum(-1).clamp(min=1.0)

    def sample(
        self, logits: Tensor, inputs: Inputs, num_samples: int, generator: torch.Generator
    ) -> Tensor:
        """Draw independent tags: one-hot (S, B, T, K), zeros at padding, NaN where logits are."""
        probability = torch.softmax(logits.detach(), dim=-1)
        possible = probability.nan_to_num(1.0).flatten(0, -2)
        draws = torch.multinomial(possible, num_samples, replacement=True, generator=generator)
        tags = draws.T.reshape(num_samples, *logits.shape[:-1])
        one_hot = F.one_hot(tags, self.num_tags).to(logits.dtype)
        return (one_hot + _nan_where_nan(probability)) * inputs["mask"].unsqueeze(-1)


class BinaryImages(LabelSets):
    """Foreground masks: y in {0,1}^(H x W), ybar in [0,1], cost 1 - soft IoU of the image.

    Pixels are labels of their own, so everything but the two sums over them is that of `LabelSets`.
    """

    def nll(self, logits: Tensor, y: Tensor) -> Tensor:
        """Binary cross entropy summed over pixels: (B,)."""
        return super().nll(logits, y).sum(-1)

    def cost(self, ybar: Tensor, y: Tensor) -> Tensor:
        """Return `1 - sum min(ybar, y) / sum max(ybar, y)`, 0 where both are empty: (B,).

        The relaxed IoU of Gygli et al. (2017), eq. 3. For y of 0 and 1 the minimum is the product
        `ybar y` and the maximum `ybar + y - ybar y`, which have derivatives everywhere.
        """
        product = ybar * y
        overlap, union = product.sum((-1, -2)), (ybar + y - product).sum((-1, -2))
        empty = union == 0
        return torch.where(empty, 0.0, 1.0 - overlap / torch.where(empty, 1.0, union))
