"""One step of the energy on the outer loss of the network that is trained on it."""

import contextlib
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from ispen_dist import ranges
from ispen_dist.config import Config, ConfigError, SolverConfig
from ispen_dist.data.batch import Batch
from ispen_dist.engine import Engine, Engines
from ispen_dist.graphs.compiler import Compiler
from ispen_dist.graphs.operators import CompiledOperator, compiled_outer_gradients
from ispen_dist.implicit import (
    Hypergradient,
    hypergradient,
    outer_gradients,
    staged_hypergradient,
    staged_outer_gradients,
)
from ispen_dist.linalg import trees
from ispen_dist.linalg.layout import Layout, norms
from ispen_dist.linalg.operators import (
    CurvatureOperator,
    build_operator,
    symmetry_defect,
)
from ispen_dist.linalg.reduction import agreed
from ispen_dist.linalg.solver import Solver
from ispen_dist.linalg.solvers import SOLVERS
from ispen_dist.linalg.staged_operators import build_staged_operator
from ispen_dist.linalg.trees import Tree
from ispen_dist.losses import Losses
from ispen_dist.players import Players
from ispen_dist.seeding import derived_seed, seed_step, step_generator

PROBE_EXAMPLES = 4
"""Examples per rank on which a product is compared with float64."""

MOST_DAMPING = 1e12
"""Failures after failures raise the damping no further; far above any curvature, and finite."""

MAX_SYMMETRY_DEFECT = 1e-3
"""Above it the curvature is not that of a function: rounding in float32 stays below 1e-5."""


class SolveFailed(RuntimeError):
    """The implicit part could not be computed and `solver.on_failure` is `stop`."""


@dataclass
class SolverRecord:
    """What the solves of a run did, and what the next one starts from.

    Attributes:
        damping: damping of the next solve; above the configured one after failures under `damp`.
        start: solution of the last usable solve, for the warm start.
        statuses: number of solves by status, repeats included.
        num_skipped: outer steps without their implicit part.
        num_steps: products over all solves.
        residual_sum: sum of the measured relative residuals.
        num_residuals: how many were measured.
    """

    damping: float
    start: Tree | None = None
    statuses: Counter[str] = field(default_factory=Counter)
    num_skipped: int = 0
    num_steps: int = 0
    residual_sum: float = 0.0
    num_residuals: int = 0

    def count(self, solve: Hypergradient) -> None:
        """Enter one solve."""
        self.statuses[solve.status.value] += 1
        self.num_steps += solve.num_steps
        if math.isfinite(solve.residual):
            self.residual_sum += solve.residual
            self.num_residuals += 1

    def summary(self) -> dict[str, object]:
        """Return status counts, mean steps and mean residual, for summary.json."""
        num_solves = sum(self.statuses.values())
        return {
            "statuses": dict(self.statuses),
            "skipped": self.num_skipped,
            "mean_steps": self.num_steps / num_solves if num_solves else 0.0,
            "mean_residual": self.residual_sum / self.num_residuals if self.num_residuals else None,
            "damping": self.damping,
        }


