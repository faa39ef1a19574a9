"""How much of a hypergradient is signal, and whether the network answers as it says.

    python profiling/signal_to_noise.py --run RUN --output profiling/results/signal_to_noise.csv

Takes a checkpoint of a run on one process and computes the hypergradients of many batches at its
parameters, which stand still. Of R of them, h_1 to h_R with mean m,

    noise^2 = sum_r |h_r - m|^2 / (R - 1),        signal^2 = |m|^2 - noise^2 / R   (unbiased),

and the ratio of both says what one outer step sees; `noise_scale`, noise^2 / signal^2 times the
size of a batch, is the batch at which it is 1 (McCandlish et al. 2018, arXiv 1812.06162).
`dev_cosine` compares m with the mean over as many batches of dev: how much of the signal holds for
examples that were not trained on.

The formula assumes that theta follows the energy to its optimum. `--response` measures it: phi is
moved to both sides along the implicit part, as far as one outer step goes, theta takes K inner
steps after each, on the same batches, and the difference of the outer losses is divided by the
predicted one. 1 is an answer in full; what is missing is what the next outer step asks for again.
"""

import argparse
import math
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from bench_hypergradient import commit
from csv_rows import append_rows
from rich.console import Console as Screen
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ispen_dist.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from ispen_dist.command_line import load_config
from ispen_dist.config import Config
from ispen_dist.data.batch import Batch
from ispen_dist.data.datasets import Dataset
from ispen_dist.data.loading import load_splits
from ispen_dist.distributed import Session
from ispen_dist.implicit import Hypergradient
from ispen_dist.inner import inner_step
from ispen_dist.linalg import trees
from ispen_dist.linalg.reduction import OneProcess, own_share
from ispen_dist.linalg.trees import Tree
from ispen_dist.losses import Losses
from ispen_dist.outer import twice_differentiable
from ispen_dist.recording.console import Console
from ispen_dist.recording.run_folder import RunFolder
from ispen_dist.seeding import seed_step, step_generator
from ispen_dist.source import Source
from ispen_dist.trainer import Trainer

FIRST = 1_000_000
"""Step numbers from here on belong to no step of the run: other batches, samples and masks."""

_FIGURES = ("part", "signal", "noise", "ratio", "noise_scale", "dev_cosine")


@dataclass(frozen=True)
class Case:
    """What hypergradients are computed under.

    Attributes:
        batch_size: of the outer loss and of the solve.
        damping: of the solve.
        dropout: whether the outer loss is under the masks of training.
    """

    batch_size: int
    damping: float
    dropout: bool


class Bench:
    """A run as its checkpoint left it.

    Args:
        run: its folder.
        folder: of records that nobody keeps.
    """

    def __init__(self, run: Path, folder: Path) -> None:
        self._folder, self._session = folder, Session()
        path = find_checkpoint(run / "checkpoints")
        if path is None:
            raise SystemExit(f"{run}/checkpoints: expected a checkpoint, found none")
        self.checkpoint: Checkpoint = load_checkpoint(path)
        self.config = load_config(run / "config.yaml")
        self.splits = load_splits(self.config)

    @contextmanager
    def trainer(self, case: Case | None = None) -> Iterator[Trainer]:
        """Lend the run at its checkpoint, under the settings of a case."""
        config = self.config if case is None else _settings(self.config, case)
        with Console(is_main=False) as console:
            folder = RunFolder(self._folder, config, console, is_main=False)
            trainer = Trainer(config, self.splits, self._session, folder)
            trainer.restore(self.checkpoint)
            if case is not None:
                trainer.rounds.outer_step.record.damping = case.damping
            yield trainer

    def source(self, dataset: Dataset, batch_size: int) -> Source:
        """Return batches of a data set."""
        dtype = getattr(torch, self.config.train.dtype)
        return Source(dataset, batch_size, self.config.train.seed, self._session, dtype)


def _settings(config: Config, case: Case) -> Config:
    return replace(
        config,
        outer=replace(config.outer, dropout=case.dropout),
        solver=replace(config.solver, damping=case.damping),
    )


def flat(tree: Tree) -> Tensor:
    """Return all values of a tree, (N,) in float64."""
    return torch.cat([x.flatten().double() for x in tree.values()])


def hypergradients(
    trainer: Trainer, inner: Source, outer: Source, repeats: int
) -> tuple[dict[str, Tensor], list[Hypergradient]]:
    """Return explicit, implicit and whole hypergradients of usable solves, (R, N) each, and all."""
    solves = []
    with twice_differentiable():
        for r in range(repeats):
            outer_batch = outer.batch(r)
            inner_batch = outer_batch if inner is outer else inner.batch(r)
            solves.append(
                trainer.rounds.outer_step.hypergradient(inner_batch, outer_batch, FIRST + r)
            )
    usable = [s for s in solves if s.status.usable]
    if len(usable) < 2:
        return {}, solves
    parts = {
        "explicit": torch.stack([flat(s.explicit) for s in usable]),
        "implicit": torch.stack([flat(s.implicit) for s in usable]),
    }
    return parts | {"whole": parts["explicit"] + parts["implicit"]}, solves


def signal_and_noise(samples: Tensor) -> tuple[float, float]:
    """Return the norm of the mean without its noise, at least 0, and the norm of the noise."""
    mean = samples.mean(0)
    noise = (samples - mean).square().sum().item() / (len(samples) - 1)
    signal = mean.square().sum().item() - noise / len(samples)
    return math.sqrt(max(signal, 0.0)), math.sqrt(noise)


