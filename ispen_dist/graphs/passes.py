"""The passes through one stage, compiled: for parameters that are gathered stage by stage.

Each pass of `linalg.stages.EagerPasses` as one compiled function, shared by stages alike. Nothing
is kept between passes; where every rank holds all parameters, `operators` keeps more and computes
less.
"""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ispen_dist.graphs.compiler import Compiled, Compiler, spec_of
from ispen_dist.graphs.tracing import Draw, trace
from ispen_dist.linalg.stages import EagerPasses, PartialState, Stage, State, materialised
from ispen_dist.linalg.trees import Tree


class CompiledPasses:
    """See `linalg.stages.Passes`.

    Args:
        compiler: remembers compiled passes.
        frozen: names of parameters that are constants.
    """

    def __init__(self, compiler: Compiler, frozen: frozenset[str] = frozenset()) -> None:
        self._compiler, self._frozen = compiler, frozen

    def value(self, stage: Stage, p: Tree, s: State) -> State:
        """See `Passes.value`."""
        return self._run("value", stage, p, s)

    def tangent(
        self, stage: Stage, p: Tree, v: Tree, s: State, s_dot: State
    ) -> tuple[State, State]:
        """See `Passes.tangent`."""
        return self._run("tangent", stage, p, v, s, s_dot)

    def pull_back(self, stage: Stage, p: Tree, s: State, a: State) -> tuple[Tree, State]:
        """See `Passes.pull_back`."""
        return self._run("pull_back", stage, p, s, a)

    def forward(
        self, stage: Stage, p: Tree, v: Tree, s: State, s_dot: State, a: State
    ) -> tuple[Tree, PartialState, State]:
        """See `Passes.forward`."""
        return self._run("forward", stage, p, v, s, s_dot, a)

    def backward(
        self, stage: Stage, p: Tree, v: Tree, s: State, s_dot: State, a: State, a_dot: State
    ) -> tuple[Tree, State, State]:
        """See `Passes.backward`."""
        return self._run("backward", stage, p, v, s, s_dot, a, a_dot)

    def _run(self, name: str, stage: Stage, *groups: Tree | State) -> Any:
        """Call a compiled pass; masks are drawn here, from the state that the caller has set."""
        numbers = {key: str(i) for i, key in enumerate(stage.keys)}
        tensors, layout = pytree.tree_flatten(
            [list(stage.inputs.values()), *(_renamed(group, numbers) for group in groups)]
        )
        which = tuple(key in self._frozen for key in stage.keys)
        function = stage.function if stage.signature is None else stage.signature()
        key = ("pass", name, function, which, str(layout), spec_of(tensors))
        built = self._compiler.once(key, lambda: self._build(name, stage, tensors, layout))
        results = built.function(*tensors, *(draw() for draw in built.draws))
        names = {number: key for key, number in numbers.items()}
        result = tuple(
            _renamed(group, names) for group in pytree.tree_unflatten(list(results), built.form)
        )
        return result[0] if name == "value" else result

    def _build(self, name: str, stage: Stage, tensors: list[Tensor], layout: Any) -> "_Built":
        names = {str(i): key for i, key in enumerate(stage.keys)}
        numbers = {key: number for number, key in names.items()}
        eager = EagerPasses(self._frozen)
        forms: list[Any] = []

        def function(*flat: Tensor) -> list[Tensor]:
            inputs, *groups = pytree.tree_unflatten(list(flat), layout)
            at = replace(stage, inputs=dict(zip(stage.inputs, inputs, strict=True)))
            trees = [_renamed(group, names) for group in groups]
            result: Any = getattr(eager, name)(at, *trees)
            result = (result,) if name == "value" else result
            if name == "forward":
                result = (result[0], materialised(result[1], groups[2]), result[2])
            results = [_renamed(group, numbers) for group in result]
            leaves, form = pytree.tree_flatten(results)
            forms.append(form)
            return leaves

        traced = trace(function, tensors, f"stage {stage.name}")
        compiled = self._compiler.compile(traced.module, f"{stage.name} {name}")
        return _Built(compiled, traced.draws, forms[0])


@dataclass(frozen=True)
class _Built:
    """A compiled pass, the masks it takes after its inputs, and the form of its result."""

    function: Compiled
    draws: tuple[Draw, ...]
    form: Any


def _renamed(group: Tree | State, names: dict[str, str]) -> Tree | State:
    """Return a tree under other names; a state has none."""
    if isinstance(group, dict):
        return {names[key]: value for key, value in group.items()}
    return tuple(group)
