"""A function given stage by stage: value, pull-back, tangent and curvature with one stage gathered.

Parameters lie over ranks in a `Layout`. Each pass gathers the parameters of one stage (and its
slice of the direction), computes, reduces the stage's gradient back into own parts and frees. In
memory at any time are the own parts, one stage (two with prefetch), and the states at the stage
boundaries.

Only reverse mode is used (see `operators`). With a stage f(p, s), p its parameters and s the state
before it, and a cotangent a of its output, let  k(p, s, a) = <a, f(p, s)>. Then

    grad_p k, grad_s k                                 the pull-back of a
    w = <grad_p k, v> + <grad_s k, sdot> + <f, adot>   a scalar, in a direction (v, sdot, adot)
    grad_a w (with adot = 0)  = fdot                   the tangent
    grad_p w, grad_s w                                 tangents of grad_p k and grad_s k

so two backward passes give what the R-operator (Pearlmutter 1994) needs, through any layer that
has a second derivative in reverse mode. w itself is never formed: the second pass starts at
grad_p k, grad_s k and f with the cotangents v, sdot and adot.

Randomness: the state of the generators before each stage is recorded in the first pass and set
again for every later one, so all passes see the same dropout masks, and those of a plain forward
pass.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ispen_dist.linalg.layout import Layout
from ispen_dist.linalg.trees import Tree, as_leaves

State = tuple[Tensor, ...]
PartialState = tuple[Tensor | None, ...]
Collect = Callable[[], tuple[Tree, Tree]]


class StageError(ValueError):
    """A network cannot be computed stage by stage, or a stage not differentiated twice."""


@dataclass(frozen=True)
class Stage:
    """One stage at given inputs.

    Attributes:
        name: for messages.
        keys: names of the parameters it reads, in the tree of the whole network.
        apply: `(parameters, state) -> next state`, with whole tensors under `keys`.
    """

    name: str
    keys: tuple[str, ...]
    apply: Callable[[Tree, State], State]


class StagedFunction:
    """`theta -> z` as a list of stages, at one point theta.

    Args:
        stages: in order; the last one's state is `(z,)`.
        layout: of the parameters.
        parameters: own parts of every parameter that a stage reads; the point.
        frozen: names of parameters that are constants: no gradient, no direction.
        keep_states: keep the states at the boundaries from the first pass on; otherwise every
            pass that needs them computes them again.
        prefetch: start to gather the next stage before computing this one.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        layout: Layout,
        parameters: Tree,
        *,
        frozen: frozenset[str] = frozenset(),
        keep_states: bool = True,
        prefetch: bool = False,
    ) -> None:
        self.stages = list(stages)
        self.layout = layout
        self.parameters = parameters
        self.keep_states = keep_states
        self._frozen = frozen
        self._prefetch = prefetch
        self._states: list[State] = []
        self._random: list[list[Tensor]] = []

    @property
    def theta(self) -> Tree:
        """Own parts of the parameters that are differentiated."""
        return {k: v for k, v in self.parameters.items() if k not in self._frozen}

    # -- passes ----------------------------------------------------------------------------------

    @torch.no_grad()
    def states(self) -> list[State]:
        """Return the state before every stage, and `(z,)`; computed once where they are kept."""
        if self._states:
            return self._states
        states: list[State] = [()]
        for i, collect in self._gathering(range(len(self.stages))):
            states.append(self._apply(i, collect()[0], states[-1]))
        if self.keep_states:
            self._states = states
        return states

    @torch.no_grad()
    def value(self) -> Tensor:
        """Return z, and keep nothing but what is kept anyway."""
        if self.keep_states:
            return self.states()[-1][0]
        state: State = ()
        for i, collect in self._gathering(range(len(self.stages))):
            state = self._apply(i, collect()[0], state)
        return state[0]

    def tangent(self, v: Tree) -> Tensor:
        """Return `J v`."""
        return self.states_and_tangents(v)[1][-1][0]

    def states_and_tangents(self, v: Tree) -> tuple[list[State], list[State]]:
        """Return the state before every stage and its tangent in direction v, and those of z."""
        states: list[State] = [()]
        tangents: list[State] = [()]
        for i, collect in self._gathering(range(len(self.stages)), v):
            state, tangent = self._stage_tangent(i, *collect(), states[i], tangents[i])
            states.append(state)
            tangents.append(tangent)
        return states, tangents

    def pull_back(
        self,
        z_bar: Tensor,
        states: list[State] | None = None,
        *,
        extra: list[PartialState] | None = None,
        onto: "Gradient | None" = None,
    ) -> tuple[Tree, list[State]]:
        """Return `J^T z_bar`, summed over ranks, and the cotangent of every stage's output.

        Args:
            z_bar: cotangent of z.
            states: where the caller has them already.
            extra: one more cotangent of the state before every stage, added on the way; used up.
            onto: sums that the result is added to.
        """
        states = states or self.states()
        gradient = onto or Gradient(self.layout)
        adjoint: State = (z_bar,)
        adjoints: list[State] = []
        for i, collect in self._gathering(reversed(range(len(self.stages)))):
            adjoints.append(adjoint)
            of_theta, adjoint = self._stage_pull_back(i, collect()[0], states[i], adjoint)
            gradient.add(of_theta)
            if extra is not None:
                both = zip(adjoint, extra.pop(), strict=True)
                adjoint = tuple(x if more is None else x + more for x, more in both)
        return gradient.finish(self.theta), adjoints[::-1]

    def forward_curvature(
        self, v: Tree, adjoints: list[State]
    ) -> tuple[Tensor, "Gradient", list[PartialState]]:
        """Go forward in direction v where the adjoints are known.

        Returns:
            The tangent of z; the part of the product that does not pass through it; and the same
            for the state before every stage, None where there is none. A pull-back of the tangent
            of z's cotangent, with these as `onto` and `extra`, completes the product.
        """
        product = Gradient(self.layout)
        tangent: State = ()
        of_states: list[PartialState] = []
        states = self.states()
        for i, collect in self._gathering(range(len(self.stages)), v):
            of_theta, of_state, tangent = self._stage_forward(
                i, *collect(), states[i], tangent, adjoints[i]
            )
            product.add(of_theta)
            of_states.append(of_state)
        return tangent[0], product, of_states

    def backward_curvature(
        self,
        v: Tree,
        states: list[State],
        tangents: list[State],
        z_bar: Tensor,
        z_bar_dot: Tensor,
    ) -> Tree:
        """Return the tangent of the gradient by going backwards with adjoint and tangent."""
        product = Gradient(self.layout)
        adjoint: State = (z_bar,)
        adjoint_dot: State = (z_bar_dot,)
        for i, collect in self._gathering(reversed(range(len(self.stages))), v):
            of_theta, adjoint, adjoint_dot = self._stage_backward(
                i, *collect(), states[i], tangents[i], adjoint, adjoint_dot
            )
            product.add(of_theta)
        return product.finish(self.theta)

    # -- one stage; its graph is freed when it returns, before anything is sent or gathered -------

    def _stage_tangent(
        self, i: int, p: Tree, v: Tree, s: State, s_dot: State
    ) -> tuple[State, State]:
        p, s = as_leaves(p), _leaves(s)
        f = self._apply(i, p, s)
        a = tuple(torch.zeros_like(x).requires_grad_() for x in f)
        k = self._first(p, s, f, a)
        tangent = self._second(i, k, (*v.values(), *s_dot), a)
        return _constants(f), _materialised(tangent, a)

    def _stage_pull_back(self, i: int, p: Tree, s: State, a: State) -> tuple[Tree, State]:
        p, s = as_leaves(p), _leaves(s)
        theta = self._trained(p)
        grads = _grad(self._apply(i, p, s), [*theta.values(), *s], a)
        return self._split(theta, _materialised(grads, [*theta.values(), *s]))

    def _stage_forward(
        self, i: int, p: Tree, v: Tree, s: State, s_dot: State, a: State
    ) -> tuple[Tree, PartialState, State]:
        p, s, a = as_leaves(p), _leaves(s), _leaves(a)
        k = self._first(p, s, self._apply(i, p, s), a)
        theta = self._trained(p)
        grads = self._second(i, k, (*v.values(), *s_dot), [*theta.values(), *s, *a])
        end = len(theta) + len(s)
        of_theta, _ = self._split(theta, _materialised(grads[: len(theta)], theta.values()))
        return of_theta, grads[len(theta) : end], _materialised(grads[end:], a)

    def _stage_backward(
        self, i: int, p: Tree, v: Tree, s: State, s_dot: State, a: State, a_dot: State
    ) -> tuple[Tree, State, State]:
        p, s = as_leaves(p), _leaves(s)
        f = self._apply(i, p, s)
        theta = self._trained(p)
        k = self._first(p, s, f, a)
        inputs = [*theta.values(), *s]
        grads = self._second(i, (*k, *f), (*v.values(), *s_dot, *a_dot), inputs)
        of_theta, dot = self._split(theta, _materialised(grads, inputs))
        return of_theta, _constants(k[len(theta) :]), dot

    def _first(self, p: Tree, s: State, f: State, a: State) -> State:
        """Return grad_p k and grad_s k with their graph."""
        inputs = [*self._trained(p).values(), *s]
        return _materialised(_grad(f, inputs, a, create_graph=True), inputs)

    def _second(
        self, i: int, outputs: State, cotangents: State, inputs: Sequence[Tensor]
    ) -> PartialState:
        try:
            return _grad(outputs, inputs, cotangents)
        except RuntimeError as error:
            if not re.search("not implemented|differentiable", str(error)):
                raise
            raise StageError(
                f"stage {self.stages[i].name}: expected layers that can be differentiated twice, "
                f"found: {error}; write the layer in plain operations, or disable its fused kernel"
            ) from error

    @staticmethod
    def _split(theta: Tree, grads: State) -> tuple[Tree, State]:
        return dict(zip(theta, grads, strict=False)), grads[len(theta) :]

    def _trained(self, p: Tree) -> Tree:
        return {k: v for k, v in p.items() if k not in self._frozen}

    def _apply(self, i: int, p: Tree, s: State) -> State:
        stage = self.stages[i]
        if len(self._random) <= i:
            self._random.append(_random_state(self._device))
            return stage.apply(p, s)
        with _replayed(self._random[i], self._device):
            return stage.apply(p, s)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def _gathering(
        self, order: Iterable[int], v: Tree | None = None
    ) -> Iterator[tuple[int, Collect]]:
        """Yield every stage's number, and what collects its parameters and its direction."""
        numbers = list(order)
        collect = self._start(numbers[0], v)
        for i, following in zip(numbers, [*numbers[1:], None], strict=True):
            if self._prefetch and following is not None:
                ahead = self._start(following, v)
                yield i, collect
                collect = ahead
            else:
                yield i, collect
                if following is not None:
                    collect = self._start(following, v)

    def _start(self, i: int, v: Tree | None) -> Collect:
        keys = self.stages[i].keys
        own = {key: self.parameters[key] for key in keys}
        direction = {} if v is None else {key: v[key] for key in keys if key not in self._frozen}
        wait = self.layout.gather([own, direction])

        def collect() -> tuple[Tree, Tree]:
            p, v_i = wait()
            return p, v_i

        return collect


