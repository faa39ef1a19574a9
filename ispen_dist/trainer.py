"""The training loop: rounds of inner and outer steps, with dev selection and resume."""

import signal
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ispen_dist import ops, ranges
from ispen_dist.checkpoint import Checkpoint
from ispen_dist.config import Config, OptimizerConfig
from ispen_dist.data.batch import Batch
from ispen_dist.data.datasets import Dataset
from ispen_dist.data.loading import Splits, hold_out
from ispen_dist.data.segmentation import augmentation
from ispen_dist.diagnosis import Diagnosis
from ispen_dist.distributed import Session
from ispen_dist.distributed.runtime import check_runtime
from ispen_dist.engine import Engines
from ispen_dist.evaluate import evaluate
from ispen_dist.graphs.compiler import Compiler
from ispen_dist.inference import predict
from ispen_dist.inner import Statistics, inner_step, pretrain_local_step
from ispen_dist.inner_program import InnerProgram
from ispen_dist.linalg.trees import Tree
from ispen_dist.metrics import build_metrics
from ispen_dist.models.stages import Inputs
from ispen_dist.not_finite import NotFiniteRecord, NotFiniteWatch, mean_of_finite
from ispen_dist.optim import Phase
from ispen_dist.outer import OuterStep, SolverRecord
from ispen_dist.players import build_players, groups_of, load_pretrained, networks_of
from ispen_dist.predictor import save_model
from ispen_dist.recording.profiler import RoundProfiler
from ispen_dist.recording.run_folder import RunFolder
from ispen_dist.run_state import (
    own,
    phases_of,
    restore_trees,
    solver_record,
    solver_state,
    trees_of,
    whole,
)
from ispen_dist.saver import Saver
from ispen_dist.schedule import Schedule
from ispen_dist.seeding import derived_seed, seed_step, step_generator
from ispen_dist.selection import Selection
from ispen_dist.source import Source, buckets_of
from ispen_dist.stopping import Boundary, Stopped


