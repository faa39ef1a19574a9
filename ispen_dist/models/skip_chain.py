"""Skip-chain energy: every tag is scored with each of the tags before it, up to a distance.

    E(x, y) = - sum_t y_t . (b(x,t) + c) - sum_{d=1..D} sum_t y_{t-d}^T W_d y_t

Tu, Liu and Gimpel (2020), "An exploration of arbitrary-order sequence labeling via energy-based
inference networks", arXiv 2010.02789, after the skip chains of Sutton and McCallum (2004). D = 1 is
the linear chain. Quadratic in y; a pair that reaches over an end is absent. W starts at zero, so
the energy starts as its local potentials alone. `kernels/energies.py` has the same function.
"""

import torch
from torch import Tensor, nn

from ispen_dist.models.energies import TaggingEnergy


class SkipChainEnergy(TaggingEnergy):
    """See the top of the file; `W[d - 1, i, j]` is the score of tag j at a distance d after tag i.

    Args:
        feature_network: `inputs -> potentials` of shape (B, T, K).
        num_tags: K.
        num_skips: D, the largest distance.
    """

    def __init__(self, feature_network: nn.Module, num_tags: int, num_skips: int) -> None:
        super().__init__(feature_network, num_tags)
        self.W = nn.Parameter(torch.zeros(num_skips, num_tags, num_tags))

    def global_energy(self, y: Tensor) -> Tensor:
        """See `TaggingEnergy.global_energy`."""
        pairs = [
            ((y[..., :-d, :] @ W_d) * y[..., d:, :]).sum((-1, -2))
            for d, W_d in enumerate(self.W, start=1)
        ]
        return -torch.stack(pairs).sum(0)

    def interaction(self) -> Tensor:
        """Return the scores side by side, (K, D K): row the earlier tag, columns by distance."""
        return self.W.transpose(0, 1).flatten(1)
