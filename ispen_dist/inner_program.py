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

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ispen_dist import ranges
from ispen_dist.data.batch import Batch
from ispen_dist.engine import Engines
from ispen_dist.graphs.compiler import CompiledGraph, Compiler, spec_of
from ispen_dist.graphs.phases import outputs_of
from ispen_dist.graphs.program import Program
from ispen_dist.graphs.stage_graphs import (
    VALUE,
    StageGraph,
    StagePoint,
    as_traced,
    assemble,
    stage_graphs,
)
from ispen_dist.graphs.tracing import trace
from ispen_dist.inner import Statistics
from ispen_dist.linalg.staged import StagedFunction
from ispen_dist.linalg.stages import State, grad, materialised
from ispen_dist.objectives import fixed, inner_terms
from ispen_dist.optim import checked_norm, clip_factor, found_inf
from ispen_dist.players import LOCAL, Players, is_local
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

    def _shaped(self, batch: Batch, energy_weight: float) -> "_Shaped":
        key = ("inner shapes", energy_weight, spec_of(list(batch.tensors().values())))
        return self._compiler.once(
            key,
            lambda: _Shaped(self._players, self._engines, self._compiler, batch, energy_weight),
        )

    # -- all steps in one function -------------------------------------------------------------

    @ranges.marked("inner step")
    def _recorded_steps(
        self, shaped: "_Shaped", batches: list[Batch], masks: list[list[Tensor]]
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
        return [dict(zip(_FIGURES, row.unbind(), strict=True)) for row in rows]

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
        shaped: "_Shaped",
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
    def _step(self, shaped: "_Shaped", batch: Batch, masks: list[Tensor]) -> Statistics:
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
        return _figures(means, shaped.energy_weight, norm)


def _recorded_step(
    shaped: "_Shaped", clip_norm: float, state: list[Any], fixed: list[Any], own: list[Any]
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


_FIGURES = ("inner_loss", "fixed_loss", "energy", "gradient_norm")


def _figures(means: Sequence[Tensor], energy_weight: float, norm: Tensor) -> dict[str, Tensor]:
    values = (means[0] + energy_weight * means[1], means[0], means[1], norm)
    return dict(zip(_FIGURES, values, strict=True))


class _Shaped:
    """The parts of a step, traced for the shapes of one batch.

    Args:
        players: both networks.
        engines: where their parameters are.
        compiler: of the parts.
        batch: for its shapes and the names of its tensors.
        energy_weight: lambda.
    """

    def __init__(
        self,
        players: Players,
        engines: Engines,
        compiler: Compiler,
        batch: Batch,
        energy_weight: float,
    ) -> None:
        self._players, self._engines, self._compiler = players, engines, compiler
        self.energy_weight = energy_weight
        self._names = list(batch.tensors())
        self._model = engines.inference_net.staged(batch.inputs, training=True)
        self.graphs = stage_graphs(compiler, "gradient", self._model)
        self._energy: StagedFunction | None = None
        self._energy_graphs: list[StageGraph] = []
        if energy_weight > 0.0:
            part = LOCAL.removesuffix(".")
            self._energy = engines.energy.staged(batch.inputs, part=part)
            self._energy_graphs = stage_graphs(compiler, "value", self._energy)
        self._output = self._output_graph(batch)
        tensors = list(batch.tensors().values())
        self.key = (energy_weight, spec_of(tensors), tuple(map(id, self.graphs)))

    @property
    def num_groups(self) -> int:
        """Number of the parameter groups that are trained, each with a learning rate."""
        return len(self._engines.inference_net.trained_groups)

    @property
    def _fixed_names(self) -> list[tuple[str, str]]:
        """Which parameters are constants here: (network, name)."""
        frozen = [("inference_net", n) for n in sorted(self._engines.inference_net.frozen)]
        if self._energy is None:
            return frozen
        return frozen + [("energy", n) for n in self._engines.energy.parameters()]

    def fixed(self) -> list[Tensor]:
        """Return the parameters that are constants here."""
        engines = dict(self._engines.items())
        return [engines[e].parameters([n])[n].detach() for e, n in self._fixed_names]

    def gradient(
        self, theta: list[Tensor], fixed: list[Tensor], batch_and_masks: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the gradient of the rank's sum, and `fixed_loss`, `energy` and `count`.

        Args:
            theta: trained parameters in the order of the engine, or stand-ins for them.
            fixed: see `fixed`.
            batch_and_masks: tensors of a batch, then the masks of all stages in order.
        """
        names = list(self._engines.inference_net.trained_names)
        constant = dict(zip(self._fixed_names, fixed, strict=True))
        p = dict(zip(names, theta, strict=True))
        p |= {n: x for (engine, n), x in constant.items() if engine == "inference_net"}
        batch = dict(zip(self._names, batch_and_masks, strict=False))
        masks = iter(batch_and_masks[len(self._names) :])
        points = [StagePoint(graph) for graph in self.graphs]
        z = _forward(self._model, points, p, batch, masks)
        extra: list[Tensor] = []
        if self._energy is not None:
            e = {n: x for (engine, n), x in constant.items() if engine == "energy"}
            local = {n.removeprefix(LOCAL): x for n, x in e.items() if is_local(n)}
            energy_points = [StagePoint(graph) for graph in self._energy_graphs]
            extra = [_forward(self._energy, energy_points, local, batch, masks)]
            extra += [x for n, x in e.items() if not is_local(n)]
        *sums, z_bar = StagePoint(self._output).value([z, *extra], list(batch.values()), ())
        return _backward(self._model, points, z_bar, names), sums

    def _output_graph(self, batch: Batch) -> StageGraph:
        """Return `(z, b, head, batch) -> constant, energy, count, z_bar`, sums of the rank."""
        players, weight, names = self._players, self.energy_weight, self._names
        z = _shape_of_value(self.graphs)
        tensors, head = [z], []
        if self._energy is not None:
            energy = self._engines.energy
            head = [n for n, _ in energy.network.named_parameters() if not is_local(n)]
            tensors += [_shape_of_value(self._energy_graphs)]
            tensors += [energy.parameters([n])[n].detach() for n in head]
        data = list(batch.tensors().values())

        def function(z: Tensor, *rest: Tensor) -> list[Tensor]:
            z = z.detach().requires_grad_()
            at = Batch.of(dict(zip(names, rest[-len(names) :], strict=True)))
            b, *values = rest[: -len(names)] if weight > 0.0 else [z.detach()]
            view = players.view(at, z, b, dict(zip(head, values, strict=True)))
            if weight > 0.0:
                constant, energy = inner_terms(view)
            else:
                constant = fixed(view)
                energy = torch.zeros_like(constant)
            sums = [(term * at.weight).sum() for term in (constant, energy)]
            total = sums[0] + weight * sums[1]
            z_bar = materialised(grad((total,), [z], (torch.ones_like(total),)), [z])
            return [*(x.detach() for x in sums), at.weight.sum(), *z_bar]

        def build() -> StageGraph:
            traced = trace(function, [*tensors, *data], "inner_loss")
            known = [VALUE] * (len(tensors) + len(data))
            return assemble(self._compiler, traced, known, [VALUE] * 4, "output of inner_loss")

        key = ("inner output", weight, spec_of([*tensors, *data]))
        return self._compiler.once(key, build)

    def update(self, clip_norm: float, inputs: list[Any]) -> CompiledGraph:
        """Return the optimizer's step on the mean: new state, and the figures of the step.

        Args:
            clip_norm: see `OptimizerConfig`.
            inputs: stand-ins for state, gradient, sums, learning rates and number of the step.
        """
        engine = self._engines.inference_net
        assert isinstance(engine, ReplicatedEngine)
        settings, weight = engine.adamw_settings, self.energy_weight
        examples = [x.node.meta["val"] for x in inputs]
        sizes = [len(names) for names in engine.trained_groups.values()]
        size = sum(sizes)

        def function(*tensors: Tensor) -> list[Tensor]:
            theta, first, second, gradient = (
                list(tensors[i * size : (i + 1) * size]) for i in range(4)
            )
            constant, energy, count, *rates, number = tensors[4 * size :]
            mean = list(torch._foreach_mul(gradient, 1.0 / count))
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(mean)))
            norm = checked_norm(norm, [constant, energy])
            mean = list(torch._foreach_mul(mean, clip_factor(norm, clip_norm)))
            left_out = found_inf(norm)
            state: list[list[Tensor]] = [[], [], []]
            groups = zip(*(_split(x, sizes) for x in (theta, mean, first, second)), strict=True)
            for (p, g, m, v), rate in zip(groups, rates, strict=True):
                p, _, m, v, _ = torch.ops.aten._fused_adamw.tensor_lr(
                    p, g, m, v, [], [number] * len(p),
                    lr=rate, amsgrad=False, maximize=False, found_inf=left_out, **settings,
                )  # fmt: skip
                for kept, new in zip(state, (p, m, v), strict=True):
                    kept += new
            figures = _figures([constant / count, energy / count], weight, norm)
            return [*itertools.chain(*state), *figures.values()]

        key = ("update", clip_norm, weight, tuple(settings.items()), *sizes, spec_of(examples))
        return self._compiler.once(
            key,
            lambda: self._compiler.compile(trace(function, examples, "update").module, "update"),
        )


def _split(tensors: list[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    rest = iter(tensors)
    return [list(itertools.islice(rest, size)) for size in sizes]


def _forward(
    model: StagedFunction,
    points: list[StagePoint],
    p: Mapping[str, Tensor],
    batch: Mapping[str, Tensor],
    masks: Iterator[Tensor],
) -> Tensor:
    state: State = ()
    for stage, point in zip(model.stages, points, strict=True):
        inputs = [batch[f"inputs.{name}"] for name in stage.inputs]
        own = [next(masks) for _ in range(point.num_masks)]
        state = point.value([p[key] for key in stage.keys], inputs, state, own)
    return state[0]


def _backward(
    model: StagedFunction, points: list[StagePoint], z_bar: Tensor, names: list[str]
) -> list[Tensor]:
    total: dict[str, Tensor] = {}
    a: State = (z_bar,)
    for stage, point in zip(reversed(model.stages), reversed(points), strict=True):
        keys = [key for key in stage.keys if key not in model.frozen]
        grads = point.pull_back(a)
        a = grads[len(keys) :]
        for key, gradient in zip(keys, grads, strict=False):
            total[key] = total[key] + gradient if key in total else gradient
    return [total[name] for name in names]


def _shape_of_value(graphs: list[StageGraph]) -> Tensor:
    """Return a tensor without memory like the value of the last stage."""
    return outputs_of(graphs[-1].phases[VALUE].module)[0].meta["val"]