def measure(bench: Bench, case: Case, repeats: int) -> list[dict[str, object]]:
    """Return one row per part of the hypergradient."""
    with bench.trainer(case) as trainer:
        train = bench.source(bench.splits.train, case.batch_size)
        found, solves = hypergradients(trainer, train, train, repeats)
        # The curvature stays that of training examples: only the loss is on new ones.
        dev = bench.source(bench.splits.dev, min(case.batch_size, len(bench.splits.dev)))
        on_dev, _ = hypergradients(trainer, train, dev, repeats)
    about: dict[str, object] = {
        "batch_size": case.batch_size,
        "damping": f"{case.damping:.3g}",
        "dropout": case.dropout,
        "usable": f"{sum(s.status.usable for s in solves)}/{repeats}",
        "stationarity": f"{torch.tensor([_stationarity(s) for s in solves]).mean():.3g}",
    }
    if not found:
        return [about | dict.fromkeys(_FIGURES, "")]
    rows: list[dict[str, object]] = []
    for part, samples in found.items():
        signal, noise = signal_and_noise(samples)
        cosine = (
            torch.cosine_similarity(samples.mean(0), on_dev[part].mean(0), dim=0).item()
            if part in on_dev
            else math.nan
        )
        figures = (
            part,
            f"{signal:.3g}",
            f"{noise:.3g}",
            f"{signal / noise if noise else math.inf:.3g}",
            f"{case.batch_size * (noise / signal) ** 2:.0f}" if signal else "",
            f"{cosine:.3f}",
        )
        rows.append(about | dict(zip(_FIGURES, figures, strict=True)))
    return rows


def _stationarity(solve: Hypergradient) -> float:
    return trees.norm(solve.inner_gradient).item()


def response(bench: Bench, num_steps: Sequence[int], batch_size: int) -> list[dict[str, object]]:
    """Return what the outer loss does after so many inner steps, over what the formula predicts."""
    config = bench.config
    with bench.trainer() as trainer:  # at the damping of its checkpoint
        batch = bench.source(bench.splits.train, batch_size).batch(0)
        with twice_differentiable():
            solve = trainer.rounds.outer_step.hypergradient(batch, batch, FIRST)
    if not solve.status.usable:
        raise SystemExit(f"the solve has no usable answer: {solve.status.value}")
    size = trees.norm(solve.implicit).item()
    count = trees.num_elements(solve.implicit)
    scale = config.outer.optimizer.learning_rate * math.sqrt(count) / size
    predicted = 2.0 * scale * size**2
    losses = {sign: _losses_after(bench, solve, sign * scale, num_steps, batch) for sign in (1, -1)}
    return [
        {"inner_steps": k, "response": f"{(up - down) / predicted:.3g}"}
        for k, up, down in zip(num_steps, losses[1], losses[-1], strict=True)
    ]


def _losses_after(
    bench: Bench, solve: Hypergradient, scale: float, num_steps: Sequence[int], batch: Batch
) -> list[float]:
    """Move phi, train theta on it, and return the outer loss at the old phi after so many steps."""
    found = []
    with bench.trainer() as trainer:
        losses = Losses(trainer.players, trainer.engines)
        seed, first = bench.config.train.seed, trainer.schedule.first_inner(trainer.round)
        old = trees.copied(losses.phi())
        with torch.no_grad():
            for name, value in losses.phi().items():
                value.add_(solve.implicit[name], alpha=scale)
        for k in range(max(num_steps)):
            seed_step(seed, "inner", first + k, 0)
            weight = bench.config.inner.energy_weight
            seen = trainer.rounds.inner_source.batch(first + k)
            inner_step(trainer.players, trainer.engines, seen, weight)
            if k + 1 in num_steps:
                seed_step(seed, "solve", FIRST, 0)
                generator = step_generator(seed, "samples", FIRST, 0, batch.weight.device)
                loss = losses.outer_graph(batch, generator)
                with torch.no_grad():
                    total = loss(losses.theta(), old)
                found.append(own_share(total, OneProcess(), "outer loss").item())
    return found


def show(title: str, rows: Sequence[dict[str, object]]) -> None:
    """Print rows as a table."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Screen().print(table)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a run")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument(
        "--dampings", type=float, nargs="+", help="default: that of the run at its checkpoint"
    )
    parser.add_argument(
        "--no-dropout", action="store_true", help="also the outer loss without dropout"
    )
    parser.add_argument("--repeats", type=int, default=12, help="batches of each size")
    parser.add_argument(
        "--response", type=int, nargs="*", default=[], metavar="K", help="inner steps to answer in"
    )
    parser.add_argument("--output", type=Path, help="CSV that rows are added to")
    command = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(command.run, Path(folder))
        dampings = command.dampings or [bench.checkpoint.state["solver"]["damping"]]
        cases = [
            Case(size, damping, dropout)
            for dropout in ([True, False] if command.no_dropout else [bench.config.outer.dropout])
            for damping in dampings
            for size in command.batch_sizes
        ]
        rows = [
            row
            for case in track(cases, "hypergradients")
            for row in measure(bench, case, command.repeats)
        ]
        show(f"{command.run.name} at round {bench.checkpoint.state['round']}", rows)
        if command.response:
            answers = response(bench, command.response, max(command.batch_sizes))
            show("the network's answer to one outer step", answers)
        if command.output:
            about = {
                "commit": commit(),
                "device": platform.processor() or platform.machine(),
                "run": command.run.name,
                "round": bench.checkpoint.state["round"],
            }
            append_rows(command.output, [about | row for row in rows])
            if command.response:
                path = command.output.with_stem(f"{command.output.stem}_response")
                append_rows(path, [about | row for row in answers])


if __name__ == "__main__":
    main()
