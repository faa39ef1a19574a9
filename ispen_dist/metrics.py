"""Task metrics as sums over examples, so that ranks with unequal parts add up exactly.

Each metric follows a library: accuracy is a count, the F1 of entities is that of seqeval, the
example-F1 is scikit-learn's `f1_score(average="samples")` with an empty prediction of an empty gold
set counting 1.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Protocol

import numpy as np
import torch
from seqeval.metrics.sequence_labeling import get_entities
from torch import Tensor
from torch.nn import functional as F

from ispen_dist.config.inference import EMPTY_WEIGHTS, TEMPERATURES, THRESHOLDS
from ispen_dist.data.batch import Batch
from ispen_dist.data.datasets import Codec, TaggingCodec
from ispen_dist.data.segmentation import SegmentationCodec
from ispen_dist.decisions import best_sizes, tempered
from ispen_dist.models.output_spaces import BinaryImages

_DECODED = tuple(product(TEMPERATURES, EMPTY_WEIGHTS))
"""Temperatures and weights of the empty set that are tried together."""


class Metrics(Protocol):
    """Adds up over batches; `main` names the metric that selects the model."""

    main: str

    def sums(self, ybar: Tensor, batch: Batch) -> Tensor:
        """Return the sums of one batch, float64 of a fixed shape."""
        ...

    def zero(self) -> Tensor:
        """Return the sums of no examples."""
        ...

    def finish(self, sums: Tensor, choices: Mapping[str, float]) -> dict[str, float]:
        """Turn global sums into metric values, with what was chosen before, see `decisions`."""
        ...


class TaggingMetrics:
    """Token accuracy."""

    main = "accuracy"

    def zero(self) -> Tensor:
        """Return (correct tokens, tokens) of no examples."""
        return torch.zeros(2, dtype=torch.float64)

    def sums(self, ybar: Tensor, batch: Batch) -> Tensor:
        """Return (correct tokens, tokens)."""
        mask = batch.inputs["mask"] & (batch.weight > 0).unsqueeze(-1)
        correct = (ybar.argmax(-1) == batch.target) & mask
        return torch.stack([correct.sum(), mask.sum()]).double().cpu()

    def finish(self, sums: Tensor, choices: Mapping[str, float]) -> dict[str, float]:
        """Return the accuracy; there is nothing to choose."""
        correct, tokens = sums.tolist()
        return {"accuracy": correct / tokens}


class SpanMetrics:
    """F1, precision and recall of whole entities, and the accuracy of tags.

    An entity counts where type, first and last token are right. Entities are read from tags as
    seqeval's default mode does, which is that of the conlleval script: an I- after another type, or
    after O, begins an entity.

    Args:
        tags: names of the tags, by number.
    """

    main = "span_f1"

    def __init__(self, tags: Sequence[str]) -> None:
        self._names = np.array(tags)
        self._tokens = TaggingMetrics()

    def zero(self) -> Tensor:
        """Return the sums of no examples: right, predicted and gold entities; tokens."""
        return torch.cat([torch.zeros(3, dtype=torch.float64), self._tokens.zero()])

    def sums(self, ybar: Tensor, batch: Batch) -> Tensor:
        """Return right, predicted and gold entities, then correct tokens and tokens."""
        mask = (batch.inputs["mask"] & (batch.weight > 0).unsqueeze(-1)).cpu().numpy()
        predicted, gold = (
            self._entities(numbers.cpu().numpy(), mask)
            for numbers in (ybar.argmax(-1), batch.target)
        )
        counts = [len(predicted & gold), len(predicted), len(gold)]
        tokens = self._tokens.sums(ybar, batch)
        return torch.cat([torch.tensor(counts, dtype=torch.float64), tokens])

    def _entities(self, numbers: np.ndarray, mask: np.ndarray) -> set[tuple[int, ...]]:
        rows = enumerate(zip(numbers, mask, strict=True))
        return {
            (row, *entity)
            for row, (tags, real) in rows
            for entity in get_entities(self._names[tags[real]].tolist())
        }

    def finish(self, sums: Tensor, choices: Mapping[str, float]) -> dict[str, float]:
        """Return the figures, 0 where nothing was there to count; there is nothing to choose."""
        right, predicted, gold = sums[:3].tolist()
        return {
            "span_f1": 2.0 * right / max(predicted + gold, 1.0),
            "precision": right / max(predicted, 1.0),
            "recall": right / max(gold, 1.0),
            **self._tokens.finish(sums[3:], choices),
        }


class MultiLabelMetrics:
    """Example-F1 at threshold 0.5, at a threshold and of the sets of largest expected F1.

    Threshold, and temperature and weight of the empty set, of the last two are tuned on dev. All
    these sets are the most probable labels of an example: only their number differs.

    Args:
        decoder: see `InferenceConfig.decoder`.
    """

    def __init__(self, decoder: str = "threshold") -> None:
        by_threshold = decoder == "threshold"
        self.main = "example_f1_at_0.5" if by_threshold else "example_f1_decoded"

    def zero(self) -> Tensor:
        """Return the sums of no examples: F1 of every way to decide, then the count."""
        return torch.zeros(len(THRESHOLDS) + len(_DECODED) + 1, dtype=torch.float64)

    def sums(self, ybar: Tensor, batch: Batch) -> Tensor:
        """Return the sums of example-F1 of every way to decide, then the examples."""
        real = (batch.weight > 0).cpu()
        gold = (batch.target.cpu()[real] > 0.5).double()
        probability = ybar.double().cpu()[real]
        order = probability.argsort(dim=-1, descending=True, stable=True)
        by_threshold = [(probability > t).sum(-1) for t in THRESHOLDS]
        decoded = [best_sizes(tempered(probability, t), EMPTY_WEIGHTS) for t in TEMPERATURES]
        sizes = torch.cat([torch.stack(by_threshold), *decoded])
        totals = _f1_of_first(gold.gather(-1, order)).gather(-1, sizes.T).sum(0)
        return torch.cat([totals, torch.tensor([len(gold)])])

    def finish(self, sums: Tensor, choices: Mapping[str, float]) -> dict[str, float]:
        """Return F1 at 0.5 and at what was chosen; at the best values where nothing was (dev)."""
        curve = (sums[:-1] / sums[-1]).tolist()
        by_threshold = dict(zip(THRESHOLDS, curve, strict=False))
        decoded = dict(zip(_DECODED, curve[len(THRESHOLDS) :], strict=True))
        threshold = choices.get("threshold") or max(by_threshold, key=by_threshold.__getitem__)
        possible = [
            pair for pair in _DECODED
            if choices.get("temperature", pair[0]) == pair[0]
            and choices.get("empty_weight", pair[1]) == pair[1]
        ]  # fmt: skip
        temperature, empty_weight = max(possible, key=decoded.__getitem__)
        return {
            "example_f1_at_0.5": by_threshold[0.5],
            "example_f1_tuned": by_threshold[threshold],
            "example_f1_decoded": decoded[temperature, empty_weight],
            "threshold": threshold,
            "temperature": temperature,
            "empty_weight": empty_weight,
        }


def _f1_of_first(gold: Tensor) -> Tensor:
    """Return the F1 of the first 0 to L labels of each example: (B, L + 1) of gold (B, L)."""
    right = F.pad(gold.cumsum(-1), (1, 0))
    together = torch.arange(right.shape[-1]) + gold.sum(-1, keepdim=True)
    return torch.where(together > 0, 2.0 * right / together.clamp(min=1.0), 1.0)


class SegmentationMetrics:
    """Intersection over union of the foreground, of masks at threshold 0.5.

    `mean_iou` is the mean over images, 1 for an empty prediction of an empty mask, and `global_iou`
    that of all pixels together: the two figures of Gygli et al. (2017), Table 2. The background,
    which some libraries average in, is not counted.
    """

    main = "mean_iou"

    def zero(self) -> Tensor:
        """Return the sums of no images: IoU, intersections, unions, images."""
        return torch.zeros(4, dtype=torch.float64)

    def sums(self, ybar: Tensor, batch: Batch) -> Tensor:
        """Return the sums of IoU, of intersections and of unions, and the number of images."""
        predicted = (ybar > 0.5).double()
        gold = batch.target.double()
        iou = 1.0 - BinaryImages().cost(predicted, gold)
        overlap = (predicted * gold).sum((-1, -2))
        union = (predicted + gold).sum((-1, -2)) - overlap
        weight = batch.weight.double()
        return (torch.stack([iou, overlap, union, torch.ones_like(iou)]) @ weight).cpu()

    def finish(self, sums: Tensor, choices: Mapping[str, float]) -> dict[str, float]:
        """Return both figures; there is nothing to choose."""
        iou, overlap, union, images = sums.tolist()
        return {"mean_iou": iou / images, "global_iou": overlap / union if union else 1.0}


def build_metrics(codec: Codec, decoder: str = "threshold") -> Metrics:
    """Return the metrics of a kind of structure; `decoder` is that of label sets."""
    if isinstance(codec, TaggingCodec):
        return SpanMetrics(codec.tags) if codec.spans else TaggingMetrics()
    if isinstance(codec, SegmentationCodec):
        return SegmentationMetrics()
    return MultiLabelMetrics(decoder)
