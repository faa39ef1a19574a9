"""The steps of the rounds: their batches, the phases of both networks, and what became of them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ispen_dist.config import OptimizerConfig
from ispen_dist.data.batch import Batch
from ispen_dist.data.datasets import Dataset, whole_of
from ispen_dist.data.loading import Splits, hold_out
from ispen_dist.data.segmentation import augmentation
from ispen_dist.diagnosis import Diagnosis
from ispen_dist.distributed import Session
from ispen_dist.engine import Engines
from ispen_dist.graphs.compiler import Compiler
from ispen_dist.inner import Statistics, inner_step, pretrain_local_step
from ispen_dist.inner_program import InnerProgram
from ispen_dist.not_finite import NotFiniteWatch, mean_of_finite
from ispen_dist.optim import Phase
from ispen_dist.outer import OuterStep, SolverRecord
from ispen_dist.players import Players
from ispen_dist.recording.run_folder import RunFolder
from ispen_dist.schedule import Schedule
from ispen_dist.seeding import derived_seed, seed_step, step_generator
from ispen_dist.source import Source, buckets_of


class Rounds:
    """Takes the inner and the outer steps of one round after the other.

    Args:
        schedule: which steps each round has.
        players: both networks.
        engines: which train them.
        splits: the data sets.
        session: this process among the others.
        folder: takes the residuals of solves, and messages.

    Attributes:
        compiler: of the steps, where any are compiled.
        learning: the phase of the energy in outer steps; before, it is pre-trained.
        outer_step: the energy's step, with the record of its solves.
        not_finite: what follows from steps that were left out.
        inner_source: batches of inner steps.
    """

    def __init__(
        self,
        schedule: Schedule,
        players: Players,
        engines: Engines,
        splits: Splits,
        session: Session,
        folder: RunFolder,
    ) -> None:
        self.config, self.schedule = players.config, schedule
        self.players, self.engines = players, engines
        self.session, self.folder = session, folder
        self.compiler: Compiler | None = None
        if self.config.compile.any:
            self.compiler = Compiler(self.config.compile.backend, self._report_compiled)
        self._build_sources(splits)
        self._build_phases()
        self._build_steps()
        self.not_finite = NotFiniteWatch(self.config.train, self._locate, folder.message)

    def _build_sources(self, splits: Splits) -> None:
        config, seed = self.config, self.config.train.seed
        dtype = torch.float64 if config.train.dtype == "float64" else torch.float32
        inner_data, outer_data = hold_out(config, splits.train)
        size, buckets = config.outer.batch_size, buckets_of(config.compile)

        def source(dataset: Dataset, batch_size: int, purpose: str) -> Source:
            order = derived_seed(seed, "order", purpose)
            draws = derived_seed(seed, "augmentation", purpose)
            augment = augmentation(config.data, draws, whole_of(dataset))
            return Source(dataset, batch_size, order, self.session, dtype, buckets, augment)

        self.inner_source = source(inner_data, config.inner.batch_size, "inner")
        self.outer_source = source(outer_data, size, "outer")
        self.solve_source = (
            self.outer_source if inner_data is outer_data else source(inner_data, size, "solve")
        )

    def _build_phases(self) -> None:
        config, train, schedule = self.config, self.config.train, self.schedule
        local = OptimizerConfig(
            learning_rate=config.inner.pretrain_learning_rate,
            weight_decay=config.inner.optimizer.weight_decay,
            final_fraction=0.0,
            clip_norm=config.inner.optimizer.clip_norm,
            pretrained_factor=config.inner.optimizer.pretrained_factor,
        )
        num_inner, num_warmup = (
            schedule.first_inner(n) for n in (schedule.num_rounds, train.warmup_rounds)
        )
        network, energy = self.engines.inference_net, self.engines.energy
        local_groups = frozenset(energy.groups) - {"head"}
        learned = frozenset(energy.groups) - (local_groups if config.energy.freeze_local else set())
        outer = config.outer.optimizer
        network.begin(Phase("inner", config.inner.optimizer, num_inner, frozenset(network.groups)))
        pretraining = Phase("pretrain", local, num_warmup, local_groups)
        num_outer = train.max_outer_steps * config.outer.steps
        self.learning = Phase("outer", outer, num_outer, learned)
        begins = pretraining if schedule.is_warm_up(0) else self.learning
        energy.begin(begins)

    def _build_steps(self) -> None:
        config = self.config
        self.outer_step = OuterStep(
            self.players,
            self.engines,
            self.session.rank,
            SolverRecord(damping=config.solver.damping),
            self.compiler if config.compile.curvature else None,
        )
        self.inner_program: InnerProgram | None = None
        if config.compile.inner:
            assert self.compiler is not None
            self.inner_program = InnerProgram(
                self.players,
                self.engines,
                self.compiler,
                whole_round=config.compile.whole_round,
            )

    def take(self, number: int) -> dict[str, float]:
        """Take the inner and the outer steps of a round, and return the figures.

        Args:
            number: of the round, from 0.

        Raises:
            NotFinite: see `train.on_not_finite`.
        """
        figures = self._inner_steps(number) if self.schedule.has_inner(number) else {}
        if self.schedule.has_outer(number):
            figures |= self._outer_steps(number)
        figures["not_finite"] = self._follow_not_finite(number)
        return figures

    def num_examples(self, number: int) -> int:
        """Return how many examples the steps of a round read."""
        config = self.config
        inner, outer = self.schedule.has_inner(number), self.schedule.has_outer(number)
        of_inner = config.inner.steps * config.inner.batch_size * inner
        return of_inner + config.outer.steps * config.outer.batch_size * outer

    def _outer_steps(self, number: int) -> dict[str, float]:
        if self.engines.energy.phase is not self.learning:
            self.engines.energy.begin(self.learning)
        first = self.schedule.first_outer(number)
        rows: list[Mapping[str, float]] = []
        for step in range(first, first + self.config.outer.steps):
            self.session.watchdog.beat("outer step")
            rows.append(self.outer_step(*self._outer_batches(step), step))
            self.folder.record_solve(number + 1, self.outer_step.residuals)
        self.not_finite.enter_outer([row["update_norm"] for row in rows])
        # The first step of a run has more figures than the others.
        return {k: mean_of_finite([row[k] for row in rows if k in row]) for k in rows[0]}

    def _outer_batches(self, step: int) -> tuple[Batch, Batch]:
        """Return the batches of the solve and of the outer loss."""
        outer_batch = self.outer_source.batch(step)
        same = self.solve_source is self.outer_source
        return outer_batch if same else self.solve_source.batch(step), outer_batch

    def _inner_steps(self, number: int) -> dict[str, float]:
        config = self.config
        energy_weight = self.schedule.energy_weight(number)
        pretrains = (
            self.schedule.is_warm_up(number)
            and self.schedule.learns_energy
            and config.inner.pretrain_learning_rate > 0.0
        )
        first = self.schedule.first_inner(number)
        self.session.watchdog.beat("reading")
        batches = [self.inner_source.batch(first + i) for i in range(config.inner.steps)]

        def seed(i: int) -> None:
            self.session.watchdog.beat("inner step")
            seed_step(config.train.seed, "inner", first + i, self.session.rank)

        rows: list[dict[str, Tensor]] = []
        pretrained: list[Statistics] = []

        def pretrain(i: int) -> None:
            """The local energy's step, which draws after the masks of the inner step."""
            if pretrains:
                step = pretrain_local_step(self.players, self.engines, batches[i])
                pretrained.append(step)

        if self.inner_program is not None:
            rows = [dict(r) for r in self.inner_program(batches, energy_weight, seed, pretrain)]
        else:
            for i, batch in enumerate(batches):
                seed(i)
                rows.append(dict(inner_step(self.players, self.engines, batch, energy_weight)))
                pretrain(i)
        for row, more in zip(rows, pretrained, strict=False):
            row |= more
        return self._means(rows)

    def _means(self, rows: list[dict[str, Tensor]]) -> dict[str, float]:
        """Average the figures of a round's inner steps; the one host read of these steps."""
        values = torch.stack([torch.stack(list(row.values())) for row in rows]).tolist()
        return self.not_finite.means([dict(zip(rows[0], v, strict=True)) for v in values])

    def _follow_not_finite(self, number: int) -> int:
        """Follow `train.on_not_finite` after a round; return how many steps were left out."""
        factor = self.not_finite.end_round(number + 1)
        for _, engine in self.engines.items():
            engine.rate_factor = factor
        return self.not_finite.record.skipped.total()

    def _locate(self, round: int, kind: str, step: int) -> str:
        """Say where a step of a round was not finite; every rank calls it."""
        diagnosis = Diagnosis(self.players, self.engines, self.session.gather_texts)
        if kind != "outer":
            number = self.schedule.first_inner(round - 1) + step
            return diagnosis.inner(self.inner_source.batch(number))
        number = self.schedule.first_outer(round - 1) + step
        seed, session = self.config.train.seed, self.session
        generator = step_generator(seed, "samples", number, session.rank, session.device)
        return diagnosis.outer(*self._outer_batches(number), generator)

    def _report_compiled(self, text: str) -> None:
        self.session.watchdog.beat("compile")
        self.folder.message(text)
