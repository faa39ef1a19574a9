"""Masks from an image encoder that was trained on ImageNet, EfficientNet-Lite0.

The encoder is that of Tan and Le (2019), without squeeze-and-excitation and with ReLU6, as released
by its authors for small devices. Its batch norm is folded into the convolutions with the statistics
of ImageNet: those of a batch would tie its examples, and with them the ranks, together. The way up
adds maps of every size, from the smallest on, as a feature pyramid does (Lin et al. 2017).

Shapes: B batch, C channels, H and W height and width of the mask, s output stride, e `enlarge`.
"""

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ispen_dist.config import ConfigError
from ispen_dist.models.dropout import Dropout
from ispen_dist.models.fully_convolutional import Block
from ispen_dist.models.stages import Inputs, Part, StagedNetwork, State


class _Blocks(NamedTuple):
    kernel: int
    stride: int
    expansion: int
    width: int
    number: int


STEM = 32
"""Channels of the first convolution."""
HALVINGS = (
    (_Blocks(3, 1, 1, 16, 1),),
    (_Blocks(3, 2, 6, 24, 2),),
    (_Blocks(5, 2, 6, 40, 2),),
    (_Blocks(3, 2, 6, 80, 3), _Blocks(5, 1, 6, 112, 3)),
    (_Blocks(5, 2, 6, 192, 4), _Blocks(3, 1, 6, 320, 1)),
)
"""Blocks of each size; the stem halves the image before the first."""
NORM_EPSILON = 1e-3
PIXEL_MEAN, PIXEL_SCALE = 127.0, 128.0
"""What the released weights take from values of 0 to 255, and divide them by."""


