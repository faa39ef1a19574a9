"""Tag language model energy: the whole sequence of tags is scored by a model of the next tag.

    E(x, y) = - sum_t y_t . (b(x,t) + c) - sum_t y_t . (log p(. | y_{<t}) + log K)

Tu, Liu and Gimpel (2020), arXiv 2010.02789, `E_TLM`. p reads relaxed tags as it reads gold ones.
Departures: (1) theirs is an LSTM, pre-trained on gold tags and fixed; ours is learned with the
energy. (2) p is a stack of causal convolutions with dilations 1, 2, 4, ...: layer l computes

    h_t <- h_t + tanh(A_l h_t + B_l h_{t - 2^l} + c_l),    h_t = a + L^T y_{t-1} at first,

and sees 2^N tags back with N layers. Its graph is as deep as it has layers and not as long as
the sequence, it has all derivatives on every device (cuDNN's recurrent kernels have no second one),
and it can be traced. (3) The end of the sequence is not predicted. (4) log p is taken relative to
the uniform distribution, a constant per token: the last layer starts at zero, so p starts uniform
and the energy starts as its local potentials alone.

Padding: y is zero there, so it predicts nothing, and being at the end it is in nobody's past.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ispen_dist.models.energies import TaggingEnergy


class TagLanguageModelEnergy(TaggingEnergy):
    """See the top of the file.

    Args:
        feature_network: `inputs -> potentials` of shape (B, T, K).
        num_tags: K.
        num_units: width of h.
        num_layers: N.
    """

    def __init__(
        self, feature_network: nn.Module, num_tags: int, num_units: int, num_layers: int
    ) -> None:
        super().__init__(feature_network, num_tags)
        square, scale = (num_layers, num_units, num_units), 1.0 / math.sqrt(2 * num_units)
        self.L = nn.Parameter(torch.randn(num_tags, num_units))
        self.a = nn.Parameter(torch.zeros(num_units))
        self.A = nn.Parameter(torch.randn(square) * scale)
        self.B = nn.Parameter(torch.randn(square) * scale)
        self.c = nn.Parameter(torch.zeros(num_layers, num_units))
        self.U = nn.Parameter(torch.zeros(num_units, num_tags))
        self.u = nn.Parameter(torch.zeros(num_tags))

    def log_likelihood_ratio(self, y: Tensor) -> Tensor:
        """Return `log p(. | y_{<t}) + log K` for every t, like y (..., T, K)."""
        h = self.a + _delayed(y @ self.L, 1)
        for layer, (A, B, c) in enumerate(zip(self.A, self.B, self.c, strict=True)):
            h = h + torch.tanh(h @ A + _delayed(h, 2**layer) @ B + c)
        return torch.log_softmax(h @ self.U + self.u, dim=-1) + math.log(y.shape[-1])

    def global_energy(self, y: Tensor) -> Tensor:
        """See `TaggingEnergy.global_energy`."""
        return -(y * self.log_likelihood_ratio(y)).sum((-1, -2))

    def interaction(self) -> Tensor:
        """Return `log p(second = j | first = i) + log K`, (K, K): row i, column j."""
        first = torch.eye(len(self.L), dtype=self.L.dtype, device=self.L.device)
        return self.log_likelihood_ratio(F.pad(first.unsqueeze(1), (0, 0, 0, 1)))[:, 1]


def _delayed(x: Tensor, steps: int) -> Tensor:
    """Return x (..., T, n) with every position holding that of `steps` before, zero at first."""
    return F.pad(x, (0, 0, steps, 0))[..., : x.shape[-2], :]
