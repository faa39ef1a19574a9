"""Inner and outer loss as functions of both players' parameters, whole or in parts."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from ispen_dist import objectives
from ispen_dist.data.batch import Batch
from ispen_dist.engine import Engine, Engines
from ispen_dist.graphs.compiler import Compiler
from ispen_dist.inference import outer_view
from ispen_dist.linalg import trees
from ispen_dist.linalg.operators import ComposedLoss, Loss
from ispen_dist.linalg.reduction import LossValue
from ispen_dist.linalg.staged_operators import StagedLoss
from ispen_dist.linalg.trees import Tree
from ispen_dist.players import LOCAL, Players, is_local


class Losses:
    """Inner and outer loss of both players at batches of this rank, in the two forms they take.

    *Graph*: functions of whole trees, for `hypergradient`; every rank holds all parameters.
    *Staged*: for `staged_hypergradient`; parameters may be sharded.

    Args:
        players: both networks.
        engines: where their parameters are.
    """

    def __init__(self, players: Players, engines: Engines) -> None:
        self._players, self._engines = players, engines
        self._config = players.config

    def theta(self) -> Tree:
        """Return own parts of the trained parameters of the inference network."""
        engine = self._engines.inference_net
        return {n: p for n, p in engine.parameters().items() if n not in engine.frozen}

    def phi(self) -> Tree:
        """Return own parts of the parameters of the energy that the outer problem learns."""
        return self._engines.energy.parameters(self._learned)

    @property
    def _learned(self) -> list[str]:
        return list(self._players.phi)

    def inner_output(self, batch: Batch, logits: Tensor, b: Tensor, head: Tree) -> LossValue:
        """Return G given logits, potentials and head."""
        view = self._players.view(batch, logits, b, head)
        return objectives.inner(view, self._config.inner.energy_weight)

    def outer_output(
        self, batch: Batch, logits: Tensor, b: Tensor, head: Tree, generator: torch.Generator
    ) -> LossValue:
        """Return L given logits, potentials and head."""
        view = outer_view(self._players, batch, logits, b, head, generator)
        return objectives.outer(view, self._config.outer.objective, self._config.outer.task_weight)

    # -- graph -----------------------------------------------------------------------------------

    def inner_graph(self, batch: Batch) -> ComposedLoss:
        """Return G with dropout as in the inner steps."""
        energy = self._whole_energy()

        def output_loss(logits: Tensor, phi: Tree) -> LossValue:
            phi = energy | phi
            return self.inner_output(batch, logits, self._players.potentials(batch, phi), phi)

        return ComposedLoss(self._model(batch, training=True), output_loss)

    def outer_graph(self, batch: Batch, generator: torch.Generator) -> Loss:
        """Return L with or without dropout."""
        model = self._model(batch, training=self._config.outer.dropout)
        energy = self._whole_energy()

        def loss(theta: Tree, phi: Tree) -> LossValue:
            phi = energy | phi
            b = self._players.potentials(batch, phi)
            return self.outer_output(batch, model(theta), b, phi, generator)

        return loss

    def _whole_energy(self) -> Tree:
        return trees.detached(self._engines.energy.parameters())

    def _model(self, batch: Batch, *, training: bool) -> Callable[[Tree], Tensor]:
        engine = self._engines.inference_net
        frozen = trees.detached(engine.parameters(engine.frozen)) if engine.frozen else {}

        def model(theta: Tree) -> Tensor:
            network = self._players.inference_net
            network.train(training)
            return functional_call(network, theta | frozen, (batch.inputs,))

        return model

    # -- staged ----------------------------------------------------------------------------------

    def inner_staged(
        self,
        batch: Batch,
        *,
        training: bool = True,
        dtype: torch.dtype | None = None,
        compiler: Compiler | None = None,
    ) -> StagedLoss:
        """Return G, in another type than the parameters have where one is given.

        With a compiler the passes through its stages are compiled, each by itself.
        """
        config = self._config.solver
        model = self._engines.inference_net.staged(
            batch.inputs,
            training=training,
            keep_states=config.memory != "recompute",
            prefetch=config.prefetch,
            dtype=dtype,
            compiler=compiler,
        )

        def output_loss(logits: Tensor, psi: Tree, data: Mapping[str, Tensor]) -> LossValue:
            return self.inner_output(Batch.of(data), logits, psi[POTENTIALS], psi)

        return StagedLoss(
            model,
            output_loss,
            self._potentials(batch, dtype),
            "inner_loss",
            batch.tensors(),
            ("inner_loss", self),
        )

    def outer_staged(
        self, batch: Batch, generator: torch.Generator, compiler: Compiler | None = None
    ) -> StagedLoss:
        """Return L; with a compiler as `inner_staged`."""
        model = self._engines.inference_net.staged(
            batch.inputs,
            training=self._config.outer.dropout,
            prefetch=self._config.solver.prefetch,
            compiler=compiler,
        )

        def output_loss(logits: Tensor, psi: Tree, data: Mapping[str, Tensor]) -> LossValue:
            return self.outer_output(Batch.of(data), logits, psi[POTENTIALS], psi, generator)

        return StagedLoss(
            model, output_loss, self._potentials(batch, None), "outer_loss", batch.tensors()
        )

    def energy_gradient(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tree]:
        """Return L and d_phi L where the structure is inferred from the energy, without theta."""
        loss = self.outer_staged(batch, generator)
        # Whatever z is, the inferred logits take its place.
        output = loss.at(loss.potentials.psi[POTENTIALS], create_graph=False)
        psi_bar = {key: value for key, value in output.gradient.items() if key != "z"}
        return output.value, loss.potentials.pull_back(psi_bar)

    def _potentials(self, batch: Batch, dtype: torch.dtype | None) -> "EnergyPotentials":
        return EnergyPotentials(self._engines.energy, self._learned, batch, dtype)


POTENTIALS = "potentials"
"""Key of the local potentials in psi; the others are names of head parameters."""


class EnergyPotentials:
    """What a loss reads of the energy at one batch, and the way back; see `Potentials`.

    Args:
        engine: of the energy.
        learned: names of the parameters that a gradient is wanted for.
        batch: this rank's examples.
        dtype: another type than the parameters have.
    """

    def __init__(
        self, engine: Engine, learned: Sequence[str], batch: Batch, dtype: torch.dtype | None
    ) -> None:
        self._layout, self._learned = engine.layout, learned
        self._learns_local = any(is_local(name) for name in learned)
        self._features = engine.staged(
            batch.inputs,
            part=LOCAL.removesuffix("."),
            keep_states=self._learns_local,
            dtype=dtype,
        )
        head = [n for n, _ in engine.network.named_parameters() if not is_local(n)]
        self.psi = {POTENTIALS: self._features.value()} | {
            n: p if dtype is None else p.to(dtype) for n, p in engine.collect(head).items()
        }

    def pull_back(self, psi_bar: Tree) -> Tree:
        """Return the gradient of the learned parameters as own parts."""
        head = {name: psi_bar[name] for name in self._learned if not is_local(name)}
        result = self._layout.reduce(head)
        if self._learns_local:
            local, _ = self._features.pull_back(psi_bar[POTENTIALS])
            result |= {f"{LOCAL}{name}": part for name, part in local.items()}
        return {name: result[name] for name in self._learned}
