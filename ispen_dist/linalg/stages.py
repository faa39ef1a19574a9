"""One stage of a function, and the passes through it by reverse mode alone.

With a stage f(p, s), p its parameters and s the state before it, and a cotangent a of its output,
let  k(p, s, a) = <a, f(p, s)>. Then

    grad_p k, grad_s k                                 the pull-back of a
    w = <grad_p k, v> + <grad_s k, sdot> + <f, adot>   a scalar, in a direction (v, sdot, adot)
    grad_a w (with adot = 0)  = fdot                   the tangent
    grad_p w, grad_s w                                 tangents of grad_p k and grad_s k

so two backward passes give what the R-operator (Pearlmutter 1994) needs, through any layer that
has a second derivative in reverse mode. w itself is never formed: the second pass starts at
grad_p k, grad_s k and f with the cotangents v, sdot and adot.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ispen_dist.linalg.trees import Tree, as_leaves

State = tuple[Tensor, ...]
PartialState = tuple[Tensor | None, ...]


class StageError(ValueError):
    """A network cannot be computed stage by stage, compiled, or differentiated twice."""


@dataclass(frozen=True)
class Stage:
    """One stage at given inputs.

    Attributes:
        name: for messages.
        keys: names of the parameters it reads, in the tree of the whole network.
        function: `(parameters, inputs, state) -> next state`, with whole tensors under `keys`.
        inputs: of the batch.
        signature: returns a value that is equal for stages that are the same function of
            parameters, inputs and state but for the names of their parameters, so that they share
            one compiled form; None where the function is like no other.
    """

    name: str
    keys: tuple[str, ...]
    function: Callable[[Tree, Mapping[str, Tensor], State], State]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    signature: Callable[[], Hashable] | None = None

    def apply(self, parameters: Tree, state: State) -> State:
        """Return the next state."""
        return self.function(parameters, self.inputs, state)


class Passes(Protocol):
    """The passes through one stage; each applies it once.

    Throughout, `p` holds whole parameters of the stage, `v` a direction of those that are
    differentiated, `s` the state before the stage, `a` a cotangent of the state after it, and
    `_dot` marks tangents.
    """

    def value(self, stage: Stage, p: Tree, s: State) -> State:
        """Return the next state."""
        ...

    def tangent(
        self, stage: Stage, p: Tree, v: Tree, s: State, s_dot: State
    ) -> tuple[State, State]:
        """Return the next state and its tangent."""
        ...

    def pull_back(self, stage: Stage, p: Tree, s: State, a: State) -> tuple[Tree, State]:
        """Return the cotangents of parameters and state."""
        ...

    def forward(
        self, stage: Stage, p: Tree, v: Tree, s: State, s_dot: State, a: State
    ) -> tuple[Tree, PartialState, State]:
        """Return tangents of the cotangents of parameters and state at fixed `a`, and `fdot`."""
        ...

    def backward(
        self, stage: Stage, p: Tree, v: Tree, s: State, s_dot: State, a: State, a_dot: State
    ) -> tuple[Tree, State, State]:
        """Return the tangent of the parameters' cotangent, the state's cotangent, its tangent."""
        ...


class EagerPasses:
    """The passes by autograd; a pass frees its graph when it returns.

    Args:
        frozen: names of parameters that are constants: no gradient, no direction.
    """

    def __init__(self, frozen: frozenset[str] = frozenset()) -> None:
        self._frozen = frozen

    def value(self, stage: Stage, p: Tree, s: State) -> State:
        """See `Passes.value`."""
        return stage.apply(p, s)

    def tangent(
        self, stage: Stage, p: Tree, v: Tree, s: State, s_dot: State
    ) -> tuple[State, State]:
        """See `Passes.tangent`."""
        p, s = as_leaves(p), leaves(s)
        f = stage.apply(p, s)
        a = tuple(torch.zeros_like(x).requires_grad_() for x in f)
        k = self._first(p, s, f, a)
        tangent = _second(stage, k, (*v.values(), *s_dot), a)
        return constants(f), materialised(tangent, a)

    def pull_back(self, stage: Stage, p: Tree, s: State, a: State) -> tuple[Tree, State]:
        """See `Passes.pull_back`."""
        p, s = as_leaves(p), leaves(s)
        theta = self._trained(p)
        grads = grad(stage.apply(p, s), [*theta.values(), *s], a)
        return _split(theta, materialised(grads, [*theta.values(), *s]))

    def forward(
        self, stage: Stage, p: Tree, v: Tree, s: State, s_dot: State, a: State
    ) -> tuple[Tree, PartialState, State]:
        """See `Passes.forward`."""
        p, s, a = as_leaves(p), leaves(s), leaves(a)
        k = self._first(p, s, stage.apply(p, s), a)
        theta = self._trained(p)
        grads = _second(stage, k, (*v.values(), *s_dot), [*theta.values(), *s, *a])
        end = len(theta) + len(s)
        of_theta, _ = _split(theta, materialised(grads[: len(theta)], theta.values()))
        return of_theta, grads[len(theta) : end], materialised(grads[end:], a)

    def backward(
        self, stage: Stage, p: Tree, v: Tree, s: State, s_dot: State, a: State, a_dot: State
    ) -> tuple[Tree, State, State]:
        """See `Passes.backward`."""
        p, s = as_leaves(p), leaves(s)
        f = stage.apply(p, s)
        theta = self._trained(p)
        k = self._first(p, s, f, a)
        inputs = [*theta.values(), *s]
        grads = _second(stage, (*k, *f), (*v.values(), *s_dot, *a_dot), inputs)
        of_theta, dot = _split(theta, materialised(grads, inputs))
        return of_theta, constants(k[len(theta) :]), dot

    def _first(self, p: Tree, s: State, f: State, a: State) -> State:
        """Return grad_p k and grad_s k with their graph."""
        inputs = [*self._trained(p).values(), *s]
        return materialised(grad(f, inputs, a, create_graph=True), inputs)

    def _trained(self, p: Tree) -> Tree:
        return {k: v for k, v in p.items() if k not in self._frozen}


def _second(
    stage: Stage, outputs: State, cotangents: State, inputs: Sequence[Tensor]
) -> PartialState:
    try:
        return grad(outputs, inputs, cotangents)
    except RuntimeError as error:
        if not re.search("not implemented|differentiable", str(error)):
            raise
        raise StageError(
            f"stage {stage.name}: expected layers that can be differentiated twice, "
            f"found: {error}; write the layer in plain operations, or disable its fused kernel"
        ) from error


def _split(theta: Tree, grads: State) -> tuple[Tree, State]:
    return dict(zip(theta, grads, strict=False)), grads[len(theta) :]


def grad(
    outputs: State, inputs: Sequence[Tensor], cotangents: State, *, create_graph: bool = False
) -> PartialState:
    """Return the pull-back of cotangents, None where nothing depends."""
    live = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not live or not inputs:
        return tuple(None for _ in inputs)
    return torch.autograd.grad(
        [o for o, _ in live],
        list(inputs),
        [c for _, c in live],
        create_graph=create_graph,
        allow_unused=True,
    )


def materialised(grads: PartialState, inputs: Iterable[Tensor]) -> State:
    """Return zeros where a gradient is None."""
    both = zip(grads, inputs, strict=True)
    return tuple(torch.zeros_like(x) if g is None else g for g, x in both)


def constants(state: State) -> State:
    """Return a state without its graph."""
    return tuple(x.detach() for x in state)


def leaves(state: State) -> State:
    """Return a state as leaves of a new graph."""
    return tuple(x.detach().requires_grad_() for x in state)
