"""An energy for images, after the deep value networks of Gygli et al. (2017).

Shapes: B batch, C channels, H and W height and width, M interaction units, S samples.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ispen_dist.models.energies import EnergyNetwork
from ispen_dist.models.stages import Inputs, Part, StagedNetwork, State


class WithImage(StagedNetwork):
    """A network of mask logits (B, H, W) with the image beside them: (B, 1 + C, H, W).

    Args:
        network: `inputs -> logits`.
        output_stride: pixels of the image, each way, for one of the mask; they are channels here.
    """

    def __init__(self, network: nn.Module, output_stride: int = 1) -> None:
        super().__init__()
        assert isinstance(network, StagedNetwork)
        self.network = network
        self.output_stride = output_stride

    def parts(self) -> list[Part]:
        """Return the stages of the network, and one that has no parameters."""
        return [*self.network.parts(), Part("image", self._beside_image, [])]

    def _beside_image(self, inputs: Inputs, logits: Tensor) -> State:
        image = F.pixel_unshuffle(inputs["image"], self.output_stride)
        return (torch.cat([logits.unsqueeze(1), image], dim=1),)


class ConvolutionalEnergy(EnergyNetwork):
    """Energy of a mask, `E = - sum_p y_p (b_p(x) + c) + v^T h(x, y)`.

    `h` are two strided 5x5 convolutions of image and mask with softplus, and a dense layer `v` over
    all their positions, as in the value network of Gygli et al. (2017), Section 4.2, which has two
    dense layers more. `b` are logits of a network of the energy's own, `c` a bias that stays
    trainable when `b` is frozen. The image reaches the energy through the potentials, which are
    (B, 1 + C, H, W): b and the image, see `WithImage`.

    Args:
        feature_network: `inputs -> potentials`.
        size: H, W and C.
        num_units: M, channels of the first convolution; the second has twice as many.
    """

    def __init__(
        self, feature_network: nn.Module, size: tuple[int, int, int], num_units: int
    ) -> None:
        super().__init__(feature_network)
        height, width, channels = size
        self.size = size
        self.bias = nn.Parameter(torch.zeros(1))
        self.of_mask = nn.Conv2d(1, num_units, 5, stride=2, padding=2)
        self.of_image = nn.Conv2d(channels, num_units, 5, stride=2, padding=2, bias=False)
        self.second = nn.Conv2d(num_units, 2 * num_units, 5, stride=2, padding=2)
        positions = math.ceil(height / 4) * math.ceil(width / 4)
        self.v = nn.Parameter(torch.zeros(2 * num_units * positions))

    def local(self, potentials: Tensor) -> Tensor:
        """Return b (B, H, W)."""
        return potentials[:, 0]

    def score(self, potentials: Tensor, y: Tensor) -> Tensor:
        """Return energies (B,) of y (B, H, W), or (S, B) of y (S, B, H, W)."""
        unary = (y * (self.local(potentials) + self.bias)).sum((-1, -2))
        return self._global(self.of_image(potentials[:, 1:]), y) - unary

    def _global(self, image: Tensor, y: Tensor) -> Tensor:
        """Return `v^T h` given the first convolution of the image, (B, M, H/2, W/2)."""
        mask = self.of_mask(y.reshape(-1, 1, *y.shape[-2:]))
        first = F.softplus(mask.unflatten(0, y.shape[:-2]) + image)
        second = F.softplus(self.second(first.flatten(0, -4)))
        return (second.flatten(1) @ self.v).unflatten(0, y.shape[:-2])

    def interaction(self) -> Tensor:
        """Return the mixed second derivatives of `v^T h` with the centre pixel: (H, W).

        They are taken at an undecided mask, y = 1/2, on an image of average colour.
        """
        height, width, _ = self.size
        with torch.enable_grad():
            y = torch.full((1, height, width), 0.5).to(self.v).requires_grad_()
            image = torch.zeros(1, self.of_mask.out_channels, 1, 1).to(self.v)
            energy = self._global(image, y).sum()
            (slope,) = torch.autograd.grad(energy, y, create_graph=True)
            (row,) = torch.autograd.grad(slope[0, height // 2, width // 2], y)
        return row[0]
