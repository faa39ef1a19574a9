"""A function given stage by stage: value, pull-back, tangent and curvature with one stage gathered.

Parameters lie over ranks in a `Layout`. Each pass gathers the parameters of one stage (and its
slice of the direction), computes, reduces the stage's gradient back into own parts and frees. In
memory at any time are the own parts, one stage (two with prefetch), and the states at the stage
boundaries. What is computed at one stage is in `stages`; only reverse mode is used there.

Randomness: the state of the generators before each stage is recorded in the first pass and set
again for every later one, so all passes see the same dropout masks, and those of a plain forward
pass.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ispen_dist.linalg.layout import Layout
from ispen_dist.linalg.stages import EagerPasses, PartialState, Passes, Stage, State
from ispen_dist.linalg.trees import Tree

Collect = Callable[[], tuple[Tree, Tree]]


class StagedFunction:
    """`theta -> z` as a list of stages, at one point theta.

    Args:
        stages: in order; the last one's state is `(z,)`.
        layout: of the parameters.
        parameters: own parts of every parameter that a stage reads; the point.
        frozen: names of parameters that are constants: no gradient, no direction.
        passes: what computes at one stage; default autograd.
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
        passes: Passes | None = None,
        keep_states: bool = True,
        prefetch: bool = False,
    ) -> None:
        self.stages = list(stages)
        self.layout = layout
        self.parameters = parameters
        self.keep_states = keep_states
        self.frozen = frozen
        self.passes = passes or EagerPasses(frozen)
        self._prefetch = prefetch
        self._states: list[State] = []
        self._random: list[list[Tensor]] = []

    @property
    def theta(self) -> Tree:
        """Own parts of the parameters that are differentiated."""
        return {k: v for k, v in self.parameters.items() if k not in self.frozen}

    # -- passes ----------------------------------------------------------------------------------

    @torch.no_grad()
    def states(self) -> list[State]:
        """Return the state before every stage, and `(z,)`; computed once where they are kept."""
        if self._states:
            return self._states
        states: list[State] = [()]
        for i, collect in self._gathering(range(len(self.stages))):
            with self._masks(i):
                states.append(self.passes.value(self.stages[i], collect()[0], states[-1]))
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
            with self._masks(i):
                state = self.passes.value(self.stages[i], collect()[0], state)
        return state[0]

    def tangent(self, v: Tree) -> Tensor:
        """Return `J v`."""
        return self.states_and_tangents(v)[1][-1][0]

    def states_and_tangents(self, v: Tree) -> tuple[list[State], list[State]]:
        """Return the state before every stage and its tangent in direction v, and those of z."""
        states: list[State] = [()]
        tangents: list[State] = [()]
        for i, collect in self._gathering(range(len(self.stages)), v):
            with self._masks(i):
                state, tangent = self.passes.tangent(
                    self.stages[i], *collect(), states[i], tangents[i]
                )
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
            with self._masks(i):
                of_theta, adjoint = self.passes.pull_back(
                    self.stages[i], collect()[0], states[i], adjoint
                )
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
            with self._masks(i):
                of_theta, of_state, tangent = self.passes.forward(
                    self.stages[i], *collect(), states[i], tangent, adjoints[i]
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
            with self._masks(i):
                of_theta, adjoint, adjoint_dot = self.passes.backward(
                    self.stages[i], *collect(), states[i], tangents[i], adjoint, adjoint_dot
                )
            product.add(of_theta)
        return product.finish(self.theta)

    @contextlib.contextmanager
    def _masks(self, i: int) -> Iterator[None]:
        """Draw what the first pass through a stage drew; recorded when that pass is this one."""
        if len(self._random) <= i:
            self._random.append(_random_state(self._device))
            yield
        else:
            with _replayed(self._random[i], self._device):
                yield

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
        direction = {} if v is None else {key: v[key] for key in keys if key not in self.frozen}
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
