"""The inner steps of a round, compiled.

One step: the inference network forward, the energy at its output, backward, the mean over the
batch, clipping, AdamW. Stages and output loss are compiled, each once, so that compile time does
not grow with depth; the optimizer's operations are fused over all parameters already, and the
engine calls them as they are.

Or the steps are recorded (`whole_round`): then all steps of a round, with the optimizer's, are one
program of `graphs.program`, and between the first step and the last nothing returns to Python.
Where ranks share a batch, gradients are summed over them in every step, so there a program is one
step's forward and backward, and the engine does the rest.

The numbers are those of `inner.inner_step`: the same masks, drawn beforehand from the same state,
and the same optimizer kernel.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ispen_dist import ranges
from ispen_dist.data.batch import Batch
from ispen_dist.engine import Engines
from ispen_dist.graphs.compiler import CompiledGraph, Compiler, spec_of
from ispen_dist.graphs.program import Program
from ispen_dist.graphs.stage_graphs import as_traced
from ispen_dist.inner import Statistics
from ispen_dist.inner_graphs import FIGURES, InnerGraphs, figures_of
from ispen_dist.players import Players
from ispen_dist.replicas import ReplicatedEngine


class InnerProgram:
    """Compiled inner steps of players whose parameters are replicated.

    Args:
        players: both networks.
        engines: with their optimizers, both replicated.
        compiler: remembers parts and programs by the shapes of batches.
        whole_round: record all steps as one program.
    """

    def __init__(
        self,
        players: Players,
        engines: Engines,
        compiler: Compiler,
        *,
        whole_round: bool = False,
    ) -> None:
        self._whole_round = whole_round
        assert isinstance(engines.inference_net, ReplicatedEngine)
        self._players, self._engines, self._compiler = players, engines, compiler
        self._engine = engines.inference_net

    def __call__(
        self,
        batches: Sequence[Batch],
        energy_weight: float,
        seed: Callable[[int], None],
        after_masks: Callable[[int], None] = lambda i: None,
    ) -> list[Statistics]:
        """Take one step per batch.

        Args:
            batches: this rank's examples of every step.
            energy_weight: lambda; at 0 the energy is not evaluated.
            seed: seeds the step of a number, from 0.
            after_masks: called with that number once the masks of the step are drawn, for what
                draws after them.

        Returns:
            For every step the statistics of `inner.inner_step`.
        """
        shapes = {spec_of(list(batch.tensors().values())) for batch in batches}
        alone = self._engine.layout.reduction.num_ranks == 1
        together = self._whole_round and alone and len(shapes) == 1
        result: list[Statistics] = []
        groups = [list(batches)] if together else [[batch] for batch in batches]
        for group in groups:
            shaped = self._shaped(group[0], energy_weight)
            masks: list[list[Tensor]] = []
            for _ in group:
                number = len(result) + len(masks)
                seed(number)
                masks.append([draw() for graph in shaped.graphs for draw in graph.draws])
                after_masks(number)
            if self._whole_round and alone:
                result += self._recorded_steps(shaped, group, masks)
            else:
                result.append(self._step(shaped, group[0], masks[0]))
        return result

    def _shaped(self, batch: Batch, energy_weight: float) -> InnerGraphs:
        key = ("inner shapes", energy_weight, spec_of(list(batch.tensors().values())))
        return self._compiler.once(
            key,
            lambda: InnerGraphs(self._players, self._engines, self._compiler, batch, energy_weight),
        )

    # -- all steps in one function -------------------------------------------------------------

    @ranges.marked("inner step")
    def _recorded_steps(
        self, shaped: InnerGraphs, batches: list[Batch], masks: list[list[Tensor]]
    ) -> list[Statistics]:
        state, fixed = self._engine.state(), shaped.fixed()
        per_step = [
            [*batch.tensors().values(), *mask, *self._scalars(state[0], i)]
            for i, (batch, mask) in enumerate(zip(batches, masks, strict=True))
        ]
        key = ("inner steps", len(batches), shaped.key, spec_of([*state, *fixed, *per_step[0]]))
        function = self._compiler.once(key, lambda: self._record(shaped, state, fixed, per_step))
        results = list(function(*state, *fixed, *(x for step in per_step for x in step)))
        now, figures = results[: len(state)], results[len(state) :]
        self._engine.accept(now, len(batches))
        rows = torch.stack(figures).view(len(batches), -1)
        return [dict(zip(FIGURES, row.unbind(), strict=True)) for row in rows]

    def _scalars(self, like: Tensor, i: int) -> list[Tensor]:
        """Return learning rates, one for each parameter group, and number of the i-th step."""
        step = self._engine.num_taken + i
        # A kernel on a GPU reads a rate as float32; on a CPU it keeps its digits.
        rate_type = torch.float32 if like.is_cuda else torch.float64
        rates = self._engine.learning_rates(step).values()
        number = torch.tensor(float(step + 1), dtype=torch.float32)
        scalars = [*(torch.tensor(rate, dtype=rate_type) for rate in rates), number]
        return [x.to(like.device) for x in scalars]

    def _record(
        self,
        shaped: InnerGraphs,
        state: list[Tensor],
        fixed: list[Tensor],
        per_step: list[list[Tensor]],
    ) -> CompiledGraph:
        """Record all steps: a program that calls one step's program, which calls the stages."""
        step = Program()
        module = step.finish(
            _recorded_step(
                shaped,
                self._engine.phase.config.clip_norm,
                step.inputs("state", state),
                step.inputs("fixed", fixed),
                step.inputs("own", per_step[0]),
            )
        )
        program = Program()
        now, constant = program.inputs("state", state), program.inputs("fixed", fixed)
        figures = []
        for i, tensors in enumerate(per_step):
            own = program.inputs(f"step_{i}", tensors)
            results = program.call(module, [*now, *constant, *own])
            now = results[: len(state)]
            figures += results[len(state) :]
        name = f"{len(per_step)} inner steps"
        # Everything it returns is copied before the next call.
        return self._compiler.compile(program.finish([*now, *figures]), name, replayed=True)

    # -- one step after the other --------------------------------------------------------------

    @ranges.marked("inner step")
    def _step(self, shaped: InnerGraphs, batch: Batch, masks: list[Tensor]) -> Statistics:
        engine = self._engine
        theta = [p.detach() for p in engine.trained().values()]
        fixed, own = shaped.fixed(), [*batch.tensors().values(), *masks]

        def record() -> CompiledGraph:
            program = Program()
            inputs = (program.inputs("theta", theta), program.inputs("fixed", fixed))
            gradient, sums = shaped.gradient(*inputs, program.inputs("own", own))
            return self._compiler.compile(program.finish([*gradient, *sums]), "inner gradient")

        if self._whole_round:
            key = ("inner gradient", shaped.key, spec_of([*theta, *fixed, *own]))
            results = list(self._compiler.once(key, record)(*theta, *fixed, *own))
            parts, sums = results[: len(theta)], results[len(theta) :]
        else:
            parts, sums = shaped.gradient(theta, fixed, own)
        constant, energy, count = sums
        gradient = dict(zip(engine.trained(), parts, strict=True))
        means, norm = engine.step_along(gradient, [constant, energy], count)
        return figures_of(means, shaped.energy_weight, norm)


def _recorded_step(
    shaped: InnerGraphs, clip_norm: float, state: list[Any], fixed: list[Any], own: list[Any]
) -> list[Any]:
    """Return the stand-ins of the next state, and of the figures of the step."""
    num_scalars = shaped.num_groups + 1
    batch_and_masks, scalars = own[:-num_scalars], own[-num_scalars:]
    theta = state[: len(state) // 3]
    gradient, sums = shaped.gradient(theta, fixed, batch_and_masks)
    # The fused kernel reads a gradient in the order of memory, whatever its strides.
    strides = [p.node.meta["val"].stride() for p in theta]
    gradient = [as_traced(g, stride) for g, stride in zip(gradient, strides, strict=True)]
    inputs = [*state, *gradient, *sums, *scalars]
    return list(shaped.update(clip_norm, inputs)(*inputs))
