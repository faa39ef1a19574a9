"""One network with its optimizer, however its parameters lie over ranks.

First-order steps go through an engine: its forward pass, a backward pass that ends in it, its
reduction and its optimizer. Second-order work, and the network as the other player sees it, use
`network`, `layout` and `parameters` instead: a plain definition without hooks, fed stage by stage
from own parts. The result comes back through `apply`. The engine of replicas is in `replicas.py`,
those of DeepSpeed and FSDP2 are in `ispen_dist.distributed`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ispen_dist.graphs.compiler import Compiler
from ispen_dist.graphs.passes import CompiledPasses
from ispen_dist.linalg.layout import Layout
from ispen_dist.linalg.staged import StagedFunction
from ispen_dist.linalg.trees import Tree, detached
from ispen_dist.models.stages import Inputs, stages_at
from ispen_dist.optim import ADAM_EPSILON, BETA2, Phase

MOMENTS = ("exp_avg", "exp_avg_sq")
"""State of AdamW beside its step, which is the number of steps taken in the phase."""

Groups = Mapping[str, Sequence[str]]


class Engine(ABC):
    """The interface; `begin` must be called before the first step.

    Args:
        network: plain definition of the network, without hooks. Its parameters may lie elsewhere.
        layout: where the parameters are.
        groups: parameter names by group, in the order of the optimizer's groups.

    Attributes:
        replicated: whether every rank holds all parameters, as tensors of `network`.
        num_taken: steps in the present phase, those that were skipped included.
        rate_factor: what learning rates are multiplied with.
    """

    replicated = False
    rate_factor = 1.0

    def __init__(self, network: nn.Module, layout: Layout, groups: Groups) -> None:
        self.network, self.layout, self.groups = network, layout, groups
        self.frozen = frozenset(n for n, p in network.named_parameters() if not p.requires_grad)
        self.num_taken = 0
        self._phase: Phase | None = None

    @property
    def phase(self) -> Phase:
        """The present phase."""
        if self._phase is None:
            raise RuntimeError("Engine.begin: expected a call before the first step, found none")
        return self._phase

    def begin(self, phase: Phase) -> None:
        """Start a phase with fresh optimizer state."""
        self._phase, self.num_taken = phase, 0
        self._forget()

    def learning_rates(self, step: int) -> dict[str, float]:
        """Return the rates of a step of the phase, by name of the groups that it trains."""
        rate = self.rate_factor * self.phase.learning_rate(step)
        return {group: rate * self.phase.factor(group) for group in self.trained_groups}

    def _prepare(self, param_groups: Sequence[dict]) -> None:
        rates, decay = self.learning_rates(self.num_taken), self.phase.config.weight_decay
        for name, group in zip(self.groups, param_groups, strict=True):
            group["lr"] = rates.get(name, 0.0)
            group["weight_decay"] = decay if name in rates else 0.0

    @abstractmethod
    def parameters(self, names: Iterable[str] | None = None) -> Tree:
        """Return own parts of the named parameters, default all, in the precision of curvature."""

    @abstractmethod
    def forward(self, inputs: Inputs) -> Tensor:
        """Run the network in training mode, in a graph that ends in `step`."""

    @abstractmethod
    def step(
        self, total: Tensor, also: Sequence[Tensor], count: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """Update once on the mean of a loss over the global batch.

        Where the gradient or one of the means is not finite, parameters and moments stay as they
        are, on all ranks alike and without asking the host; the step counts as taken.

        Args:
            total: sum of the loss over the rank's examples, with its graph.
            also: further sums to be averaged.
            count: the rank's number of examples.

        Returns:
            The means of `also` over the global batch, and the gradient's norm before clipping,
            which is finite exactly where the step was not skipped.
        """

    @abstractmethod
    def apply(self, gradient: Tree, inputs: Inputs) -> None:
        """Update once with a given global gradient.

        Args:
            gradient: own parts of the phase's parameters; those it lacks stand still.
            inputs: of any batch, for an engine that takes a gradient only after a backward pass.
        """

    @abstractmethod
    def load(self, parameters: Tree) -> None:
        """Set the parameters from own parts."""

    @abstractmethod
    def moments(self) -> dict[str, Tree]:
        """Return own parts of the optimizer's `MOMENTS` of the phase's parameters.

        Empty before the first step of a phase.
        """

    def metric(self) -> Tree | None:
        """Return own parts of AdamW's metric, `(sqrt(v_hat) + eps) / factor`.

        A step is divided by it, where `factor` is that of the parameter group's learning rate. Of
        the phase's parameters, on the device of curvature; None before the first step.
        """
        second = self.moments().get("exp_avg_sq")
        if second is None:
            return None
        correction = 1.0 - BETA2**self.num_taken
        groups = self.trained_groups.items()
        factors = {name: self.phase.factor(group) for group, names in groups for name in names}
        return {
            name: ((second[name].to(own) / correction).sqrt() + ADAM_EPSILON) / factors[name]
            for name, own in detached(self.parameters(second)).items()
        }

    @abstractmethod
    def load_moments(self, moments: Mapping[str, Tree], num_taken: int) -> None:
        """Set the optimizer's state after `num_taken` steps of the present phase."""

    @abstractmethod
    def _forget(self) -> None:
        """Reset the optimizer's state."""

    def whole(self, tree: Tree) -> Iterator[tuple[str, Tensor]]:
        """Yield whole tensors from own parts, one at a time; all ranks call it."""
        for name, part in tree.items():
            yield name, self.layout.gather([{name: part}])()[0][name].detach()

    def collect(self, names: Sequence[str]) -> Tree:
        """Return whole tensors of a few parameters on every rank, as constants."""
        return detached(self.layout.gather([self.parameters(names)])()[0])

    def staged(
        self,
        inputs: Inputs,
        *,
        part: str = "",
        training: bool = False,
        keep_states: bool = True,
        prefetch: bool = False,
        dtype: torch.dtype | None = None,
        compiler: Compiler | None = None,
    ) -> StagedFunction:
        """Return the network, or a submodule, at given inputs as a function of own parts.

        Args:
            inputs: of the rank's batch.
            part: dotted name of a submodule, whose parameters lose that prefix.
            training: with dropout or without.
            keep_states: see `StagedFunction`.
            prefetch: see `StagedFunction`.
            dtype: another type for parameters than that of curvature.
            compiler: of the passes through a stage; None runs them as they are.
        """
        prefix = f"{part}." if part else ""
        names = [n for n, _ in self.network.named_parameters() if n.startswith(prefix)]
        own = {
            n.removeprefix(prefix): p if dtype is None else p.to(dtype)
            for n, p in self.parameters(names).items()
        }
        frozen = frozenset(n.removeprefix(prefix) for n in self.frozen if n.startswith(prefix))
        return StagedFunction(
            stages_at(self.network.get_submodule(part), inputs, training),
            self.layout.of(prefix),
            own,
            frozen=frozen,
            passes=None if compiler is None else CompiledPasses(compiler, frozen),
            keep_states=keep_states,
            prefetch=prefetch,
        )

    @property
    def trained_groups(self) -> dict[str, Sequence[str]]:
        """Parameter names of the groups that the present phase trains."""
        return {g: names for g, names in self.groups.items() if g in self.phase.groups}

    @property
    def trained_names(self) -> list[str]:
        """Names of the parameters that the present phase trains, in the order of the groups."""
        return [name for names in self.trained_groups.values() for name in names]


def copy_into(targets: Tree, values: Tree) -> None:
    """Copy values into tensors of the same names.

    Raises:
        ValueError: for other names or shapes, before anything is written.
    """
    for name, target in targets.items():
        if name not in values:
            raise ValueError(f"parameter {name}: expected a value, found none")
        if values[name].shape != target.shape:
            raise ValueError(
                f"parameter {name}: expected shape {tuple(target.shape)}, found "
                f"{tuple(values[name].shape)}; resume with the configuration that was saved"
            )
    for name, target in targets.items():
        target.copy_(values[name])


@dataclass(frozen=True)
class Engines:
    """Both networks as engines.

    Attributes:
        inference_net: of theta.
        energy: of phi.
    """

    inference_net: Engine
    energy: Engine

    def items(self) -> Iterator[tuple[str, Engine]]:
        """Yield name and engine of both."""
        yield "inference_net", self.inference_net
        yield "energy", self.energy