class Trainer:
    """A run: everything that changes while it trains, and the loop that changes it.

    Args:
        config: all settings.
        splits: the data sets.
        session: this process among the others.
        folder: records of the run; writes on the main process only.
    """

    def __init__(self, config: Config, splits: Splits, session: Session, folder: RunFolder) -> None:
        self.config, self.splits, self.session, self.folder = config, splits, session, folder
        self.schedule = Schedule(config)
        check_runtime(config, session.runtime)
        ops.set_kernels(config.compile.kernels)
        self.compiler: Compiler | None = None
        if config.compile.any:
            self.compiler = Compiler(config.compile.backend, self._report_compiled)
        self.round = 0
        built = build_players(config, splits.codec, torch.device("cpu"))
        load_pretrained(built)
        self.engines = Engines(
            *(session.engine(n, net, groups_of(net)) for n, net in networks_of(built).items())
        )
        self.players = built.with_networks(
            self.engines.inference_net.network, self.engines.energy.network
        )
        self.metrics = build_metrics(splits.codec)
        self._build_sources()
        self._build_phases()
        self.selection = Selection(self.engines, self.metrics.main)
        self.seconds = 0.0
        self.not_finite = NotFiniteWatch(config.train, self._locate, folder.message)
        self.saver = Saver(
            folder.checkpoints,
            folder.failures,
            is_main=session.is_main,
            keep=config.train.keep_checkpoints,
            sync=folder.sync,
        )
        self.profiler = RoundProfiler(config, session, folder)
        self.boundary = Boundary(session.largest)
        self.boundary.add("stop", lambda: session.stop.signal)
        self.boundary.add("not written", lambda: folder.failures.must_stop)

    @property
    def num_rounds(self) -> int:
        """Rounds of the whole run, warm-up included."""
        return self.schedule.num_rounds

    def _build_sources(self) -> None:
        config, seed = self.config, self.config.train.seed
        dtype = torch.float64 if config.train.dtype == "float64" else torch.float32
        inner_data, outer_data = hold_out(config, self.splits.train)
        size, buckets = config.outer.batch_size, buckets_of(config.compile)

        def source(dataset: Dataset, batch_size: int, purpose: str) -> Source:
            order = derived_seed(seed, "order", purpose)
            augment = augmentation(config.data, derived_seed(seed, "augmentation", purpose))
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
        )
        num_inner, num_warmup = (
            schedule.first_inner(n) for n in (self.num_rounds, train.warmup_rounds)
        )
        learned = frozenset({"head"} if config.energy.freeze_local else {"local", "head"})
        outer = config.outer.optimizer
        self.engines.inference_net.begin(
            Phase("inner", config.inner.optimizer, num_inner, frozenset({"all"}))
        )
        self.pretraining = Phase("pretrain", local, num_warmup, frozenset({"local"}))
        num_outer = train.max_outer_steps * config.outer.steps
        self.learning = Phase("outer", outer, num_outer, learned)
        begins = self.pretraining if schedule.is_warm_up(self.round) else self.learning
        self.engines.energy.begin(begins)
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

    # -- the loop ------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end and return the summary; every rank calls it.

        Raises:
            Stopped: after a signal to any rank, with everything saved.
            NotFinite: see `train.on_not_finite`.
            StorageFailed: on all ranks, see `train.on_save_error`.
        """
        with self.saver, self.profiler:
            return self._run()

    def _run(self) -> dict[str, Any]:
        begin = time.perf_counter()
        before = self.seconds
        self.folder.start(self.num_rounds, self.round)
        self._require_everything_written()
        self.profiler.begin(self.round)
        while self.round < self.num_rounds and not self._out_of_patience():
            round_begin = time.perf_counter()
            figures = self.train_round()
            self.round += 1
            figures["not_finite"] = self._follow_not_finite()
            figures["examples_per_second"] = self._examples_per_round / (
                time.perf_counter() - round_begin
            )
            self._record(figures)
            if self._is_due(self.config.train.eval_every):
                self._evaluate_and_select()
            self.seconds = before + time.perf_counter() - begin
            self.saver.look()
            told = self.boundary()
            if told["not written"]:
                raise self.folder.failures.error()
            if told["stop"] or self._must_save():
                self.save()
            if told["stop"]:
                self.saver.finish()
                self._require_everything_written()
                raise Stopped(self.round, signal.Signals(told["stop"]).name)
            self.profiler.end_round()
        self.saver.finish()
        return self._finish(self.saver.summary(time.perf_counter() - begin))

    def train_round(self) -> dict[str, float]:
        """Take the inner and the outer steps that the schedule has, and return the figures."""
        figures = self._inner_steps() if self.schedule.has_inner(self.round) else {}
        if self.schedule.has_outer(self.round):
            figures |= self._outer_steps()
        return figures

    def _outer_steps(self) -> dict[str, float]:
        if self.engines.energy.phase is not self.learning:
            self.engines.energy.begin(self.learning)
        first = self.schedule.first_outer(self.round)
        rows: list[Mapping[str, float]] = []
        for step in range(first, first + self.config.outer.steps):
            self.session.watchdog.beat("outer step")
            rows.append(self.outer_step(*self._outer_batches(step), step))
            self.folder.record_solve(self.round + 1, self.outer_step.residuals)
        self.not_finite.enter_outer([row["update_norm"] for row in rows])
        # The first step of a run has more figures than the others.
        return {k: mean_of_finite([row[k] for row in rows if k in row]) for k in rows[0]}

    def _outer_batches(self, step: int) -> tuple[Batch, Batch]:
        """Return the batches of the solve and of the outer loss."""
        outer_batch = self.outer_source.batch(step)
        same = self.solve_source is self.outer_source
        return outer_batch if same else self.solve_source.batch(step), outer_batch

    def _inner_steps(self) -> dict[str, float]:
        config = self.config
        energy_weight = self.schedule.energy_weight(self.round)
        pretrains = (
            self.schedule.is_warm_up(self.round)
            and self.schedule.learns_energy
            and config.inner.pretrain_learning_rate > 0.0
        )
        first = self.schedule.first_inner(self.round)
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

    def _follow_not_finite(self) -> int:
        """Follow `train.on_not_finite` after a round; return how many steps were left out."""
        factor = self.not_finite.end_round(self.round)
        for _, engine in self.engines.items():
            engine.rate_factor = factor
        return self.not_finite.record.skipped.total()

    def _locate(self, kind: str, step: int) -> str:
        """Say where a step of the round that just ended was not finite; every rank calls it."""
        diagnosis = Diagnosis(self.players, self.engines, self.session.gather_texts)
        begun = self.round - 1
        if kind != "outer":
            number = self.schedule.first_inner(begun) + step
            return diagnosis.inner(self.inner_source.batch(number))
        number = self.schedule.first_outer(begun) + step
        seed, session = self.config.train.seed, self.session
        generator = step_generator(seed, "samples", number, session.rank, session.device)
        return diagnosis.outer(*self._outer_batches(number), generator)

    def _report_compiled(self, text: str) -> None:
        self.session.watchdog.beat("compile")
        self.folder.message(text)

    @property
    def _examples_per_round(self) -> int:
        """Examples of the round that has just ended."""
        config, begun = self.config, self.round - 1
        inner, outer = self.schedule.has_inner(begun), self.schedule.has_outer(begun)
        of_inner = config.inner.steps * config.inner.batch_size * inner
        return of_inner + config.outer.steps * config.outer.batch_size * outer

    def _is_due(self, every: int) -> bool:
        return self.round % every == 0 or self.round == self.num_rounds

    def _out_of_patience(self) -> bool:
        patience = self.config.train.patience
        return patience > 0 and self.selection.num_stale >= patience

    # -- evaluation and records ----------------------------------------------------------------

    @ranges.marked("evaluation")
    def _evaluate(self, dataset: Dataset, threshold: float | None = None) -> dict[str, float]:
        engine = self.engines.inference_net

        def logits(inputs: Inputs) -> Tensor:
            self.session.watchdog.beat("evaluation")
            return predict(self.players, self.engines, inputs)

        return evaluate(
            logits,
            self.players.space,
            self.metrics,
            dataset,
            next(iter(engine.parameters().values())),
            threshold=threshold,
            rank=self.session.rank,
            reduction=self.session.reduction,
        )

    def _evaluate_and_select(self) -> None:
        """Evaluate on dev and keep the best networks, see `Schedule.select_after`."""
        dev = self._evaluate(self.splits.dev)
        self.folder.record_dev(self.round, dev)
        head = self.engines.energy.collect(self.engines.energy.groups["head"])
        interaction = self.players.interaction(head)
        self.folder.record_interaction(self.round, interaction, self.splits.codec.output_names)
        if self.round <= self.schedule.select_after < self.num_rounds:
            return
        self.selection.enter(dev)

    def _record(self, figures: Mapping[str, float]) -> None:
        last = self.round == self.num_rounds
        if last or self.round % self.config.train.log_every == 0:
            self.folder.record_round(self.round, figures)

    def _finish(self, checkpoints: Mapping[str, float]) -> dict[str, Any]:
        """Restore the best networks, read test once, export, and write the summary."""
        if not self.selection.dev:
            self._evaluate_and_select()
        self.selection.load()
        threshold = self.selection.dev.get("threshold")
        test_set = self.splits.test if self.config.train.read_test else None
        test = self._evaluate(test_set, threshold) if test_set else {}
        summary = {
            "task": self.config.data.task,
            "method": self.config.train.method,
            "seed": self.config.train.seed,
            "world_size": self.session.num_ranks,
            "runtime": self.session.runtime.name,
            "rounds": self.round,
            "train_examples": len(self.splits.train),
            "seconds": round(self.seconds, 3),
            "dev": self.selection.dev,
            "test": test,
            "hypergradient": self.outer_step.record.summary(),
            "not_finite": self.not_finite.record.state(),
            "checkpoints": checkpoints,
        }
        if self.compiler is not None:
            count, seconds = len(self.compiler.names), round(self.compiler.seconds, 3)
            summary["compiled"] = {"functions": count, "seconds": seconds}
        self.session.watchdog.beat("export")
        self._export(threshold)
        self.folder.finish(summary)
        self._require_everything_written()
        return summary

    def _export(self, threshold: float | None) -> None:
        """Write the model folder; tensors come to the main process one at a time."""
        is_main = self.session.is_main
        weights = {
            name: whole(engine, engine.parameters(), is_main=is_main)
            for name, engine in self.engines.items()
        }
        if is_main:
            with self.folder.failures.watching("model"):
                save_model(self.folder.model, weights, self.config, self.splits.codec, threshold)

    # -- checkpoints ---------------------------------------------------------------------------

    @ranges.marked("checkpoint")
    def save(self) -> None:
        """Have a checkpoint written of everything that changes, as whole tensors.

        So it can be resumed on another number of ranks and under another engine. Training goes on
        when the state is copied to the main process; `saver.wait` waits for the rest.
        """
        self.session.watchdog.beat("save")
        best = self.selection.best if self.config.train.keep_best else None
        record = partial(self.folder.record_save, self.round)
        self.saver.save(self.round, self._trees, self._state(), record, best)

    def _must_save(self) -> bool:
        return self._is_due(self.config.train.checkpoint_every) or self._out_of_patience()

    def _require_everything_written(self) -> None:
        """End the run on all ranks alike if something is missing on the disk."""
        if any(self.session.largest([len(self.folder.failures.unwritten)])):
            raise self.folder.failures.error()

    def _trees(self) -> dict[str, Tree]:
        record, is_main = self.outer_step.record, self.session.is_main
        return trees_of(self.engines, self.selection, record, is_main=is_main)

    def _state(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "seed": self.config.train.seed,
            "seconds": self.seconds,
            "best_dev": self.selection.dev,
            "num_stale": self.selection.num_stale,
            "phases": phases_of(self.engines),
            "solver": solver_state(self.outer_step.record),
            "not_finite": self.not_finite.record.state(),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, on any number of ranks and under any engine."""
        trees, state, device = checkpoint.trees, checkpoint.state, self.session.device
        self.round, self.seconds = state["round"], state["seconds"]
        self.selection.dev, self.selection.num_stale = state["best_dev"], state["num_stale"]
        if state["phases"]["energy"]["name"] == self.learning.name:
            self.engines.energy.begin(self.learning)
        restore_trees(self.engines, self.selection, trees, state["phases"], device)
        if "not_finite" in state:  # Runs before 2026-11-25 ended at the first such step.
            self.not_finite.record = NotFiniteRecord.from_state(state["not_finite"])
        for _, engine in self.engines.items():
            engine.rate_factor = self.not_finite.record.rate_factor
        start = own(self.engines.inference_net, trees["solver_start"], device)
        self.outer_step.record = solver_record(state["solver"], start)
