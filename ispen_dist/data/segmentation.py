"""Images with masks as examples, and their augmentation in training.

Shapes: B batch, C channels, H and W height and width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ispen_dist.config import DataConfig
from ispen_dist.data.batch import Batch, rows_to_read
from ispen_dist.data.images import ImageTable


@dataclass(frozen=True)
class SegmentationCodec:
    """Size of images and masks, and the scale of each channel in the training data.

    Attributes:
        size: height, width and channels of an image.
        mean: of each channel.
        deviation: standard deviation of each channel.
        output_stride: pixels of an image, each way, for one of its mask.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    output_stride: int = 1

    @classmethod
    def of(cls, table: ImageTable) -> "SegmentationCodec":
        """Measure the images that are trained on; a constant channel keeps its scale."""
        values = table.images.reshape(-1, table.images.shape[-1]).astype(np.float64)
        deviation = np.where(values.std(0) > 0.0, values.std(0), 1.0)
        height, width, channels = table.images.shape[1:]
        return cls(
            (height, width, channels),
            tuple(values.mean(0).tolist()),
            tuple(deviation.tolist()),
            table.output_stride,
        )

    @property
    def mask_size(self) -> tuple[int, int]:
        """Height and width of a mask."""
        return self.size[0] // self.output_stride, self.size[1] // self.output_stride

    @property
    def num_inputs(self) -> int:
        """Numbers that an image has for each pixel of its mask."""
        return self.size[2] * self.output_stride**2

    @property
    def num_outputs(self) -> int:
        """Pixels of a mask."""
        return self.mask_size[0] * self.mask_size[1]

    @property
    def output_names(self) -> tuple[str, ...]:
        """Numbers of the pixels of the longer side of a mask, for pictures."""
        return tuple(map(str, range(max(self.mask_size))))