class Gradient:
    """The gradient of the stages' parameters as own parts, summed stage by stage.

    Args:
        layout: adds over ranks and cuts.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._sum: Tree = {}

    def add(self, whole: Tree) -> None:
        """Add the gradient of one stage, over ranks; tied weights add up."""
        if not whole:
            return
        for key, part in self._layout.reduce(whole).items():
            self._sum[key] = self._sum[key] + part if key in self._sum else part

    def finish(self, like: Tree) -> Tree:
        """Return the sums in the order of a tree."""
        return {key: self._sum[key] for key in like}


def _grad(
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


def _materialised(grads: PartialState, inputs: Iterable[Tensor]) -> State:
    both = zip(grads, inputs, strict=True)
    return tuple(torch.zeros_like(x) if g is None else g for g, x in both)


def _constants(state: State) -> State:
    return tuple(x.detach() for x in state)


def _leaves(state: State) -> State:
    return tuple(x.detach().requires_grad_() for x in state)


def _random_state(device: torch.device) -> list[Tensor]:
    state = [torch.get_rng_state()]
    if device.type == "cuda":
        state.append(torch.cuda.get_rng_state(device))
    return state


@contextlib.contextmanager
def _replayed(state: list[Tensor], device: torch.device) -> Iterator[None]:
    before = _random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(before, device)


def _set_random_state(state: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)
