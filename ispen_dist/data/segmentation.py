"""Images with masks as examples, and their augmentation in training.

Shapes: B batch, C channels, H and W height and width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ispen_dist.config import DataConfig
from ispen_dist.data.batch import Batch, rows_to_read
from ispen_dist.data.images import ImageTable


@dataclass(frozen=True)
class SegmentationCodec:
    """Size of the images, and the scale of each channel in the training data.

    Attributes:
        size: height, width and channels.
        mean: of each channel.
        deviation: standard deviation of each channel.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def of(cls, table: ImageTable) -> "SegmentationCodec":
        """Measure the images that are trained on; a constant channel keeps its scale."""
        values = table.images.reshape(-1, table.images.shape[-1]).astype(np.float64)
        deviation = np.where(values.std(0) > 0.0, values.std(0), 1.0)
        height, width, channels = table.images.shape[1:]
        return cls(
            (height, width, channels), tuple(values.mean(0).tolist()), tuple(deviation.tolist())
        )

    @property
    def num_inputs(self) -> int:
        """C."""
        return self.size[2]

    @property
    def num_outputs(self) -> int:
        """H W, one output for each pixel."""
        return self.size[0] * self.size[1]

    @property
    def output_names(self) -> tuple[str, ...]:
        """Numbers of the pixels of the longer side, for pictures."""
        return tuple(map(str, range(max(self.size[:2]))))


@dataclass(frozen=True)
class SegmentationDataset:
    """Images with their masks.

    Attributes:
        table: images of the codec's size; masks may be None.
        codec: scale of the channels.
    """

    table: ImageTable
    codec: SegmentationCodec

    def __len__(self) -> int:
        """Number of images."""
        return len(self.table)

    def collate(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Return a batch with standardised channels, see `Batch`."""
        chosen, weight = rows_to_read(rows)
        image = (self.table.images[chosen] - np.array(self.codec.mean)) / self.codec.deviation
        masks = self.table.masks
        target = np.zeros(image.shape[:3]) if masks is None else masks[chosen]
        inputs = {"image": torch.from_numpy(image).permute(0, 3, 1, 2).float().contiguous()}
        return Batch(inputs, torch.from_numpy(target).float(), weight, torch.from_numpy(chosen))


@dataclass(frozen=True)
class Augmentation:
    """Training images that are moved with their masks, and coloured, anew in every step.

    What is drawn depends on the seed, the step and the number of the example alone, so every number
    of ranks trains on the same images, and a resumed run on those of an uninterrupted one. What
    comes in from beyond an edge is mirrored; a mask stays of 0 and 1.

    Attributes:
        seed: of the draws.
        flip: mirror left and right with probability one half.
        shift: largest shift in rows and columns.
        rotate: largest angle, in degrees.
        zoom: largest logarithm of a change of size.
        colour: largest change of each standardised channel, as an offset and as a factor to 1.
    """

    seed: int
    flip: bool = False
    shift: int = 0
    rotate: float = 0.0
    zoom: float = 0.0
    colour: float = 0.0

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
        both = torch.cat([image, mask.unsqueeze(0)])
        if self.flip and draw.integers(2):
            both = both.flip(-1)
        if self.shift:
            top, left = draw.integers(2 * self.shift + 1, size=2)
            height, width = mask.shape
            padded = F.pad(both, (self.shift,) * 4, mode="reflect")
            both = padded[:, top : top + height, left : left + width]
        if self.rotate or self.zoom:
            angle, zoom = draw.uniform(-1.0, 1.0, size=2) * [self.rotate, self.zoom]
            both = turned(both, math.radians(angle), math.exp(zoom))
        image, mask = both[:-1], (both[-1] > 0.5).to(both.dtype)
        if self.colour:
            change = draw.uniform(-self.colour, self.colour, size=(2, len(image), 1, 1))
            factor, offset = torch.from_numpy(change).to(image.dtype)
            image = image * (1.0 + factor) + offset
        return image, mask


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


def augmentation(config: DataConfig, seed: int) -> Augmentation | None:
    """Return what training images go through, None where the settings ask for nothing."""
    changes = Augmentation(
        seed, config.flip, config.shift, config.rotate, config.zoom, config.colour
    )
    return None if changes == Augmentation(seed) else changes
