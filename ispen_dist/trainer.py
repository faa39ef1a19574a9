"""The training loop: rounds of inner steps and one outer step, with dev selection and resume."""

import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ispen_dist.checkpoint import (
    Checkpoint,
    load_optimizer_tree,
    optimizer_tree,
    save_checkpoint,
)
from ispen_dist.config import Config, OptimizerConfig
from ispen_dist.data.datasets import Dataset
from ispen_dist.data.loading import Splits, hold_out
from ispen_dist.distributed import Session
from ispen_dist.evaluate import evaluate
from ispen_dist.inner import inner_step, pretrain_local_step
from ispen_dist.linalg.trees import Tree
from ispen_dist.metrics import build_metrics
from ispen_dist.optim import Optimizer
from ispen_dist.outer import OuterStep, SolverRecord
from ispen_dist.players import build_players
from ispen_dist.predictor import Predictor
from ispen_dist.recording.run_folder import RunFolder
from ispen_dist.seeding import derived_seed, seed_step
from ispen_dist.source import Source


class NotFinite(RuntimeError):
    """The inner loss became NaN or infinite."""


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
        self.players = build_players(config, splits.codec, session.device)
        session.replicate(self.players.inference_net, self.players.energy)
        self.metrics = build_metrics(splits.codec)
        self._build_sources()
        self._build_optimizers()
        self.round = 0
        self.best: dict[str, dict[str, Tensor]] = {}
        self.best_dev: dict[str, float] = {}
        self.num_stale = 0
        self.seconds = 0.0

    @property
    def num_rounds(self) -> int:
        """Rounds of the whole run, warm-up included."""
        return self.config.train.warmup_rounds + self.config.train.max_outer_steps

    @property
    def _warming_up(self) -> bool:
        return self.round < self.config.train.warmup_rounds

    def _build_sources(self) -> None:
        config, seed = self.config, self.config.train.seed
        dtype = next(self.players.inference_net.parameters()).dtype
        inner_data, outer_data = hold_out(config, self.splits.train)
        size = config.outer.batch_size

        def source(dataset: Dataset, batch_size: int, purpose: str) -> Source:
            order = derived_seed(seed, "order", purpose)
            return Source(dataset, batch_size, order, self.session, dtype)

        self.inner_source = source(inner_data, config.inner.batch_size, "inner")
        self.outer_source = source(outer_data, size, "outer")
        self.solve_source = (
            self.outer_source if inner_data is outer_data else source(inner_data, size, "solve")
        )

    def _build_optimizers(self) -> None:
        config, train = self.config, self.config.train
        num_warmup = train.warmup_rounds * config.inner.steps
        local = OptimizerConfig(
            learning_rate=config.inner.pretrain_learning_rate,
            weight_decay=config.inner.optimizer.weight_decay,
            final_fraction=0.0,
            clip_norm=config.inner.optimizer.clip_norm,
        )
        num_inner = self.num_rounds * config.inner.steps
        self.optimizers = {
            "theta": Optimizer(self.players.theta, config.inner.optimizer, num_inner),
            "local": Optimizer(self.players.local, local, num_warmup),
            "phi": Optimizer(self.players.phi, config.outer.optimizer, train.max_outer_steps),
        }
        self.outer_step = OuterStep(
            self.players,
            self.optimizers["phi"],
            self.session.reduction,
            self.session.rank,
            SolverRecord(damping=config.solver.damping),
        )

    # -- the loop ------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train to the end and return the summary; every rank calls it."""
        begin = time.perf_counter() - self.seconds
        first_round = self.round
        self.folder.start(self.num_rounds, first_round)
        while self.round < self.num_rounds and not self._out_of_patience():
            round_begin = time.perf_counter()
            figures = self.train_round()
            self.round += 1
            figures["examples_per_second"] = self._examples_per_round / (
                time.perf_counter() - round_begin
            )
            self._record(figures)
            if self._is_due(self.config.train.eval_every):
                self._evaluate_and_select()
            self.seconds = time.perf_counter() - begin
            if self._is_due(self.config.train.checkpoint_every):
                self.save()
        return self._finish()

    def train_round(self) -> dict[str, float]:
        """Take the inner steps of one round and its outer step, and return the figures."""
        figures = self._inner_steps()
        if not self._warming_up and self.config.train.method != "mle":
            step = self.round - self.config.train.warmup_rounds
            outer_batch = self.outer_source.batch(step)
            same = self.solve_source is self.outer_source
            inner_batch = outer_batch if same else self.solve_source.batch(step)
            figures.update(self.outer_step(inner_batch, outer_batch, step))
        return figures

    def _inner_steps(self) -> dict[str, float]:
        config, reduction = self.config, self.session.reduction
        learns_energy = config.train.method != "mle"
        energy_weight = config.inner.energy_weight if learns_energy else 0.0
        rows = []
        for i in range(config.inner.steps):
            step = self.round * config.inner.steps + i
            batch = self.inner_source.batch(step)
            seed_step(config.train.seed, "inner", step, self.session.rank)
            row = dict(
                inner_step(
                    self.players,
                    self.optimizers["theta"],
                    batch,
                    0.0 if self._warming_up else energy_weight,
                    reduction,
                )
            )
            if self._warming_up and learns_energy and config.inner.pretrain_learning_rate > 0.0:
                row |= pretrain_local_step(self.players, self.optimizers["local"], batch, reduction)
            rows.append(row)
        return self._means(rows)

    def _means(self, rows: list[dict[str, Tensor]]) -> dict[str, float]:
        """Average the figures of a round's inner steps; the one host read of these steps."""
        values = torch.stack([torch.stack(list(row.values())) for row in rows]).mean(0).tolist()
        figures = dict(zip(rows[0], values, strict=True))
        if not math.isfinite(figures["inner_loss"]):
            raise NotFinite(
                f"round {self.round}: expected a finite inner loss, got {figures['inner_loss']}; "
                "lower inner.optimizer.learning_rate or inner.energy_weight"
            )
        return figures

    @property
    def _examples_per_round(self) -> int:
        config = self.config
        outer = 0 if self._warming_up or config.train.method == "mle" else config.outer.batch_size
        return config.inner.steps * config.inner.batch_size + outer

    def _is_due(self, every: int) -> bool:
        return self.round % every == 0 or self.round == self.num_rounds

    def _out_of_patience(self) -> bool:
        patience = self.config.train.patience
        return patience > 0 and self.num_stale >= patience

    # -- evaluation and records ----------------------------------------------------------------

    def _evaluate(self, dataset: Dataset, threshold: float | None = None) -> dict[str, float]:
        return evaluate(
            self.players.inference_net,
            self.players.space,
            self.metrics,
            dataset,
            threshold=threshold,
            rank=self.session.rank,
            reduction=self.session.reduction,
        )

    def _networks(self) -> dict[str, nn.Module]:
        return {"inference_net": self.players.inference_net, "energy": self.players.energy}

    def _evaluate_and_select(self) -> None:
        """Evaluate on dev and keep the best networks since the end of the warm-up."""
        dev = self._evaluate(self.splits.dev)
        self.folder.record_dev(self.round, dev)
        self.folder.record_interaction(
            self.round, self.players.energy.interaction(), self.splits.codec.output_names
        )
        if self.round <= self.config.train.warmup_rounds < self.num_rounds:
            return
        main = self.metrics.main
        if not self.best_dev or dev[main] > self.best_dev[main]:
            self.best_dev, self.num_stale = dev, 0
            self.best = {
                name: {k: v.detach().clone() for k, v in network.state_dict().items()}
                for name, network in self._networks().items()
            }
        else:
            self.num_stale += 1

    def _record(self, figures: Mapping[str, float]) -> None:
        last = self.round == self.num_rounds
        if last or self.round % self.config.train.log_every == 0:
            self.folder.record_round(self.round, figures)

    def _finish(self) -> dict[str, Any]:
        """Restore the best networks, read test once, export, and write the summary."""
        if not self.best_dev:
            self._evaluate_and_select()
        for name, network in self._networks().items():
            if name in self.best:
                network.load_state_dict(self.best[name])
        threshold = self.best_dev.get("threshold")
        test = self._evaluate(self.splits.test, threshold) if self.splits.test else {}
        summary = {
            "task": self.config.data.task,
            "method": self.config.train.method,
            "seed": self.config.train.seed,
            "world_size": self.session.num_ranks,
            "rounds": self.round,
            "seconds": round(self.seconds, 3),
            "dev": self.best_dev,
            "test": test,
            "hypergradient": self.outer_step.record.summary(),
        }
        self.folder.finish(summary, Predictor(self.players, self.splits.codec, threshold))
        self.session.barrier()
        return summary

    # -- checkpoints ---------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of everything that changes; replicas are alike, so rank 0 writes."""
        if self.session.is_main:
            save_checkpoint(
                self.folder.checkpoints,
                self.round,
                self._trees(),
                self._state(),
                self.config.train.keep_checkpoints,
            )
        self.session.barrier()

    def _trees(self) -> dict[str, Tree]:
        trees = {name: dict(net.state_dict()) for name, net in self._networks().items()}
        for name, optimizer in self.optimizers.items():
            trees[f"{name}_optimizer"] = optimizer_tree(optimizer.adamw, list(optimizer.parameters))
        trees["solver_start"] = self.outer_step.record.start or {}
        trees |= {f"best_{name}": tree for name, tree in self.best.items()}
        return trees

    def _state(self) -> dict[str, Any]:
        record = self.outer_step.record
        return {
            "round": self.round,
            "seed": self.config.train.seed,
            "seconds": self.seconds,
            "best_dev": self.best_dev,
            "num_stale": self.num_stale,
            "optimizer_steps": {name: o.num_taken for name, o in self.optimizers.items()},
            "solver": {
                "damping": record.damping,
                "statuses": dict(record.statuses),
                "num_skipped": record.num_skipped,
                "num_steps": record.num_steps,
                "residual_sum": record.residual_sum,
                "num_residuals": record.num_residuals,
            },
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, on any number of ranks."""
        trees, state = checkpoint.trees, checkpoint.state
        for name, network in self._networks().items():
            network.load_state_dict(trees[name])
            if f"best_{name}" in trees:
                self.best[name] = self._to_device(trees[f"best_{name}"])
        for name, optimizer in self.optimizers.items():
            tree = trees[f"{name}_optimizer"]
            load_optimizer_tree(optimizer.adamw, list(optimizer.parameters), tree)
            optimizer.num_taken = state["optimizer_steps"][name]
        solver = dict(state["solver"])
        solver["statuses"] = Counter(solver["statuses"])
        start = self._to_device(trees["solver_start"]) or None
        self.outer_step.record = SolverRecord(start=start, **solver)
        self.round, self.seconds = state["round"], state["seconds"]
        self.best_dev, self.num_stale = state["best_dev"], state["num_stale"]

    def _to_device(self, tree: Tree) -> Tree:
        return {key: value.to(self.session.device) for key, value in tree.items()}
