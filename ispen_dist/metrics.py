"""Task metrics as sums over examples, so that ranks with unequal parts add up exactly.

Each metric follows a library: accuracy is a count, the F1 of entities is that of seqeval, the
example-F1 is scikit-learn's `f1_score(average="samples")` with an empty prediction of an empty gold
set counting 1.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import f1_score
from torch import Tensor

from ispen_dist.config.inference import TEMPERATURES, THRESHOLDS
from ispen_dist.data.batch import Batch
from ispen_dist.data.datasets import Codec, TaggingCodec
from ispen_dist.data.segmentation import SegmentationCodec
from ispen_dist.decisions import best_expected_f1, tempered
from ispen_dist.models.output_spaces import BinaryImages


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

    Threshold and temperature of the last two are tuned on dev.

    Args:
        decoder: see `InferenceConfig.decoder`.
    """

    def __init__(self, decoder: str = "threshold") -> None:
        by_threshold = decoder == "threshold"
        self.main = "example_f1_at_0.5" if by_threshold else "example_f1_decoded"

    def zero(self) -> Tensor:
        """Return the sums of no examples: F1 at every value of `CHOICES`, then the count."""
        return torch.zeros(len(THRESHOLDS) + len(TEMPERATURES) + 1, dtype=torch.float64)

    def sums(self, ybar: Tensor, batch: Batch) -> Tensor:
        """Return the sums of example-F1 at every value of `CHOICES`, then the examples."""
        real = (batch.weight > 0).cpu()
        gold = batch.target.cpu()[real] > 0.5
        probability = ybar.double().cpu()[real]
        by_threshold = [probability > t for t in THRESHOLDS]
        decoded = [best_expected_f1(tempered(probability, t)) for t in TEMPERATURES]
        totals = [_example_f1_sum(gold.numpy(), p.numpy()) for p in (*by_threshold, *decoded)]
        return torch.tensor([*totals, len(gold)], dtype=torch.float64)

    def finish(self, sums: Tensor, choices: Mapping[str, float]) -> dict[str, float]:
        """Return F1 at 0.5 and at what was chosen; at the best values where nothing was (dev)."""
        curve = (sums[:-1] / sums[-1]).tolist()
        by_threshold = dict(zip(THRESHOLDS, curve, strict=False))
        by_temperature = dict(zip(TEMPERATURES, curve[len(THRESHOLDS) :], strict=True))
        threshold = choices.get("threshold") or max(by_threshold, key=by_threshold.__getitem__)
        temperature = choices.get("temperature") or max(
            by_temperature, key=by_temperature.__getitem__
        )
        return {
            "example_f1_at_0.5": by_threshold[0.5],
            "example_f1_tuned": by_threshold[threshold],
            "example_f1_decoded": by_temperature[temperature],
            "threshold": threshold,
            "temperature": temperature,
        }


def _example_f1_sum(gold: np.ndarray, predicted: np.ndarray) -> float:
    if not len(gold):
        return 0.0
    mean = f1_score(gold, predicted, average="samples", zero_division=1.0)
    return float(mean) * len(gold)


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
