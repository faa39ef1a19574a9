"""Masks averaged over views of an image, mirrored and shifted.

Gygli, Norouzi and Angelova (2017) average 36 crops of a horse.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ispen_dist.config import InferenceConfig
from ispen_dist.models.output_spaces import Inputs

Logits = Callable[[Inputs], Tensor]


def averaged(logits: Logits, config: InferenceConfig) -> Logits:
    """Return logits whose sigmoid is the mean probability over the views that show a pixel.

    A view is the image, or its mirror image, moved by one of `view_shifts` down and by one to the
    right, in pixels of the image, whole ones of the mask. What comes in from beyond an edge is
    mirrored, as in training, and not counted.

    Args:
        logits: `inputs -> logits` (B, H, W) of the masks of `inputs["image"]` (B, C, s H, s W),
            s the output stride.
        config: which views; without any, `logits` is returned.
    """
    if not config.averages_views:
        return logits

    def average(inputs: Inputs) -> Tensor:
        image = inputs["image"]
        # Log of the sums of p and of 1 - p.
        inside = outside = image.new_tensor(-torch.inf)
        for mirrored in (False, True) if config.view_mirrored else (False,):
            for down in config.view_shifts:
                for right in config.view_shifts:
                    view = _moved(image.flip(-1) if mirrored else image, down, right)
                    seen = logits({**inputs, "image": view})
                    stride = image.shape[-1] // seen.shape[-1]
                    seen = _moved_back(seen, down // stride, right // stride)
                    seen = seen.flip(-1) if mirrored else seen
                    inside = torch.logaddexp(inside, F.logsigmoid(seen).nan_to_num(-torch.inf))
                    outside = torch.logaddexp(outside, F.logsigmoid(-seen).nan_to_num(-torch.inf))
        return inside - outside

    return average


def _moved(image: Tensor, down: int, right: int) -> Tensor:
    height, width = image.shape[-2:]
    rows, columns = abs(down), abs(right)
    padded = F.pad(image, (columns, columns, rows, rows), mode="reflect")
    top, left = rows - down, columns - right
    return padded[..., top : top + height, left : left + width]


def _moved_back(logits: Tensor, down: int, right: int) -> Tensor:
    """Return logits where the pixels were, NaN for those that the view did not show."""
    height, width = logits.shape[-2:]
    padding = (max(-right, 0), max(right, 0), max(-down, 0), max(down, 0))
    padded = F.pad(logits, padding, value=torch.nan)
    top, left = max(down, 0), max(right, 0)
    return padded[..., top : top + height, left : left + width]
