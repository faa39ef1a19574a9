"""One step of the energy on the outer loss of the network that is trained on it."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import functional_call

from ispen_dist import objectives
from ispen_dist.config import Config, SolverConfig
from ispen_dist.data.batch import Batch
from ispen_dist.implicit import Hypergradient, hypergradient, outer_gradients
from ispen_dist.linalg import trees
from ispen_dist.linalg.operators import ComposedLoss, Loss, build_operator, symmetry_defect
from ispen_dist.linalg.reduction import LossValue, Reduction, agreed
from ispen_dist.linalg.solvers import CG, Identity, Neumann, Solver
from ispen_dist.linalg.trees import Tree
from ispen_dist.optim import Optimizer
from ispen_dist.players import Players
from ispen_dist.seeding import seed_step, step_generator

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


def build_solver(config: SolverConfig) -> Solver:
    """Build the solver that the configuration names."""
    if config.name == "neumann":
        return Neumann(config.max_steps, config.scale, config.rtol)
    if config.name == "identity":
        return Identity(config.scale)
    return CG(config.max_steps, config.rtol)


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Keep cuDNN out: its recurrent kernels have no second derivative, the native ones do."""
    with torch.backends.cudnn.flags(enabled=False):
        yield


def inner_loss_at(players: Players, batch: Batch) -> ComposedLoss:
    """Return G on a batch as a function of (theta, phi), with dropout as in the inner steps."""

    def model(theta: Tree) -> Tensor:
        players.inference_net.train()
        return functional_call(players.inference_net, theta, (batch.inputs,))

    def output_loss(logits: Tensor, phi: Tree) -> LossValue:
        view = players.view(batch, logits, phi)
        return objectives.inner(view, players.config.inner.energy_weight)

    return ComposedLoss(model, output_loss)


def outer_loss_at(players: Players, batch: Batch, generator: torch.Generator) -> Loss:
    """Return L on a batch as a function of (theta, phi), with or without dropout."""
    config = players.config.outer

    def loss(theta: Tree, phi: Tree) -> LossValue:
        players.inference_net.train(config.dropout)
        logits = functional_call(players.inference_net, theta, (batch.inputs,))
        view = players.view(batch, logits, phi, generator)
        return objectives.outer(view, config.objective, config.task_weight)

    return loss


@dataclass
class OuterStep:
    """Updates phi once per call.

    Attributes:
        players: both networks.
        optimizer: of phi.
        reduction: sums over ranks.
        rank: this process, for its samples and dropout masks.
        record: statuses, damping and warm start; part of the checkpoint.
    """

    players: Players
    optimizer: Optimizer
    reduction: Reduction
    rank: int
    record: SolverRecord

    @property
    def _config(self) -> Config:
        return self.players.config

    def __call__(self, inner_batch: Batch, outer_batch: Batch, step: int) -> Mapping[str, float]:
        """Take one outer step.

        Args:
            inner_batch: examples of G in the solve.
            outer_batch: examples of L.
            step: number of the outer step; all randomness follows from it.

        Returns:
            Scalars for the record: `outer_loss`, norms of both parts, and how the solve went.

        Raises:
            SolveFailed: when the implicit part cannot be computed and the run shall stop.
        """
        with twice_differentiable():
            if self._config.train.method == "explicit":
                return self._explicit_step(outer_batch, step)
            return self._implicit_step(inner_batch, outer_batch, step)

    def _losses(self, outer_batch: Batch, step: int) -> Loss:
        seed = self._config.train.seed
        seed_step(seed, "solve", step, self.rank)
        device = outer_batch.weight.device
        generator = step_generator(seed, "samples", step, self.rank, device)
        return outer_loss_at(self.players, outer_batch, generator)

    def _explicit_step(self, outer_batch: Batch, step: int) -> Mapping[str, float]:
        loss = self._losses(outer_batch, step)
        value, _, explicit = outer_gradients(
            loss, self.players.theta, self.players.phi, self.reduction
        )
        norm = self._update(explicit)
        return {"outer_loss": value.item(), "explicit_norm": norm}

    def _implicit_step(
        self, inner_batch: Batch, outer_batch: Batch, step: int
    ) -> Mapping[str, float]:
        probe = {"symmetry_defect": self._probe(inner_batch, step)} if step == 0 else {}
        solve = self._solve(inner_batch, outer_batch, step)
        usable = solve.status.usable
        if usable:
            self.record.start = trees.detached(solve.solution.value)
        else:
            self.record.num_skipped += 1
        self._update(solve.value if usable else solve.explicit)
        norms = torch.stack(
            [solve.outer_loss]
            + [trees.norm(t) for t in (solve.inner_gradient, solve.explicit, solve.implicit)]
        )
        loss, stationarity, explicit_norm, implicit_norm = norms.tolist()
        return {
            "outer_loss": loss,
            "stationarity": stationarity,
            "explicit_norm": explicit_norm,
            "implicit_norm": implicit_norm,
            "solver_steps": solve.num_steps,
            "residual": solve.residual,
            "damping": self.record.damping,
            "skipped": self.record.num_skipped,
            **probe,
        }

    def _probe(self, inner_batch: Batch, step: int) -> float:
        """Check once, before curvature is trusted, that u.Hv = v.Hu.

        Raises:
            SolveFailed: where it is not, as with a network whose second derivative is wrong.
        """
        seed = self._config.train.seed
        seed_step(seed, "probe", step, self.rank)
        loss = inner_loss_at(self.players, inner_batch)
        operator = build_operator(
            self._config.solver.curvature,
            loss,
            self.players.theta,
            self.players.phi,
            self.reduction,
        )
        generator = torch.Generator().manual_seed(seed)
        defect = agreed(symmetry_defect(operator, generator), self.reduction)
        if defect > MAX_SYMMETRY_DEFECT:
            raise SolveFailed(
                f"inference_net: expected a symmetric Hessian, got a defect of {defect:.1e} "
                f"(limit {MAX_SYMMETRY_DEFECT:g}); a layer's second derivative is wrong or missing"
            )
        return defect

    def _solve(self, inner_batch: Batch, outer_batch: Batch, step: int) -> Hypergradient:
        """Solve, and repeat with larger damping where the configuration says so."""
        config, record = self._config.solver, self.record
        num_repeats = config.max_repeats if config.on_failure == "damp" else 0
        while True:
            solve = hypergradient(
                inner_loss_at(self.players, inner_batch),
                self._losses(outer_batch, step),
                self.players.theta,
                self.players.phi,
                solver=build_solver(config),
                damping=record.damping,
                curvature=config.curvature,
                reduction=self.reduction,
                start=record.start if config.warm_start else None,
            )
            record.count(solve)
            if solve.status.usable:
                eased = record.damping / math.sqrt(config.damping_factor)
                record.damping = max(config.damping, eased)
                return solve
            if config.on_failure == "stop":
                raise SolveFailed(f"outer step {step}: {solve.status.value}. {solve.status.help}")
            if num_repeats == 0:
                return solve
            num_repeats -= 1
            record.damping *= config.damping_factor

    def _update(self, gradient: Tree) -> float:
        """Apply a gradient unless it is not finite, which every rank sees alike."""
        norm = trees.norm(gradient).item()
        if math.isfinite(norm):
            self.optimizer.step(gradient)
        return norm
