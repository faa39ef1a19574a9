"""A network as a list of stages, so that curvature can be computed with one stage in memory.

A stage reads the inputs of the batch and the state that the stage before it left, a tuple of
tensors, and returns the next state; the state of the last stage is the output alone. The forward
pass of a `StagedNetwork` is the fold of its stages, so there is one definition of both. What a
stage passes on unchanged, such as the token features of a shortcut, stands in its state.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence

from torch import Tensor, nn
from torch.func import functional_call

from ispen_dist.linalg.stages import Stage, StageError
from ispen_dist.linalg.trees import Tree
from ispen_dist.models.structure import structure

Inputs = Mapping[str, Tensor]
State = tuple[Tensor, ...]


class Part(nn.Module):
    """One stage with the modules whose parameters it reads.

    Args:
        name: for messages.
        function: `(inputs, *state) -> state`; it calls the modules.
        modules: every module with parameters that the function calls.
    """

    def __init__(
        self, name: str, function: Callable[..., State], modules: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self.name = name
        self.function = function
        self.reads = nn.ModuleList(modules)

    def forward(self, inputs: Inputs, *state: Tensor) -> State:
        """Return the next state."""
        return self.function(inputs, *state)


class StagedNetwork(nn.Module, ABC):
    """A network from inputs to one output tensor that is given stage by stage.

    Attributes:
        pretrained: names of the submodules that `load_pretrained` fills.
    """

    pretrained: tuple[str, ...] = ()

    def load_pretrained(self) -> None:
        """Read weights that were learned before; here there are none.

        Raises:
            ConfigError: where they are not there, or are those of another network.
        """

    @abstractmethod
    def parts(self) -> list[Part]:
        """Return the stages in order. Called anew for every pass; keeps no state."""

    def forward(self, inputs: Inputs) -> Tensor:
        """Return the output, the fold of all stages."""
        state: State = ()
        for part in self.parts():
            state = part.function(inputs, *state)
        return state[0]


def parts_of(network: nn.Module) -> list[Part]:
    """Return the stages of a network.

    Raises:
        StageError: where it has no stage list, or leaves parameters out of it.
    """
    if not isinstance(network, StagedNetwork):
        raise StageError(
            f"{type(network).__name__}: expected a StagedNetwork with a list of stages, found "
            "none; derive it from StagedNetwork and define parts()"
        )
    parts = network.parts()
    read = {id(p) for part in parts for p in part.parameters()}
    missing = [name for name, p in network.named_parameters() if id(p) not in read]
    if missing:
        raise StageError(
            f"{type(network).__name__}.parts(): expected every parameter in a stage, "
            f"{', '.join(missing)} in none; name the module in the stage that calls it"
        )
    return parts


def stages_at(network: nn.Module, inputs: Inputs, training: bool) -> list[Stage]:
    """Return the stages of a network as functions of their parameters, at given inputs.

    A parameter that several stages read (tied weights) has one name in all of them.

    Args:
        network: gives the definition; its own parameters are not read.
        inputs: of the batch.
        training: with dropout or without.

    Raises:
        StageError: see `parts_of`.
    """
    names = {id(p): name for name, p in network.named_parameters()}

    def stage_of(part: Part) -> Stage:
        local = {key: names[id(p)] for key, p in part.named_parameters()}

        def function(parameters: Tree, inputs: Inputs, state: State) -> State:
            if network.training != training:
                network.train(training)
            own = {key: parameters[name] for key, name in local.items()}
            return functional_call(part, own, (inputs, *state))

        def signature() -> Hashable:
            return structure((part.function, part.reads)), training

        return Stage(part.name, tuple(local.values()), function, inputs, signature)

    return [stage_of(part) for part in parts_of(network)]
