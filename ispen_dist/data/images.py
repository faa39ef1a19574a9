"""Images with foreground masks as NumPy archives.

Keys: `images` (N, H, W, C), finite numbers of any type, and `masks` (N, H, W) of 0 and 1. A file
without masks is unlabelled. Other keys are not read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ispen_dist.data.archives import numbers_of, open_archive
from ispen_dist.data.errors import DataError
from ispen_dist.data.output_file import replacing
from ispen_dist.data.tables import not_binary, not_finite


@dataclass(frozen=True, eq=False)
class ImageTable:
    """Images of one size with their masks.

    Attributes:
        images: (N, H, W, C), finite.
        masks: (N, H, W) uint8 of 0 and 1, or None where the data is unlabelled.
        path: the file it was read from, for messages.
    """

    images: np.ndarray
    masks: np.ndarray | None
    path: str = "(in memory)"

    def __len__(self) -> int:
        """N."""
        return len(self.images)

    def check_size(self, size: Sequence[int]) -> None:
        """Raise unless the images are of this size, (H, W, C).

        Raises:
            DataError: with both sizes.
        """
        if self.images.shape[1:] != tuple(size):
            raise DataError(
                self.path, None, f"images: expected height, width and channels {tuple(size)}, as "
                f"in training, got {self.images.shape[1:]}; resize the images",
            )  # fmt: skip

    def require_masks(self) -> np.ndarray:
        """Return the masks.

        Raises:
            DataError: where there are none.
        """
        if self.masks is None:
            raise DataError(
                self.path, None, "expected an array 'masks', got images only; name a labelled file"
            )
        return self.masks

    def concatenate(self, others: Sequence["ImageTable"]) -> "ImageTable":
        """Return this labelled table with the rows of others below it.

        Raises:
            DataError: where sizes differ or masks are missing.
        """
        for other in others:
            other.check_size(self.images.shape[1:])
        tables = [self, *others]
        images = np.concatenate([table.images for table in tables])
        masks = np.concatenate([table.require_masks() for table in tables])
        return replace(self, images=images, masks=masks)


def read_images(path: str | Path) -> ImageTable:
    """Read images and, where the file has them, masks.

    Raises:
        DataError: for arrays of objects, other shapes, and NaN, infinity or other masks than 0
            and 1, with the zero-based image.
    """
    archive = open_archive(path, "images=..., masks=...")
    images = numbers_of(path, archive, "images", "image row column channel")
    _check(path, "images", images, "a finite number")
    if "masks" not in archive:
        return ImageTable(images, None, str(path))
    masks = numbers_of(path, archive, "masks", "image row column")
    if masks.shape != images.shape[:3]:
        raise DataError(
            path, None, f"masks: expected shape {images.shape[:3]}, as images has, "
            f"got {masks.shape}; write one mask of the same size for each image",
        )  # fmt: skip
    _check(path, "masks", masks, "0 or 1")
    return ImageTable(images, masks.astype(np.uint8), str(path))


def _check(path: str | Path, key: str, values: np.ndarray, expected: str) -> None:
    wrong = not_finite(values) if key == "images" else not_binary(values)
    if wrong.any():
        place = np.unravel_index(int(np.argmax(wrong)), values.shape)
        where = ", ".join(str(int(i)) for i in place)
        raise DataError(
            path, None, f"{key}[{where}]: expected {expected}, got {values[place].item():g}; mend "
            "or drop the image",
        )  # fmt: skip


def write_images(
    path: str | Path,
    table: ImageTable,
    predictions: np.ndarray,
    probabilities: np.ndarray | None = None,
) -> None:
    """Write images, predicted masks as `masks`, and `probabilities` if given.

    Args:
        path: where to; the file appears when it is whole.
        table: its own masks are not looked at.
        predictions: (N, H, W) of 0 and 1.
        probabilities: (N, H, W) in [0, 1], written as float32.
    """
    arrays: dict[str, Any] = {"images": table.images, "masks": predictions.astype(np.uint8)}
    if probabilities is not None:
        arrays["probabilities"] = np.asarray(probabilities, dtype=np.float32)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
