"""The two players of the bilevel problem, and how a batch looks to both."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ispen_dist.config import Config
from ispen_dist.data.batch import Batch
from ispen_dist.data.datasets import Codec
from ispen_dist.linalg.trees import Tree
from ispen_dist.models.energies import EnergyNetwork
from ispen_dist.models.output_spaces import OutputSpace
from ispen_dist.models.registry import build_energy, build_network, output_space
from ispen_dist.objectives import View


@dataclass(frozen=True)
class Players:
    """The inference network A_theta and the energy E_phi, with their output space.

    Attributes:
        inference_net: `inputs -> logits`.
        energy: `(inputs, y) -> energies`.
        space: the kind of structure.
        config: the run's settings.
    """

    inference_net: nn.Module
    energy: EnergyNetwork
    space: OutputSpace
    config: Config

    @property
    def theta(self) -> Tree:
        """Parameters of the inference network."""
        return dict(self.inference_net.named_parameters())

    @property
    def phi(self) -> Tree:
        """Parameters of the energy that the outer problem learns."""
        return {
            name: parameter
            for name, parameter in self.energy.named_parameters()
            if not (self.config.energy.freeze_local and name.startswith("feature_network."))
        }

    @property
    def local(self) -> Tree:
        """Parameters of the energy's local potentials, which are pre-trained."""
        return {
            name: parameter
            for name, parameter in self.energy.named_parameters()
            if name.startswith("feature_network.")
        }

    def view(
        self,
        batch: Batch,
        logits: Tensor,
        phi: Tree | None = None,
        generator: torch.Generator | None = None,
    ) -> View:
        """Return the batch as the objectives see it.

        Args:
            batch: this rank's examples.
            logits: output of the inference network on them.
            phi: parameters of the energy in place of the module's own.
            generator: draws samples.
        """
        return View(
            space=self.space,
            inputs=batch.inputs,
            y=self.space.encode(batch.target, batch.inputs, logits.dtype),
            weight=batch.weight,
            logits=logits,
            energy=lambda y: functional_call(self.energy, phi or {}, (batch.inputs, y)),
            generator=generator,
            num_samples=self.config.outer.num_samples,
            margin_scale=self.config.outer.margin_scale,
        )


def build_players(config: Config, codec: Codec, device: torch.device) -> Players:
    """Build both networks; initial values depend on `train.seed` alone."""
    torch.manual_seed(config.train.seed)
    dtype = torch.float64 if config.train.dtype == "float64" else torch.float32
    inference_net = build_network(config.inference_net, codec).to(device, dtype)
    energy = build_energy(config.energy, codec).to(device, dtype)
    energy.eval()
    return Players(inference_net, energy, output_space(codec), config)
