"""The parts of one inner step as graphs, for the shapes of a batch.

The inference network forward, the energy at its output, backward, the mean over the batch,
clipping, AdamW; `inner_program` puts them together.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ispen_dist.data.batch import Batch
from ispen_dist.engine import Engines
from ispen_dist.graphs.compiler import CompiledGraph, Compiler, spec_of
from ispen_dist.graphs.phases import outputs_of
from ispen_dist.graphs.stage_graphs import VALUE, StageGraph, StagePoint, assemble, stage_graphs
from ispen_dist.graphs.tracing import trace
from ispen_dist.linalg.staged import StagedFunction
from ispen_dist.linalg.stages import State, grad, materialised
from ispen_dist.objectives import fixed, inner_terms
from ispen_dist.optim import checked_norm, clip_factor, found_inf
from ispen_dist.players import LOCAL, Players, is_local
from ispen_dist.replicas import ReplicatedEngine

FIGURES = ("inner_loss", "fixed_loss", "energy", "gradient_norm")
"""What `inner.inner_step` tells of a step."""


def figures_of(means: Sequence[Tensor], energy_weight: float, norm: Tensor) -> dict[str, Tensor]:
    """Return `FIGURES` of a step from the means of both terms and the gradient's norm."""
    values = (means[0] + energy_weight * means[1], means[0], means[1], norm)
    return dict(zip(FIGURES, values, strict=True))


class InnerGraphs:
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
            figures = figures_of([constant / count, energy / count], weight, norm)
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
