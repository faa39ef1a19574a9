"""A stage as compiled phases, shared by all stages of the same structure and shapes.

Which phases there are depends on what is wanted (`KINDS`): the value alone, the gradient, an exact
Hessian product, or a Gauss-Newton product. See `phases` for when each runs, `linalg.stages` for the
notation.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ispen_dist.graphs.compiler import Compiled, Compiler, spec_of
from ispen_dist.graphs.phases import Phase, outputs_of, split
from ispen_dist.graphs.program import recorded_as
from ispen_dist.graphs.tracing import Draw, Traced, refusing_data_dependence, trace
from ispen_dist.linalg.staged import StagedFunction
from ispen_dist.linalg.stages import Stage, State, grad, leaves, materialised
from ispen_dist.linalg.trees import Tree

VALUE, GRADIENT, TANGENT, PRODUCT = 1, 2, 3, 4
"""Phases: the stage's value, its pull-back, its tangent, the tangent of its pull-back."""


@dataclass(frozen=True)
class StageGraph:
    """The phases of one stage, compiled.

    Attributes:
        phases: by number.
        functions: by number.
        inputs: names and strides of the graph's own inputs, by the phase that first knows them.
        draws: masks, which are inputs of the first phase too, after the others.
    """

    phases: dict[int, Phase]
    functions: dict[int, Compiled]
    inputs: dict[int, tuple[tuple[str, tuple[int, ...]], ...]]
    draws: tuple[Draw, ...]


class StagePoint:
    """A stage at one point of a solve: what its phases leave for each other.

    Args:
        graph: compiled phases.
    """

    def __init__(self, graph: StageGraph) -> None:
        self._graph = graph
        self._solve: dict[str, Tensor] = {}
        self._product: dict[str, Tensor] = {}

    @property
    def num_masks(self) -> int:
        """Masks that the stage draws."""
        return len(self._graph.draws)

    def value(
        self, p: list[Tensor], inputs: list[Tensor], s: State, masks: list[Tensor] | None = None
    ) -> State:
        """Return the next state; without masks given, draws those of the whole solve."""
        if masks is None:
            masks = [draw() for draw in self._graph.draws]
        return self._run(VALUE, self._solve, [*p, *inputs, *s, *masks])

    def pull_back(self, a: State) -> State:
        """Return the cotangents of trained parameters and state, once per solve."""
        result = self._run(GRADIENT, self._solve, a)
        self._keep_for(TANGENT, PRODUCT)
        return result

    def tangent(self, v: list[Tensor], s_dot: State) -> State:
        """Return the tangent of the next state."""
        self._product = dict(self._solve)
        return self._run(TANGENT, self._product, [*v, *s_dot])

    def product(self, a_dot: State) -> State:
        """Return the tangents of both cotangents, after `tangent` in the same direction."""
        result = self._run(PRODUCT, self._product, a_dot)
        self.forget_tangent()
        return result

    def forget_tangent(self) -> None:
        """Let go of what a tangent left for the product."""
        self._product = {}

    def _run(self, number: int, known: dict[str, Tensor], fresh: State | list[Tensor]) -> State:
        phase = self._graph.phases[number]
        for (name, stride), x in zip(self._graph.inputs.get(number, ()), fresh, strict=True):
            known[name] = as_traced(x, stride)
        results = self._graph.functions[number](*(known[name] for name in phase.reads))
        known.update(zip(phase.leaves, results[phase.num_results :], strict=True))
        return tuple(results[: phase.num_results])

    def _keep_for(self, *numbers: int) -> None:
        phases = (self._graph.phases[n] for n in numbers if n in self._graph.phases)
        read = {name for phase in phases for name in phase.reads}
        self._solve = {name: x for name, x in self._solve.items() if name in read}


