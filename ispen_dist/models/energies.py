"""Energy networks E_phi(x, y): one number per example, low where y fits x.

An energy has two parts: `potentials(inputs)`, from a feature network of its own that sees x
alone, and `score(potentials, y)`, which reads the few parameters of the interaction, the *head*.
`y` is relaxed or gold, (B, ...) or with a leading sample dimension (S, B, ...). The potentials are
pre-trained as the logits of an independent model; they do not depend on y, so they are computed
once per batch, whatever is done with y.

To add one: write the module here or in a file of its own, and add a row to `models/registry.py`.
Shapes: B batch, T tokens, K tags, L labels, M interaction units, S samples.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ispen_dist.models.chains import best_chain, chain_nll


class EnergyNetwork(nn.Module, ABC):
    """The interface of an energy.

    Args:
        feature_network: `inputs -> local potentials`, shaped like the logits of the inference
            network; pre-trained on its own.
    """

    def __init__(self, feature_network: nn.Module) -> None:
        super().__init__()
        self.feature_network = feature_network

    def potentials(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the local potentials `b(x)`, shaped like the logits of the inference network."""
        return self.feature_network(inputs)

    def local(self, potentials: Tensor) -> Tensor:
        """Return what of the potentials are logits of an independent model: by default, all."""
        return potentials

    @abstractmethod
    def score(self, potentials: Tensor, y: Tensor) -> Tensor:
        """Return energies (B,) of y (B, ...), or (S, B) of y (S, B, ...)."""

    def forward(self, inputs: Mapping[str, Tensor], y: Tensor | None = None) -> Tensor:
        """Return the energies of y at inputs, see `score`; without y, see `local`."""
        potentials = self.potentials(inputs)
        return self.local(potentials) if y is None else self.score(potentials, y)

    @abstractmethod
    def interaction(self) -> Tensor:
        """Return the learned interaction between output variables as a matrix, for pictures."""


class LabelInteractionEnergy(EnergyNetwork):
    """Multi-label SPEN energy, `E = - y^T (b(x) + c) + v^T softplus(M y)`.

    Belanger and McCallum (2016); arXiv 2211.11649, Section 4. `b` is a feature network of the
    energy's own, `c` a bias per label that stays trainable when `b` is frozen.

    Args:
        feature_network: `inputs -> b(x)` of shape (B, L).
        num_labels: L.
        num_units: M, rows of the interaction matrix.
    """

    def __init__(self, feature_network: nn.Module, num_labels: int, num_units: int) -> None:
        super().__init__(feature_network)
        self.label_bias = nn.Parameter(torch.zeros(num_labels))
        self.M = nn.Parameter(torch.randn(num_units, num_labels) / math.sqrt(num_labels))
        self.v = nn.Parameter(torch.zeros(num_units))

    def global_energy(self, y: Tensor) -> Tensor:
        """Return `v^T softplus(M y)` per example."""
        return F.softplus(y @ self.M.T) @ self.v

    def score(self, potentials: Tensor, y: Tensor) -> Tensor:
        """Return energies (B,) of y (B, L), or (S, B) of y (S, B, L)."""
        local = potentials + self.label_bias
        return self.global_energy(y) - (y * local).sum(-1)

    def interaction(self) -> Tensor:
        """Return the Hessian of the global term at y = 0, `M^T diag(v / 4) M`: (L, L)."""
        return (self.M.T * (self.v / 4.0)) @ self.M


class TaggingEnergy(EnergyNetwork):
    """A tagging energy, `E = - sum_t y_t . (b(x,t) + c) + global_energy(y)`.

    `b` is a tagging network of the energy's own, `c` a bias per tag that stays trainable when `b`
    is frozen. What a subclass adds sees y alone.

    Args:
        feature_network: `inputs -> b(x)` of shape (B, T, K).
        num_tags: K.
    """

    def __init__(self, feature_network: nn.Module, num_tags: int) -> None:
        super().__init__(feature_network)
        self.label_bias = nn.Parameter(torch.zeros(num_tags))

    @abstractmethod
    def global_energy(self, y: Tensor) -> Tensor:
        """Return the energy of the interaction, (B,) of y (B, T, K) or (S, B) of (S, B, T, K).

        Padding needs no mask of its own: `y` is zero there, and must enter every term as a factor.
        """

    def score(self, potentials: Tensor, y: Tensor) -> Tensor:
        """Return energies (B,) of y (B, T, K), or (S, B) of y (S, B, T, K)."""
        local = potentials + self.label_bias
        return self.global_energy(y) - (y * local).sum((-1, -2))


class LinearChainEnergy(TaggingEnergy):
    """Linear chain, `global_energy = - sum_t y_{t-1}^T W y_t`.

    Tu and Gimpel (2018); arXiv 2211.11649, Section 4. `W[i, j]` is the score of tag j after tag i.

    Args:
        feature_network: `inputs -> potentials` of shape (B, T, K).
        num_tags: K.
    """

    def __init__(self, feature_network: nn.Module, num_tags: int) -> None:
        super().__init__(feature_network, num_tags)
        self.W = nn.Parameter(torch.zeros(num_tags, num_tags))

    def global_energy(self, y: Tensor) -> Tensor:
        """See `TaggingEnergy.global_energy`."""
        return -((y[..., :-1, :] @ self.W) * y[..., 1:, :]).sum((-1, -2))

    def gibbs_nll(self, potentials: Tensor, mask: Tensor, y: Tensor) -> Tensor:
        """Return `-log p(y | x)` of gold y (B, T, K), p proportional to exp(-E): (B,)."""
        return chain_nll(potentials + self.label_bias, self.W, mask, y)

    def minimum(self, potentials: Tensor, mask: Tensor) -> Tensor:
        """Return the discrete structure of lowest energy, one-hot (B, T, K)."""
        return best_chain(potentials + self.label_bias, self.W, mask)

    def interaction(self) -> Tensor:
        """Return the transition scores W, (K, K): row the previous tag, column the next."""
        return self.W
