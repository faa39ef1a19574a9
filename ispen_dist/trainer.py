"""The training loop: rounds of inner and outer steps, with dev selection and resume."""

import signal
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ispen_dist import ops, ranges
from ispen_dist.average import MovingAverage
from ispen_dist.checkpoint import Checkpoint, CheckpointError
from ispen_dist.config import Config
from ispen_dist.config.inference import CHOICES, UNTUNED
from ispen_dist.data.datasets import Dataset
from ispen_dist.data.loading import Splits
from ispen_dist.distributed import Session
from ispen_dist.distributed.runtime import check_runtime
from ispen_dist.engine import Engines
from ispen_dist.evaluate import evaluate
from ispen_dist.inference import predict
from ispen_dist.linalg.trees import Tree
from ispen_dist.metrics import build_metrics
from ispen_dist.models.stages import Inputs
from ispen_dist.not_finite import NotFiniteRecord
from ispen_dist.players import build_players, groups_of, load_pretrained, networks_of
from ispen_dist.predictor import save_model
from ispen_dist.recording.profiler import RoundProfiler
from ispen_dist.recording.run_folder import RunFolder
from ispen_dist.rounds import Rounds
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
from ispen_dist.selection import Selection
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
        self.round = 0
        built = build_players(config, splits.codec, torch.device("cpu"))
        load_pretrained(built)
        self.engines = Engines(
            *(session.engine(n, net, groups_of(net)) for n, net in networks_of(built).items())
        )
        self.players = built.with_networks(
            self.engines.inference_net.network, self.engines.energy.network
        )
        self.metrics = build_metrics(splits.codec, config.inference.decoder)
        self.rounds = Rounds(self.schedule, self.players, self.engines, splits, session, folder)
        self.selection = Selection(self.engines, self.metrics.main)
        self.average = MovingAverage(self.engines, config.train.average_decay)
        self.seconds = 0.0
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
            figures = self.rounds.take(self.round)
            num_examples = self.rounds.num_examples(self.round)
            figures["examples_per_second"] = num_examples / (time.perf_counter() - round_begin)
            self.round += 1
            self.average.enter()
            is_logged = self._is_due(self.config.train.log_every)
            if is_logged:
                self.folder.record_round(self.round, figures)
            if self._is_due(self.config.train.eval_every):
                self._evaluate_and_select()
            if is_logged:
                self.folder.show_round(self.round, figures)
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

    def _is_due(self, every: int) -> bool:
        return self.round % every == 0 or self.round == self.num_rounds

    def _out_of_patience(self) -> bool:
        patience = self.config.train.patience
        return patience > 0 and self.selection.num_stale >= patience

    # -- evaluation and records ----------------------------------------------------------------

    @ranges.marked("evaluation")
    def _evaluate(self, dataset: Dataset, choices: Mapping[str, float]) -> dict[str, float]:
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
            choices=choices,
            rank=self.session.rank,
            reduction=self.session.reduction,
        )

    def _evaluate_and_select(self) -> None:
        """Evaluate on dev and keep the best networks, see `Schedule.select_after`.

        Where dev is trained on, it selects nothing: the present networks are kept.
        """
        with self.average.in_place():
            dev: dict[str, float] = {}
            if not self.config.data.train_on_dev:
                dev = self._evaluate(self.splits.dev, self.config.inference.choices)
                self.folder.record_dev(self.round, dev)
            head = self.engines.energy.collect(self.engines.energy.groups["head"])
            interaction = self.players.interaction(head)
            self.folder.record_interaction(self.round, interaction, self.splits.codec.output_names)
            if not self.round <= self.schedule.select_after < self.num_rounds:
                self.selection.enter(dev)

    def _finish(self, checkpoints: Mapping[str, float]) -> dict[str, Any]:
        """Restore the best networks, read test once, export, and write the summary."""
        if not self.selection.networks:
            self._evaluate_and_select()
        self.selection.load()
        tuned = {name: self.selection.dev[name] for name in CHOICES if name in self.selection.dev}
        choices = tuned | self.config.inference.choices
        test_set = self.splits.test if self.config.train.read_test else None
        test = self._evaluate(test_set, UNTUNED | choices) if test_set else {}
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
            "hypergradient": self.rounds.outer_step.record.summary(),
            "not_finite": self.rounds.not_finite.record.state(),
            "checkpoints": checkpoints,
        }
        if compiler := self.rounds.compiler:
            count, seconds = len(compiler.names), round(compiler.seconds, 3)
            summary["compiled"] = {"functions": count, "seconds": seconds}
        self.session.watchdog.beat("export")
        self._export(choices)
        self.folder.finish(summary)
        self._require_everything_written()
        return summary

    def _export(self, choices: Mapping[str, float]) -> None:
        """Write the model folder; tensors come to the main process one at a time."""
        is_main = self.session.is_main
        weights = {
            name: whole(engine, engine.parameters(), is_main=is_main)
            for name, engine in self.engines.items()
        }
        if is_main:
            with self.folder.failures.watching("model"):
                save_model(self.folder.model, weights, self.config, self.splits.codec, choices)

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
        record, is_main = self.rounds.outer_step.record, self.session.is_main
        return trees_of(self.engines, self._copies, record, is_main=is_main)

    @property
    def _copies(self) -> dict[str, dict[str, Tree]]:
        """Copies of both networks that a run keeps besides, by the name in a checkpoint."""
        return {"best": self.selection.networks, "average": self.average.networks}

    def _state(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "seed": self.config.train.seed,
            "data": self.splits.digest,
            "seconds": self.seconds,
            "best_dev": self.selection.dev,
            "num_stale": self.selection.num_stale,
            "phases": phases_of(self.engines),
            "solver": solver_state(self.rounds.outer_step.record),
            "not_finite": self.rounds.not_finite.record.state(),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, on any number of ranks and under any engine."""
        trees, state, device = checkpoint.trees, checkpoint.state, self.session.device
        self.round, self.seconds = state["round"], state["seconds"]
        self.selection.dev, self.selection.num_stale = state["best_dev"], state["num_stale"]
        if state["phases"]["energy"]["name"] == self.rounds.learning.name:
            self.engines.energy.begin(self.rounds.learning)
        try:
            restore_trees(self.engines, self._copies, trees, state["phases"], device)
        except ValueError as error:
            raise CheckpointError(f"checkpoint of round {self.round}: {error}") from None
        if "not_finite" in state:  # Runs before 2026-11-25 ended at the first such step.
            self.rounds.not_finite.record = NotFiniteRecord.from_state(state["not_finite"])
        for _, engine in self.engines.items():
            engine.rate_factor = self.rounds.not_finite.record.rate_factor
        start = own(self.engines.inference_net, trees["solver_start"], device)
        self.rounds.outer_step.record = solver_record(state["solver"], start)