@dataclass(frozen=True)
class SegmentationDataset:
    """Images with their masks.

    Attributes:
        table: images of the codec's size; masks may be None.
        codec: scale of the channels.
        originals: the same images and masks, larger by a whole factor, where there are some.
    """

    table: ImageTable
    codec: SegmentationCodec
    originals: ImageTable | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.table)

    def collate(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Return a batch with standardised channels, see `Batch`."""
        chosen, weight = rows_to_read(rows)
        image = self._standardised(self.table.images[chosen])
        masks = self.table.masks
        unknown = np.zeros((len(chosen), *self.codec.mask_size))
        target = unknown if masks is None else masks[chosen]
        inputs = {"image": torch.from_numpy(image).permute(0, 3, 1, 2).float().contiguous()}
        return Batch(inputs, torch.from_numpy(target).float(), weight, torch.from_numpy(chosen))

    def original(self, row: int) -> tuple[Tensor, Tensor]:
        """Return an image (C, H, W) with standardised channels, and its mask, both at full size."""
        assert self.originals is not None
        image = torch.from_numpy(self._standardised(self.originals.images[row]))
        mask = torch.from_numpy(self.originals.require_masks()[row])
        return image.permute(2, 0, 1).float(), mask.float()

    def _standardised(self, images: np.ndarray) -> np.ndarray:
        return (images - np.array(self.codec.mean)) / self.codec.deviation


@dataclass(frozen=True)
class Augmentation:
    """Training images that are moved with their masks, and coloured, anew in every step.

    What is drawn depends on the seed, the step and the number of the example alone, so every number
    of ranks trains on the same images, and a resumed run on those of an uninterrupted one. What
    comes in from beyond an edge is mirrored; a mask stays of 0 and 1.

    Attributes:
        seed: of the draws.
        flip: mirror left and right with probability one half.
        shift: largest shift in rows and columns of the image, by whole pixels of the mask.
        rotate: largest angle, in degrees.
        zoom: largest logarithm of a change of size.
        colour: largest change of each standardised channel, as an offset and as a factor to 1.
        original: from the row number of an example to its image and its mask at full size. They are
            what is turned and zoomed then, and reduced to the example's: of the image the mean, of
            the mask what most of its pixels are.
    """

    seed: int
    flip: bool = False
    shift: int = 0
    rotate: float = 0.0
    zoom: float = 0.0
    colour: float = 0.0
    original: Callable[[int], tuple[Tensor, Tensor]] | None = field(default=None, compare=False)

    def __call__(self, batch: Batch, step: int) -> Batch:
        """Return the batch as it is seen in a step."""
        drawn = [
            self._draw(step, int(row), image, mask)
            for row, image, mask in zip(
                batch.index, batch.inputs["image"], batch.target, strict=True
            )
        ]
        images, masks = zip(*drawn, strict=True)
        inputs = batch.inputs | {"image": torch.stack(images)}
        return replace(batch, inputs=inputs, target=torch.stack(masks))

    def _draw(self, step: int, row: int, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        draw = np.random.default_rng([self.seed, step, row])
        widths, target = (image.shape[-1], mask.shape[-1]), mask.shape[-1]
        if self.original is not None and (self.rotate or self.zoom):
            image, mask = (part.to(image.dtype) for part in self.original(row))
        both = [image, mask.unsqueeze(0)]
        if self.flip and draw.integers(2):
            both = [part.flip(-1) for part in both]
        if most := self.shift * target // widths[0]:
            top, left = draw.integers(2 * most + 1, size=2)
            # Pixels that each has, each way, for one of the target.
            units = [part.shape[-1] // target for part in both]
            both = [
                _cut(part, most * unit, top * unit, left * unit)
                for part, unit in zip(both, units, strict=True)
            ]
        if self.rotate or self.zoom:
            angle, zoom = draw.uniform(-1.0, 1.0, size=2) * [self.rotate, self.zoom]
            both = [turned(part, math.radians(angle), math.exp(zoom)) for part in both]
        image, share = (
            F.avg_pool2d(part, part.shape[-1] // width)
            for part, width in zip(both, widths, strict=True)
        )
        mask = (share[0] > 0.5).to(mask.dtype)
        if self.colour:
            change = draw.uniform(-self.colour, self.colour, size=(2, len(image), 1, 1))
            factor, offset = torch.from_numpy(change).to(image.dtype)
            image = image * (1.0 + factor) + offset
        return image, mask


def _cut(image: Tensor, padding: int, top: int, left: int) -> Tensor:
    """Return a window of the size of the image, in the image with a mirrored border around it."""
    height, width = image.shape[-2:]
    padded = F.pad(image, (padding,) * 4, mode="reflect")
    return padded[..., top : top + height, left : left + width]


def turned(image: Tensor, angle: float, scale: float) -> Tensor:
    """Turn an image (C, H, W) clockwise by an angle in radians, and enlarge it by a factor.

    Between pixels it is linear.
    """
    height, width = image.shape[-2:]
    sine, cosine = math.sin(angle) / scale, math.cos(angle) / scale
    # Rows and columns both go from -1 to 1 here, whatever the shape.
    matrix = [[cosine, sine * height / width, 0.0], [-sine * width / height, cosine, 0.0]]
    size = [1, *image.shape]
    grid = F.affine_grid(image.new_tensor([matrix]), size, align_corners=False)
    moved = F.grid_sample(image.unsqueeze(0), grid, padding_mode="reflection", align_corners=False)
    return moved[0]


def augmentation(config: DataConfig, seed: int, dataset: object = None) -> Augmentation | None:
    """Return what training images go through, None where the settings ask for nothing.

    Args:
        config: which changes.
        seed: of the draws.
        dataset: the examples, whose originals are read, if they have some.
    """
    original = None
    if isinstance(dataset, SegmentationDataset) and dataset.originals is not None:
        original = dataset.original
    changes = Augmentation(
        seed,
        config.flip,
        config.shift,
        config.rotate,
        config.zoom,
        config.colour,
        original,
    )
    return None if changes == Augmentation(seed) else changes
