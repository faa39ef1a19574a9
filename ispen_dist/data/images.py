"""Images with foreground masks as NumPy archives.

Keys: `images` (N, H, W, C), finite numbers of any type, and `masks` (N, H / s, W / s) of 0 and 1,
with a whole number s, the output stride: 1 where every pixel has its own. Masks may also stand in a
file of their own. A file without masks is unlabelled. Other keys are not read.
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
        masks: (N, H / s, W / s) uint8 of 0 and 1, s the output stride, or None where the data is
            unlabelled.
        path: the file it was read from, for messages.
    """

    images: np.ndarray
    masks: np.ndarray | None
    path: str = "(in memory)"

    def __len__(self) -> int:
        """N."""
        return len(self.images)

    @property
    def output_stride(self) -> int:
        """Pixels of an image, each way, for one of its mask."""
        return self.images.shape[1] // self.require_masks().shape[1]

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

    def check_stride(self, stride: int) -> None:
        """Raise unless the masks are there, and smaller than the images by this factor.

        Raises:
            DataError: with both sizes.
        """
        height, width = (side // stride for side in self.images.shape[1:3])
        found = self.require_masks().shape[1:]
        if found != (height, width):
            raise DataError(
                self.path, None, f"masks: expected height and width {(height, width)}, as in "
                f"training, got {found}; resize the masks, or see data.masks",
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
        for table in tables:
            table.check_stride(self.output_stride)
        masks = np.concatenate([table.require_masks() for table in tables])
        return replace(self, images=images, masks=masks)


def read_images(
    path: str | Path, masks_path: str | Path | None = None, *, labelled: bool = True
) -> ImageTable:
    """Read images and, where the file has them, masks.

    Args:
        path: the file.
        masks_path: another file, whose masks stand in the place of its own.
        labelled: whether the masks are read.

    Raises:
        DataError: for arrays of objects, other shapes, and NaN, infinity or other masks than 0
            and 1, with the zero-based image.
    """
    archive = open_archive(path, "images=..., masks=...")
    images = numbers_of(path, archive, "images", "image row column channel")
    _check(path, "images", images, "a finite number")
    if not labelled or (masks_path is None and "masks" not in archive):
        return ImageTable(images, None, str(path))
    return ImageTable(images, _read_masks(masks_path or path, images.shape[:3]), str(path))


def _read_masks(path: str | Path, shape: tuple[int, ...]) -> np.ndarray:
    """Return masks (N, H / s, W / s) of images of this shape (N, H, W)."""
    masks = numbers_of(path, open_archive(path, "masks=..."), "masks", "image row column")
    stride = shape[1] // masks.shape[1]
    number, height, width = masks.shape
    if (number, height * stride, width * stride) != shape:
        raise DataError(
            path, None, f"masks: expected shape {shape}, as images has, or height and width "
            f"smaller by one whole factor, got {masks.shape}; write one mask for each image",
        )  # fmt: skip
    _check(path, "masks", masks, "0 or 1")
    return masks.astype(np.uint8)


def _check(path: str | Path, key: str, values: np.ndarray, expected: str) -> None:
    with np.errstate(over="ignore"):
        # Networks read float32, whose infinity is a smaller number than that of float64.
        single = values.astype(np.float32) if values.dtype == np.float64 else values
    wrong = not_finite(single) if key == "images" else not_binary(values)
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
        predictions: (N, H / s, W / s) of 0 and 1.
        probabilities: of the same shape, in [0, 1], written as float32.
    """
    arrays: dict[str, Any] = {"images": table.images, "masks": predictions.astype(np.uint8)}
    if probabilities is not None:
        arrays["probabilities"] = np.asarray(probabilities, dtype=np.float32)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
