"""One batch of examples as tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Batch:
    """This rank's part of a global batch.

    Attributes:
        inputs: what the networks read. Multi-label: `features` (B, D) float. Tagging: `features`
            (B, T, F) int64 hashed ids with 0 for padding, or (B, T, D) float for tokens that
            are vectors, `mask` (B, T) bool; for a pretrained
            encoder also `subwords` and `subword_mask` (B, P), and `starts` (B, T), the place of
            each token's first sub-word.
            Segmentation: `image` (B, C, H, W) float.
        target: gold structure. Multi-label: (B, L) float of 0 and 1. Tagging: (B, T) int64, 0 at
            padding. Segmentation: (B, H, W) float of 0 and 1. Zeros where the data is unlabelled.
        weight: (B,) float, 1 for an example and 0 for a filler row, so that a rank with nothing to
            do still runs the same program and contributes a count of zero.
        index: (B,) int64, row number in the data set; 0 in filler rows.
    """

    inputs: dict[str, Tensor]
    target: Tensor
    weight: Tensor
    index: Tensor

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        inputs = {key: function(value) for key, value in self.inputs.items()}
        return Batch(inputs, function(self.target), function(self.weight), function(self.index))

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, for what takes tensors alone; `of` is the way back."""
        inputs = {f"inputs.{key}": value for key, value in self.inputs.items()}
        return {**inputs, "target": self.target, "weight": self.weight, "index": self.index}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> "Batch":
        """Return the batch with these `tensors`."""
        inputs = {
            key.removeprefix("inputs."): value
            for key, value in tensors.items()
            if key.startswith("inputs.")
        }
        return Batch(inputs, tensors["target"], tensors["weight"], tensors["index"])

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """Move to a device; floating-point tensors take the given type."""
        return self._map(
            lambda x: (
                x.to(device, dtype, non_blocking=True)
                if x.is_floating_point()
                else x.to(device, non_blocking=True)
            )
        )

    def padded(self, num_rows: int, num_tokens: int = 0) -> "Batch":
        """Return the batch with filler rows and, where it has tokens, with padding behind them.

        Neither enters a sum; a batch that is larger already stays as large as it is.
        """
        rows = max(num_rows - len(self.weight), 0)
        tokens = max(num_tokens - self.inputs["mask"].shape[1], 0) if "mask" in self.inputs else 0
        named = {"inputs.features", "inputs.mask", "inputs.starts", "target"}
        per_token = named if "mask" in self.inputs else ()

        def pad(name: str, x: Tensor) -> Tensor:
            # torch.nn.functional.pad counts from the last dimension.
            sizes = [0] * (2 * x.dim())
            sizes[-1] = rows
            if name in per_token:
                sizes[-3] = tokens
            return F.pad(x, sizes)

        return Batch.of({name: pad(name, x) for name, x in self.tensors().items()})

    def first(self, num_rows: int) -> "Batch":
        """Return the first rows, all where there are fewer."""
        return self._map(lambda x: x[:num_rows])


def rows_to_read(rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Return the rows to read and their weights, one filler row of weight 0 where none is given."""
    chosen = np.asarray(rows, dtype=np.int64)
    if len(chosen):
        return chosen, torch.ones(len(chosen))
    return np.zeros(1, dtype=np.int64), torch.zeros(1)
