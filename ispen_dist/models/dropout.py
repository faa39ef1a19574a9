"""Dropout whose mask is one operation of its own, drawn alike on every device and in every path."""

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """Dropout (Srivastava et al. 2014) without the fused kernel of a GPU.

    Compiled functions draw the same mask from the same random state, since it can be drawn apart
    from the rest; a fused kernel draws inside. On a CPU it is `nn.Dropout`, number for number.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x with entries left out at random in training, the rest scaled up."""
        if not self.training or self.p == 0.0:
            return x
        if self.p == 1.0:
            return torch.zeros_like(x)
        keep = 1.0 - self.p
        return x * (torch.bernoulli(torch.empty_like(x), keep) / keep)
