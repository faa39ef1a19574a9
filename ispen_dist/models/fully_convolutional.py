"""The fully convolutional network for images, a U-Net (Ronneberger, Fischer and Brox 2015).

Convolutions have second derivatives in reverse mode on every device. Group norm (Wu and He 2018)
stands in the place of batch norm, whose statistics would tie the examples of a batch, and with them
the ranks, together.

Shapes: B batch, C channels, H and W height and width.
"""

import itertools
import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ispen_dist.models.dropout import Dropout
from ispen_dist.models.stages import Inputs, Part, StagedNetwork, State

GREATEST_FACTOR = 4
"""Widths double with every halving of the size, up to this multiple of the first."""
NUM_GROUPS = 8


class Block(nn.Module):
    """Two 3x3 convolutions, each with group norm and ReLU.

    Args:
        num_inputs: channels.
        num_outputs: channels.
        stride: of the first convolution; with 2 the size is halved, rounded up.
    """

    def __init__(self, num_inputs: int, num_outputs: int, stride: int = 1) -> None:
        super().__init__()
        groups = math.gcd(num_outputs, NUM_GROUPS)
        self.first = nn.Conv2d(num_inputs, num_outputs, 3, stride=stride, padding=1)
        self.first_norm = nn.GroupNorm(groups, num_outputs)
        self.second = nn.Conv2d(num_outputs, num_outputs, 3, padding=1)
        self.second_norm = nn.GroupNorm(groups, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return maps of the same size, or of half of it."""
        x = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(x)))


class FullyConvolutional(StagedNetwork):
    """Mask logits of an image: blocks that halve its size, and as many that double it.

    What a block puts out on the way down goes beside the maps of the same size on the way up, so
    that edges stay sharp. An odd size is rounded up on the way down and cut on the way up.

    Args:
        num_channels: C of the image.
        hidden_size: channels at the size of the mask; twice as many at half of it, four times as
            many below.
        num_layers: how often the size is halved.
        dropout: rate of hidden units.
        feature_dropout: rate on the input.
        num_masks: masks that are put out, side by side in one wide one.
        output_stride: pixels of the image, each way, for one of the mask; they come in as channels.
    """

    def __init__(
        self,
        num_channels: int,
        *,
        hidden_size: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        feature_dropout: float = 0.0,
        num_masks: int = 1,
        output_stride: int = 1,
    ) -> None:
        super().__init__()
        widths = [hidden_size * min(2**i, GREATEST_FACTOR) for i in range(num_layers + 1)]
        self.output_stride = output_stride
        self.first = Block(num_channels * output_stride**2, hidden_size)
        self.down = nn.ModuleList(
            Block(above, below, stride=2) for above, below in itertools.pairwise(widths)
        )
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(below, above, 2, stride=2)
            for above, below in itertools.pairwise(widths)
        )
        self.up = nn.ModuleList(Block(2 * width, width) for width in widths[:-1])
        self.output = nn.Conv2d(hidden_size, num_masks, 1)
        self.dropout = Dropout(dropout)
        self.feature_dropout = Dropout(feature_dropout)

    def parts(self) -> list[Part]:
        """Return one stage per block.

        The state is the maps of each size that the way up still needs, smallest last. The input is
        `inputs["image"]` (B, C, s H, s W) with output stride s, the output logits (B, H, masks W).
        """
        down = [
            Part(f"down.{i}", partial(_down, block, self.dropout), [block])
            for i, block in enumerate(self.down)
        ]
        up = [
            Part(f"up.{i}", partial(_up, grow, block, self.dropout), [grow, block])
            for i, (grow, block) in enumerate(zip(self.grow, self.up, strict=True))
        ]
        return [
            Part("first", self._begin, [self.first]),
            *down,
            *reversed(up),
            Part("output", self._score, [self.output]),
        ]

    def _begin(self, inputs: Inputs) -> State:
        image = F.pixel_unshuffle(inputs["image"], self.output_stride)
        return (self.dropout(self.first(self.feature_dropout(image))),)

    def _score(self, inputs: Inputs, x: Tensor) -> State:
        masks = self.output(x)  # (B, masks, H, W)
        return (masks.movedim(1, -2).flatten(-2),)


def _down(block: nn.Module, dropout: nn.Module, inputs: Inputs, *maps: Tensor) -> State:
    return *maps, dropout(block(maps[-1]))


def _up(
    grow: nn.Module, block: nn.Module, dropout: nn.Module, inputs: Inputs, *maps: Tensor
) -> State:
    *rest, beside, x = maps
    height, width = beside.shape[-2:]
    both = torch.cat([beside, grow(x)[..., :height, :width]], dim=1)
    return *rest, dropout(block(both))
