"""The two players of the bilevel problem, and how a batch looks to both."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ispen_dist.config import Config
from ispen_dist.data.batch import Batch
from ispen_dist.data.datasets import Codec
from ispen_dist.engine import Engines
from ispen_dist.linalg.reduction import OneProcess, Reduction
from ispen_dist.linalg.trees import Tree
from ispen_dist.models.energies import EnergyNetwork
from ispen_dist.models.output_spaces import Inputs, OutputSpace
from ispen_dist.models.registry import build_energy, build_network, output_space
from ispen_dist.models.stages import StagedNetwork
from ispen_dist.objectives import Energy, View
from ispen_dist.optim import PRETRAINED
from ispen_dist.replicas import ReplicatedEngine


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
        phi = dict(self.energy.named_parameters())
        return {name: p for name, p in phi.items() if self.learns(name) and p.requires_grad}

    @property
    def local(self) -> Tree:
        """Parameters of the energy's local potentials, which are pre-trained."""
        return {n: p for n, p in self.energy.named_parameters() if is_local(n)}

    def learns(self, name: str) -> bool:
        """Whether the outer problem learns this parameter of the energy."""
        return not (self.config.energy.freeze_local and is_local(name))

    def potentials(self, batch: Batch, phi: Tree | None = None) -> Tensor:
        """Return the energy's local potentials b(x), with phi in place of the module's own."""
        local = {n.removeprefix(LOCAL): p for n, p in (phi or {}).items() if is_local(n)}
        self.energy.eval()
        return functional_call(self.energy.feature_network, local, (batch.inputs,))

    def with_networks(self, inference_net: nn.Module, energy: nn.Module) -> "Players":
        """Return the same problem with other definitions of the networks."""
        assert isinstance(energy, EnergyNetwork)
        return replace(self, inference_net=inference_net, energy=energy)

    def view(
        self,
        batch: Batch,
        logits: Tensor,
        potentials: Tensor,
        head: Tree | None = None,
        generator: torch.Generator | None = None,
    ) -> View:
        """Return the batch as the objectives see it.

        Args:
            batch: this rank's examples.
            logits: output of the inference network on them; where it has two heads, those of the
                prediction first.
            potentials: b(x) of the energy on them, see `potentials`.
            head: interaction parameters in place of the module's own; others are ignored.
            generator: draws samples.
        """
        y = self.space.encode(batch.target, batch.inputs, logits.dtype)
        predicted, *augmented = logits.split(y.shape[-1], dim=-1)
        return View(
            space=self.space,
            inputs=batch.inputs,
            y=y,
            weight=batch.weight,
            logits=predicted,
            energy=self.energy_at(potentials, head),
            augmented=augmented[0] if augmented else None,
            gibbs_nll=lambda: self._call("gibbs_nll", head, potentials, batch.inputs["mask"], y),
            generator=generator,
            num_samples=self.config.outer.num_samples,
            margin_scale=self.config.outer.margin_scale,
            score_scale=self.config.outer.score_scale,
            fixed_task_weight=self.config.inner.fixed_task_weight,
        )

    def energy_at(self, potentials: Tensor, head: Tree | None = None) -> Energy:
        """Return the energy of structures at given potentials; `head` as in `view`."""
        return lambda y: self._call("score", head, potentials, y)

    def minimum(self, inputs: Inputs, potentials: Tensor, head: Tree | None = None) -> Tensor:
        """Return the encoded discrete structures of lowest energy, of an energy that knows them."""
        return self._call("minimum", head, potentials, inputs["mask"])

    def interaction(self, head: Tree) -> Tensor:
        """Return `EnergyNetwork.interaction` of a head."""
        return self._call("interaction", head)

    def _call(self, name: str, head: Tree | None, *arguments: Tensor) -> Tensor:
        """Call a method of the energy with a head in place of its own."""
        return functional_call(_Method(self.energy, name), self._head_of(head or {}), arguments)

    def _head_of(self, tree: Tree) -> Tree:
        names = (n for n, _ in self.energy.named_parameters() if not is_local(n))
        return {f"energy.{name}": tree[name] for name in names if name in tree}


LOCAL = "feature_network."


def is_local(name: str) -> bool:
    """Whether a parameter of an energy belongs to its local potentials."""
    return name.startswith(LOCAL)


class _Method(nn.Module):
    """A method of an energy that reads its head alone, as a module for `functional_call`."""

    def __init__(self, energy: EnergyNetwork, name: str) -> None:
        super().__init__()
        self.energy, self.name = energy, name

    def forward(self, *arguments: Tensor) -> Tensor:
        return getattr(self.energy, self.name)(*arguments)


def build_players(config: Config, codec: Codec, device: torch.device) -> Players:
    """Build both networks; initial values depend on `train.seed` alone."""
    torch.manual_seed(config.train.seed)
    dtype = torch.float64 if config.train.dtype == "float64" else torch.float32
    heads = config.inference.num_heads
    inference_net = build_network(config.inference_net, codec, heads).to(device, dtype)
    energy = build_energy(config.energy, codec).to(device, dtype)
    energy.eval()
    space = output_space(codec, config.outer.entity_weight)
    return Players(inference_net, energy, space, config)


def load_pretrained(players: Players) -> None:
    """Read the weights of pretrained encoders, where there are any, into both networks.

    Raises:
        ConfigError: where they are not there.
    """
    for network in networks_of(players).values():
        for module in network.modules():
            if isinstance(module, StagedNetwork):
                module.load_pretrained()


def networks_of(players: Players) -> dict[str, nn.Module]:
    """Return both networks by name."""
    return {"inference_net": players.inference_net, "energy": players.energy}


def groups_of(network: nn.Module) -> dict[str, list[str]]:
    """Return names of trainable parameters by group.

    The groups are `new`, in an energy `local` and `head`, and `pretrained` where an encoder has
    such layers; that of an energy is local too.
    """
    pretrained = tuple(
        f"{prefix}.{name}." if prefix else f"{name}."
        for prefix, module in network.named_modules()
        if isinstance(module, StagedNetwork)
        for name in module.pretrained
    )
    groups: dict[str, list[str]] = {}
    for name, p in network.named_parameters():
        if not p.requires_grad:
            continue
        if pretrained and name.startswith(pretrained):
            group = PRETRAINED
        elif isinstance(network, EnergyNetwork):
            group = "local" if is_local(name) else "head"
        else:
            group = "new"
        groups.setdefault(group, []).append(name)
    return groups


def replicated(players: Players, reduction: Reduction | None = None) -> Engines:
    """Return the engines of players whose networks hold their own parameters."""
    reduction = reduction or OneProcess()
    networks: tuple[nn.Module, nn.Module] = (players.inference_net, players.energy)
    return Engines(*(ReplicatedEngine(net, groups_of(net), reduction) for net in networks))
