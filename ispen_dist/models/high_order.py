"""High-order energy: windows of M + 1 consecutive tags, scored without a table of K^(M+1) entries.

    E(x, y) = - sum_t y_t . (b(x,t) + c) - sum_{t>M} F(y_{t-M}, ..., y_t)

    e_t = L^T y_t,    h_1 = e_{t-M},    h_{j+1} = tanh(S_j (h_j (x) e_{t-M+j})),    F = h_M^T V e_t

Tu, Liu and Gimpel (2020), arXiv 2010.02789: a window is read tag by tag, each time as the
vectorised Kronecker product of what was read with the embedding of the next tag, mapped back to R
numbers. M = 1 is a linear chain of rank R. Departures: (1) the last tag enters by the bilinear form
V; (2) tanh without biases, which is smooth and keeps zero at zero, so a window that reaches into
padding, where y is zero, scores zero. V starts at zero, and with it every F, so the energy starts
as its local potentials alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ispen_dist.models.energies import TaggingEnergy


class HighOrderEnergy(TaggingEnergy):
    """See the top of the file.

    Args:
        feature_network: `inputs -> potentials` of shape (B, T, K).
        num_tags: K.
        order: M, tags before the last one of a window.
        num_units: R, width of the embeddings.
    """

    def __init__(
        self, feature_network: nn.Module, num_tags: int, order: int, num_units: int
    ) -> None:
        super().__init__(feature_network, num_tags)
        self.order = order
        self.L = nn.Parameter(torch.randn(num_tags, num_units))
        # A Kronecker product of unit entries has R^2 of them, so a row of S keeps the scale of one.
        # Engines cannot shard a parameter without entries, so M = 1 has none.
        S = torch.randn(order - 1, num_units**2, num_units) / num_units
        self.S: nn.Parameter | None = nn.Parameter(S) if order > 1 else None
        self.V = nn.Parameter(torch.zeros(num_units, num_units))

    def global_energy(self, y: Tensor) -> Tensor:
        """See `TaggingEnergy.global_energy`."""
        num_windows = max(y.shape[-2] - self.order, 0)
        e = y @ self.L
        window = [e[..., j : j + num_windows, :] for j in range(self.order + 1)]
        return -((self._read(window[:-1]) @ self.V) * window[-1]).sum((-1, -2))

    def _read(self, embeddings: Sequence[Tensor]) -> Tensor:
        """Return h_M (..., R) from the embeddings (..., R) of the M tags before the last."""
        h = embeddings[0]
        for S_j, e in zip(() if self.S is None else self.S, embeddings[1:], strict=True):
            kronecker = (h.unsqueeze(-1) * e.unsqueeze(-2)).flatten(-2)
            h = torch.tanh(kronecker @ S_j)
        return h

    def interaction(self) -> Tensor:
        """Return the scores of a tag after a run of another, (K, K): row the run, column the tag.

        `F(i, ..., i, j)`, the corner of the table that shows which tags repeat and what ends them.
        """
        return self._read([self.L] * self.order) @ self.V @ self.L.T