def as_traced(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return a tensor that lies in memory as the compiled code expects."""
    if isinstance(x, fx.Proxy):
        return recorded_as(x, stride)
    if x.stride() == stride:
        return x
    return torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device).copy_(x)


# -- what is traced ------------------------------------------------------------------------------


class _Flat:
    """The inputs of a stage's graph as one list, and back.

    Args:
        stage: gives names and inputs.
        frozen: names of constant parameters.
        num_state: tensors in the state before the stage.
        num_next: tensors in the state after it.
    """

    def __init__(self, stage: Stage, frozen: frozenset[str], num_state: int, num_next: int) -> None:
        self.stage, self.num_state, self.num_next = stage, num_state, num_next
        self.trained = [key for key in stage.keys if key not in frozen]

    def groups(self, kind: str) -> list[tuple[int, int]]:
        """Return (number of tensors, phase) of the groups of inputs."""
        first = len(self.stage.keys) + len(self.stage.inputs) + self.num_state
        groups = [(first, VALUE)]
        if kind != "value":
            groups += [(self.num_next, GRADIENT)]
        if kind not in ("value", "gradient"):
            groups += [(len(self.trained) + self.num_state, TANGENT), (self.num_next, PRODUCT)]
        return groups

    def apply(self, tensors: Iterator[Tensor]) -> tuple[list[Tensor], State]:
        """Apply the stage to the head of the list; returns what is differentiated, and f."""
        p: Tree = dict(zip(self.stage.keys, tensors, strict=False))
        p |= {key: p[key].detach().requires_grad_() for key in self.trained}
        inputs = dict(zip(self.stage.inputs, tensors, strict=False))
        s = leaves(take(tensors, self.num_state))
        f = self.stage.function(p, inputs, s)
        return [*(p[key] for key in self.trained), *s], f


def take(tensors: Iterator[Tensor], number: int) -> State:
    """Return the next tensors of a list."""
    return tuple(next(tensors) for _ in range(number))


def _gradient(flat: _Flat, tensors: Iterator[Tensor]) -> list[State]:
    x, f = flat.apply(tensors)
    a = take(tensors, flat.num_next)
    return [f, materialised(grad(f, x, a, create_graph=True), x)]


def _hessian(flat: _Flat, tensors: Iterator[Tensor]) -> list[State]:
    x, f = flat.apply(tensors)
    a = leaves(take(tensors, flat.num_next))
    x_dot, a_dot = take(tensors, len(x)), take(tensors, flat.num_next)
    k = materialised(grad(f, x, a, create_graph=True), x)
    f_dot = materialised(grad(k, a, x_dot, create_graph=True), f)
    # One sweep backwards for all that reaches x: through k at fixed a, and through f with a_dot.
    k_dot = materialised(grad((*k, *f), x, (*x_dot, *a_dot), create_graph=True), x)
    return [f, k, f_dot, k_dot]


def _gauss_newton(flat: _Flat, tensors: Iterator[Tensor]) -> list[State]:
    x, f = flat.apply(tensors)
    a = leaves(take(tensors, flat.num_next))
    x_dot, a_dot = take(tensors, len(x)), take(tensors, flat.num_next)
    k = materialised(grad(f, x, a, create_graph=True), x)
    f_dot = materialised(grad(k, a, x_dot, create_graph=True), f)
    return [f, k, f_dot, materialised(grad(f, x, a_dot, create_graph=True), x)]


def _value(flat: _Flat, tensors: Iterator[Tensor]) -> list[State]:
    return [flat.apply(tensors)[1]]


KINDS: dict[str, Callable[[_Flat, Iterator[Tensor]], list[State]]] = {
    "value": _value,
    "gradient": _gradient,
    "hessian": _hessian,
    "gauss_newton": _gauss_newton,
}


def stage_graphs(compiler: Compiler, kind: str, model: StagedFunction) -> list[StageGraph]:
    """Return the phases of every stage of a function, without computing it."""
    graphs: list[StageGraph] = []
    state: State = ()
    for stage in model.stages:
        p = {key: model.parameters[key] for key in stage.keys}
        graphs.append(stage_graph(compiler, kind, stage, model.frozen, p, state))
        phase = graphs[-1].phases[VALUE]
        results = outputs_of(phase.module)[: phase.num_results]
        state = tuple(node.meta["val"] for node in results)
    return graphs


def stage_graph(
    compiler: Compiler, kind: str, stage: Stage, frozen: frozenset[str], p: Tree, s: State
) -> StageGraph:
    """Return the compiled phases of a stage, the same for stages alike.

    Args:
        compiler: remembers them.
        kind: one of `KINDS`.
        stage: at its inputs.
        frozen: names of constant parameters.
        p: whole parameters of the stage.
        s: a state before it, for its shapes.
    """
    tensors = [*p.values(), *stage.inputs.values(), *s]
    which = tuple(key in frozen for key in stage.keys)
    function = stage.function if stage.signature is None else stage.signature()
    key = ("stage", kind, function, which, spec_of(tensors))
    return compiler.once(key, lambda: _build(compiler, kind, stage, frozen, tensors, len(s)))


def _build(
    compiler: Compiler,
    kind: str,
    stage: Stage,
    frozen: frozenset[str],
    tensors: list[Tensor],
    num_state: int,
) -> StageGraph:
    num_p, num_inputs = len(stage.keys), len(stage.inputs)
    f, k = _shapes(stage, frozen, tensors, num_state)
    flat = _Flat(stage, frozen, num_state, len(f))
    # A direction lies in memory as a gradient does: solver vectors are made of gradients.
    examples = [*tensors]
    if kind != "value":
        examples += f
    if kind not in ("value", "gradient"):
        examples += [*k, *tensors[num_p + num_inputs :], *f]

    counts: list[int] = []

    def function(*inputs: Tensor) -> list[Tensor]:
        groups = KINDS[kind](flat, iter(inputs))
        counts[:] = [len(group) for group in groups]
        return [x for group in groups for x in group]

    traced = trace(function, examples, f"stage {stage.name}")
    known = [phase for number, phase in flat.groups(kind) for _ in range(number)]
    known += [VALUE] * len(traced.draws)
    wanted = [i + 1 for i, number in enumerate(counts) for _ in range(number)]
    return assemble(compiler, traced, known, wanted, f"{stage.name} {kind}")


def _shapes(
    stage: Stage, frozen: frozenset[str], tensors: list[Tensor], num_state: int
) -> tuple[State, State]:
    """Return tensors without memory like the next state, and like the parameters' gradients."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(x.detach()) for x in tensors]
    with mode, torch.enable_grad(), refusing_data_dependence(f"stage {stage.name}"):
        flat = _Flat(stage, frozen, num_state, 0)
        x, f = flat.apply(iter(fakes))
        k = materialised(grad(f, x[: len(flat.trained)], f), x[: len(flat.trained)])
    return f, k


def assemble(
    compiler: Compiler, traced: Traced, known: list[int], wanted: list[int], name: str
) -> StageGraph:
    """Split a traced graph into phases and hand each to the compiler."""
    phases = split(traced.module, known, wanted, GRADIENT)
    placeholders = [n for n in traced.module.graph.nodes if n.op == "placeholder"]
    inputs = {
        i: tuple(
            (n.name, n.meta["val"].stride())
            for n, k in zip(placeholders, known, strict=True)
            if k == i
        )
        for i in set(known)
    }
    return StageGraph(
        phases,
        {i: compiler.compile(phase.module, f"{name}, phase {i}") for i, phase in phases.items()},
        inputs,
        traced.draws,
    )