class SameConv2d(nn.Conv2d):
    """A convolution with zeros around the image, more of them below and to the right.

    The size of the result is that of the image over the stride, rounded up.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W)."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        margins = [max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:]]
        (top, bottom), (left, right) = [(m // 2, m - m // 2) for m in margins]
        return super().forward(F.pad(x, (left, right, top, bottom)))


class InvertedResidual(nn.Module):
    """A 1x1 convolution that widens, one for each channel alone, and a 1x1 that narrows.

    Args:
        num_inputs: channels.
        blocks: kernel, expansion and channels that are put out.
        stride: of the middle one.
    """

    def __init__(self, num_inputs: int, blocks: _Blocks, stride: int) -> None:
        super().__init__()
        wide = num_inputs * blocks.expansion
        self.expand = SameConv2d(num_inputs, wide, 1) if blocks.expansion > 1 else None
        self.depthwise = SameConv2d(wide, wide, blocks.kernel, stride=stride, groups=wide)
        self.project = SameConv2d(wide, blocks.width, 1)
        self.adds = stride == 1 and num_inputs == blocks.width

    def forward(self, x: Tensor) -> Tensor:
        """Return maps of the same size, or of half of it."""
        wide = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(wide)))
        return x + y if self.adds else y


class EfficientNetLite0(StagedNetwork):
    """Mask logits of an image.

    The image is enlarged for the encoder, which has learned from larger ones; the last block sees
    the maps of the way up at the size of the mask, beside the image.

    It is built with initial values of its own; `load_pretrained` reads those of `source`, so that a
    trained model is built without the encoder's file.

    Args:
        channels: mean and standard deviation of each channel of the image, by which it was
            standardised.
        hidden_size: channels on the way up.
        num_layers: how often the encoder halves the size, 1 to 5.
        source: where the encoder's weights are, empty for none.
        enlarge: e; `e s` is even, so that the first maps are at least as large as the mask.
        trainable_layers: number of last halvings that are trained, -1 for all.
        dropout: rate of hidden units on the way up.
        feature_dropout: rate on the input.
        num_masks: masks that are put out, side by side in one wide one.
        output_stride: s, pixels of the image, each way, for one of the mask.

    Raises:
        ConfigError: for an odd `e s`.
    """

    def __init__(
        self,
        channels: Sequence[tuple[float, float]],
        *,
        hidden_size: int,
        num_layers: int = len(HALVINGS),
        source: str = "",
        enlarge: int = 2,
        trainable_layers: int = -1,
        dropout: float = 0.0,
        feature_dropout: float = 0.0,
        num_masks: int = 1,
        output_stride: int = 1,
    ) -> None:
        super().__init__()
        if enlarge * output_stride % 2:
            raise ConfigError(
                "enlarge: expected an even number of pixels for each of the mask, as "
                f"efficientnet_lite0 halves the image at once, got {enlarge} times "
                f"{output_stride}; set it to 2"
            )
        self.channels, self.source = tuple(channels), source
        self.pretrained = ("stem", "down") if source else ()
        self.enlarge, self.output_stride = enlarge, output_stride
        halvings = HALVINGS[:num_layers]
        self.stem = SameConv2d(len(channels), STEM, 3, stride=2)
        self.down = nn.ModuleList(_encoder(halvings))
        self.beside = nn.ModuleList(nn.Conv2d(h[-1].width, hidden_size, 1) for h in halvings)
        self.up = nn.ModuleList(Block(hidden_size, hidden_size) for _ in halvings[1:])
        self.last = Block(hidden_size + len(channels) * output_stride**2, hidden_size)
        self.output = nn.Conv2d(hidden_size, num_masks, 1)
        self.dropout = Dropout(dropout)
        self.feature_dropout = Dropout(feature_dropout)
        if trainable_layers >= 0:
            frozen = max(num_layers - trainable_layers, 0)
            for module in (*([self.stem] if frozen else []), *self.down[:frozen]):
                module.requires_grad_(False)

    def load_pretrained(self) -> None:
        """Read the encoder's weights, and fold its batch norm and its scale of pixels into them.

        Raises:
            ConfigError: where they are not there, are those of another encoder, or the images
                have other channels than red, green and blue.
        """
        if not self.source:
            return
        if len(self.channels) != 3:
            raise ConfigError(
                "inference_net.model: expected images of 3 channels for an encoder of photographs, "
                f"got {len(self.channels)}; leave the setting empty"
            )
        try:
            weights = torch.load(_file_of(self.source), map_location="cpu", weights_only=True)
            for convolution, name, norm in self._released_names():
                weight, bias = _folded(weights, name, norm)
                convolution.load_state_dict({"weight": weight, "bias": bias})
            mean, deviation = torch.tensor(self.channels).T
            with torch.no_grad():
                shifted = self.stem.weight * ((mean - PIXEL_MEAN) / PIXEL_SCALE).view(3, 1, 1)
                self.stem.bias += shifted.sum((1, 2, 3))
                self.stem.weight *= (deviation / PIXEL_SCALE).view(3, 1, 1)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"inference_net.model: expected the weights of EfficientNet-Lite0 in "
                f"{self.source!r}, got: {error}; install the extra efficientnet, or name its file"
            ) from error

    def _released_names(self) -> Iterator[tuple[nn.Module, str, str]]:
        """Yield every convolution, its name in the released weights, and that of its norm."""
        yield self.stem, "_conv_stem", "_bn0"
        blocks = (block for block in self.down.modules() if isinstance(block, InvertedResidual))
        for i, block in enumerate(blocks):
            if block.expand is not None:
                yield block.expand, f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0"
            yield block.depthwise, f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1"
            yield block.project, f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2"

    def parts(self) -> list[Part]:
        """Return one stage for each halving, on the way down and up.

        The state is the maps of each size that the way up still needs, smallest last. The input is
        `inputs["image"]` (B, C, s H, s W), the output logits (B, H, masks W).
        """
        first, *others = self.down
        *larger, smallest = self.beside
        down = [
            Part(f"down.{i}", partial(_down, block), [block])
            for i, block in enumerate(others, start=1)
        ]
        blocks = [None, *self.up]
        up = [
            Part(f"up.{i}", partial(_up, beside, block, self.dropout), _present(beside, block))
            for i, (beside, block) in enumerate(zip(larger, blocks, strict=False))
        ]
        top = partial(_top, smallest, blocks[-1], self.dropout)
        return [
            Part("first", partial(self._begin, first), [self.stem, first]),
            *down,
            Part("top", top, _present(smallest, blocks[-1])),
            *reversed(up),
            Part("output", self._score, [self.last, self.output]),
        ]

    def _begin(self, first: nn.Module, inputs: Inputs) -> State:
        image = self.feature_dropout(inputs["image"])
        if self.enlarge > 1:
            image = F.interpolate(image, scale_factor=self.enlarge, mode="bilinear")
        # Every map behind it lies in this order too, in which a CPU convolves a channel alone fast.
        image = image.contiguous(memory_format=torch.channels_last)
        return (first(F.relu6(self.stem(image))),)

    def _score(self, inputs: Inputs, x: Tensor) -> State:
        x = F.avg_pool2d(x, self.enlarge * self.output_stride // 2)
        image = F.pixel_unshuffle(inputs["image"], self.output_stride)
        x = self.dropout(self.last(torch.cat([x, image], dim=1)))
        return (self.output(x).movedim(1, -2).flatten(-2),)


def _encoder(halvings: Sequence[Sequence[_Blocks]]) -> Iterator[nn.Sequential]:
    width = STEM
    for halving in halvings:
        group = []
        for blocks in halving:
            for i in range(blocks.number):
                group.append(InvertedResidual(width, blocks, 1 if i else blocks.stride))
                width = blocks.width
        yield nn.Sequential(*group)


def _present(*modules: nn.Module | None) -> list[nn.Module]:
    return [module for module in modules if module is not None]


def _down(block: nn.Module, inputs: Inputs, *maps: Tensor) -> State:
    return *maps, block(maps[-1])


def _top(
    beside: nn.Module, block: nn.Module | None, dropout: nn.Module, inputs: Inputs, *maps: Tensor
) -> State:
    *rest, x = maps
    return *rest, _mixed(block, dropout, beside(x))


def _up(
    beside: nn.Module, block: nn.Module | None, dropout: nn.Module, inputs: Inputs, *maps: Tensor
) -> State:
    *rest, larger, x = maps
    height, width = larger.shape[-2:]
    grown = F.interpolate(x, scale_factor=2, mode="nearest")[..., :height, :width]
    return *rest, _mixed(block, dropout, beside(larger) + grown)


def _mixed(block: nn.Module | None, dropout: nn.Module, x: Tensor) -> Tensor:
    """Return maps after a block; the largest have none, they are pooled to the mask first."""
    return x if block is None else dropout(block(x))


def _folded(weights: Mapping[str, Tensor], name: str, norm: str) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution without bias and the batch norm behind it."""
    return fuse_conv_bn_weights(
        bn_w=weights[f"{norm}.weight"],
        bn_b=weights[f"{norm}.bias"],
        bn_rm=weights[f"{norm}.running_mean"],
        bn_rv=weights[f"{norm}.running_var"],
        bn_eps=NORM_EPSILON,
        conv_w=weights[f"{name}.weight"],
        conv_b=None,
    )


def _file_of(source: str) -> Path:
    """Return the file of weights, for `package:NAME` the one that lies in the package."""
    if not source.startswith("package:"):
        return Path(source)
    found = importlib.util.find_spec(source.removeprefix("package:"))
    folders = list(found.submodule_search_locations or []) if found else []
    files = sorted(path for folder in folders for path in Path(folder).rglob("*.pth"))
    if len(files) != 1:
        raise ConfigError(
            f"inference_net.model: expected an installed package with one file of weights (.pth), "
            f"got {len(files)} in {source!r}; install the extra efficientnet, or name a file"
        )
    return files[0]