def build_solver(config: SolverConfig, engine: Engine, seed: int) -> Solver:
    """Build the solver that the configuration names.

    Args:
        config: fills the fields of the solver by their names.
        engine: of the inference network; gives the metric of its optimizer.
        seed: of random directions.
    """
    solver: Any = SOLVERS[config.name]
    names = {f.name for f in fields(solver)}
    settings = {name: getattr(config, name) for name in names - {"metric", "seed"}}
    if "seed" in names:
        settings["seed"] = seed
    if "metric" in names:
        settings["metric"] = engine.metric()
        if settings["metric"] is None:
            warnings.warn(
                f"solver.name={config.name}: expected second moments of the inner optimizer, found "
                "none before its first step; the metric is the identity in this solve",
                stacklevel=2,
            )
    return solver(**settings)


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Keep cuDNN out: its recurrent kernels have no second derivative, the native ones do."""
    with torch.backends.cudnn.flags(enabled=False):
        yield


@dataclass
class OuterStep:
    """Updates phi once per call.

    Attributes:
        players: both networks.
        engines: with their optimizers.
        rank: this process, for its samples and dropout masks.
        record: statuses, damping and warm start; part of the checkpoint.
        compiler: of the curvature; None computes it as it is.
        residuals: of the last solve, see `Solution.residuals`.
    """

    players: Players
    engines: Engines
    rank: int
    record: SolverRecord
    compiler: Compiler | None = None
    residuals: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        self._losses = Losses(self.players, self.engines)
        self._reduction = self.engines.inference_net.layout.reduction
        self._keeps_graph = keeps_graph(self._config, self.engines)

    @property
    def _config(self) -> Config:
        return self.players.config

    @ranges.marked("outer step")
    def __call__(self, inner_batch: Batch, outer_batch: Batch, step: int) -> Mapping[str, float]:
        """Take one outer step.

        Args:
            inner_batch: examples of G in the solve.
            outer_batch: examples of L.
            step: number of the outer step; all randomness follows from it.

        Returns:
            Scalars for the record: `outer_loss`, norms of both parts, how the solve went, and
            `update_norm` of the gradient, which is left out where that is not finite.

        Raises:
            SolveFailed: when the implicit part cannot be computed and the run shall stop.
        """
        with twice_differentiable():
            if self._config.train.method == "explicit":
                return self._explicit_step(outer_batch, step)
            return self._implicit_step(inner_batch, outer_batch, step)

    def _generator(self, outer_batch: Batch, step: int) -> torch.Generator:
        """Seed the step, and return a generator for its samples."""
        seed = self._config.train.seed
        seed_step(seed, "solve", step, self.rank)
        return step_generator(seed, "samples", step, self.rank, outer_batch.weight.device)

    def _explicit_step(self, outer_batch: Batch, step: int) -> Mapping[str, float]:
        generator, losses = self._generator(outer_batch, step), self._losses
        if not self._config.inference.by_network:
            value, explicit = losses.energy_gradient(outer_batch, generator)
        elif self._keeps_graph and self.compiler is not None:
            loss = losses.outer_staged(outer_batch, generator)
            value, _, explicit = compiled_outer_gradients(loss, self.compiler)
        elif self._keeps_graph:
            value, _, explicit = outer_gradients(
                losses.outer_graph(outer_batch, generator),
                losses.theta(),
                losses.phi(),
                self._reduction,
            )
        else:
            staged = losses.outer_staged(outer_batch, generator, self.compiler)
            value, _, explicit = staged_outer_gradients(staged)
        norm = self._update(explicit, outer_batch)
        return {"outer_loss": value.item(), "explicit_norm": norm, "update_norm": norm}

    def _implicit_step(
        self, inner_batch: Batch, outer_batch: Batch, step: int
    ) -> Mapping[str, float]:
        probe = self._probe(inner_batch, step) if step == 0 else {}
        solve = self._solve(inner_batch, outer_batch, step)
        usable = solve.status.usable
        if usable:
            self.record.start = trees.detached(solve.solution.value)
        else:
            self.record.num_skipped += 1
        norm = self._update(solve.value if usable else solve.explicit, outer_batch)
        (stationarity,) = norms(self.engines.inference_net.layout, solve.inner_gradient)
        explicit, implicit = norms(self.engines.energy.layout, solve.explicit, solve.implicit)
        return {
            "outer_loss": solve.outer_loss.item(),
            "stationarity": stationarity,
            "explicit_norm": explicit,
            "implicit_norm": implicit,
            "update_norm": norm,
            "solver_steps": solve.num_steps,
            "residual": solve.residual,
            "damping": self.record.damping,
            "skipped": self.record.num_skipped,
            **probe,
        }

    @ranges.marked("probe")
    def _probe(self, inner_batch: Batch, step: int) -> Mapping[str, float]:
        """Check once, before curvature is trusted, that u.Hv = v.Hu, and how exact a product is.

        Returns:
            `symmetry_defect` of the operator of a solve, and `precision_error`, the distance of
            one product on a sample from the same in float64.

        Raises:
            SolveFailed: where the defect is large, as with a wrong second derivative.
            StageError: where a layer has no second derivative.
        """
        seed = self._config.train.seed
        layout = self.engines.inference_net.layout
        u, v = (
            trees.random_like(
                self._losses.theta(), torch.Generator().manual_seed(layout.draw_seed(seed + i))
            )
            for i in range(2)
        )
        # First, since it names the stage whose layers cannot be differentiated twice.
        error = self._precision_error(inner_batch, v, layout)
        seed_step(seed, "probe", step, self.rank)
        operator = self._operator(inner_batch)
        defect = agreed(symmetry_defect(operator, u, v, layout.vectors()), self._reduction)
        if defect > MAX_SYMMETRY_DEFECT:
            raise SolveFailed(
                f"inference_net: expected a symmetric Hessian, got a defect of {defect:.1e} "
                f"(limit {MAX_SYMMETRY_DEFECT:g}); a layer's second derivative is wrong or missing"
            )
        return {"symmetry_defect": defect, "precision_error": error}

    def _operator(self, batch: Batch) -> CurvatureOperator:
        """Return the curvature as a solve builds it."""
        curvature, losses = self._config.solver.curvature, self._losses
        if not self._keeps_graph:
            staged = losses.inner_staged(batch, compiler=self.compiler)
            return build_staged_operator(curvature, staged)
        if self.compiler is not None:
            return CompiledOperator(losses.inner_staged(batch), self.compiler, curvature)
        graph = losses.inner_graph(batch)
        return build_operator(curvature, graph, losses.theta(), losses.phi(), self._reduction)

    def _precision_error(self, batch: Batch, v: Tree, layout: Layout) -> float:
        """Compare one product, without dropout, on the rank's first examples with float64."""
        products = []
        for dtype in (None, torch.float64):
            sample = batch.first(PROBE_EXAMPLES)
            sample = sample if dtype is None else sample.to(sample.weight.device, dtype)
            loss = self._losses.inner_staged(sample, training=False, dtype=dtype)
            operator = build_staged_operator(self._config.solver.curvature, loss)
            direction = {k: x if dtype is None else x.to(dtype) for k, x in v.items()}
            product = operator.matvec(direction)
            products.append({k: x.to(torch.float64) for k, x in product.items()})
        difference = trees.add_scaled(products[0], -1.0, products[1])
        error, size = norms(layout, difference, products[1])
        return error / size if size > 0.0 else error

    def hypergradient(self, inner_batch: Batch, outer_batch: Batch, step: int) -> Hypergradient:
        """Solve once at the present parameters and damping, and change nothing."""
        config, losses = self._config.solver, self._losses
        generator = self._generator(outer_batch, step)
        engine = self.engines.inference_net
        own_seed = engine.layout.draw_seed(self._config.train.seed)
        seed = derived_seed(own_seed, "directions", step)
        settings: dict[str, Any] = {
            "solver": build_solver(config, engine, seed),
            "damping": self.record.damping,
            "curvature": config.curvature,
            "start": self.record.start if config.warm_start else None,
        }
        if self.compiler is not None or not self._keeps_graph:
            # With whole graphs the stages are compiled together with what they keep; otherwise
            # each pass through a stage by itself.
            whole = self.compiler if self._keeps_graph else None
            passes = None if self._keeps_graph else self.compiler
            inner = losses.inner_staged(inner_batch, compiler=passes)
            outer = losses.outer_staged(outer_batch, generator, passes)
            return staged_hypergradient(inner, outer, compiler=whole, **settings)
        return hypergradient(
            losses.inner_graph(inner_batch),
            losses.outer_graph(outer_batch, generator),
            losses.theta(),
            losses.phi(),
            reduction=self._reduction,
            **settings,
        )

    def _solve(self, inner_batch: Batch, outer_batch: Batch, step: int) -> Hypergradient:
        """Solve, and repeat with larger damping where the configuration says so."""
        config, record = self._config.solver, self.record
        num_repeats = config.max_repeats if config.on_failure == "damp" else 0
        while True:
            solve = self.hypergradient(inner_batch, outer_batch, step)
            record.count(solve)
            self.residuals = solve.solution.residuals
            if solve.status.usable:
                eased = record.damping / math.sqrt(config.damping_factor)
                record.damping = max(config.damping, eased)
                return solve
            if config.on_failure == "stop":
                raise SolveFailed(f"outer step {step}: {solve.status.value}. {solve.status.help}")
            if num_repeats == 0:
                return solve
            num_repeats -= 1
            record.damping = min(record.damping * config.damping_factor, MOST_DAMPING)

    @ranges.marked("energy update")
    def _update(self, gradient: Tree, batch: Batch) -> float:
        """Apply a gradient unless it is not finite, which every rank sees alike."""
        (norm,) = norms(self.engines.energy.layout, gradient)
        if math.isfinite(norm):
            self.engines.energy.apply(gradient, batch.inputs)
        return norm


def keeps_graph(config: Config, engines: Engines) -> bool:
    """Whether a solve keeps the graph of the whole gradient, see `solver.memory`.

    Raises:
        ConfigError: if that is asked for with sharded parameters.
    """
    memory = config.solver.memory
    replicated = all(engine.replicated for _, engine in engines.items())
    if memory == "graph" and not replicated:
        raise ConfigError(
            "solver.memory: expected states or recompute with sharded parameters (zero3, fsdp2), "
            "got graph, which needs all of them on every rank"
        )
    return memory == "graph" or (memory == "auto" and replicated)
