"""What a curvature product and a hypergradient cost, in gradients of the same inner loss.

    python profiling/bench_hypergradient.py --quick
    python profiling/bench_hypergradient.py --output profiling/results/bench_hypergradient.csv

The problem has the shapes of bibtex (batch 256, 1836 sparse binary features, 159 labels) with the
networks of configs/bibtex.yaml, without dropout and with the task cost as the outer loss, so that
float32 and float64 see one function. Its numbers are random and seeded: no data is needed. All
timings of a repetition run side by side, and figures are medians over repetitions. Nothing is
timed before every result has been compared with float64.
"""

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import ispen_dist
from ispen_dist.command_line import load_config
from ispen_dist.config import Config
from ispen_dist.data.batch import Batch
from ispen_dist.data.datasets import MultiLabelCodec
from ispen_dist.linalg import trees
from ispen_dist.linalg.operators import build_operator
from ispen_dist.linalg.trees import Tree
from ispen_dist.losses import Losses
from ispen_dist.players import Players, build_players, replicated

ROOT = Path(__file__).resolve().parent.parent
NUM_FEATURES, NUM_ACTIVE, NUM_LABELS, NUM_GOLD = 1836, 69, 159, 2.4
DAMPING = 10.0
MAX_ERROR = 1e-3
COLUMNS = (
    "system", "what", "problem", "device", "threads", "median_s", "p20_s", "p80_s",
    "ratio_to_gradient", "error", "peak_bytes", "versions", "commit",
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """The inner and outer loss of one outer step on a random batch."""

    players: Players
    batch: Batch
    theta: Tree
    phi: Tree

    @property
    def _losses(self) -> Losses:
        return Losses(self.players, replicated(self.players))

    def inner(self) -> ispen_dist.ComposedLoss:
        """Return G."""
        return self._losses.inner_graph(self.batch)

    def gradient(self) -> Tree:
        """Compute one eager first-order gradient of G in theta: the unit of all figures."""
        theta = trees.as_leaves(self.theta)
        total, count = self.inner()(theta, self.phi)
        grads = torch.autograd.grad(total / count, list(theta.values()))
        return dict(zip(theta, grads, strict=True))

    def hypergradient(self, num_steps: int) -> Tree:
        """Compute a whole hypergradient with a fixed number of solver steps."""
        generator = torch.Generator(self.batch.weight.device).manual_seed(0)
        return ispen_dist.hypergradient(
            self.inner(),
            self._losses.outer_graph(self.batch, generator),
            self.theta,
            self.phi,
            solver=ispen_dist.CG(num_steps, 0.0),
            damping=DAMPING,
        ).value


def build_problem(
    config: Config, batch_size: int, device: torch.device, dtype: torch.dtype
) -> Problem:
    """Build a random problem; its values do not depend on the type."""
    config = replace(
        config,
        inference_net=replace(config.inference_net, dropout=0.0, feature_dropout=0.0),
        outer=replace(config.outer, objective="task", task_weight=0.0),
        train=replace(config.train, dtype="float32"),
    )
    names = tuple(map(str, range(NUM_FEATURES)))
    players = build_players(config, MultiLabelCodec(names[:NUM_LABELS], names), device)
    players.inference_net.to(dtype)
    players.energy.to(dtype)
    draw = torch.Generator().manual_seed(0)
    features = torch.rand(batch_size, NUM_FEATURES, generator=draw) < NUM_ACTIVE / NUM_FEATURES
    target = torch.rand(batch_size, NUM_LABELS, generator=draw) < NUM_GOLD / NUM_LABELS
    batch = Batch(
        {"features": features.float()},
        target.float(),
        torch.ones(batch_size),
        torch.arange(batch_size),
    ).to(device, dtype)
    phi = {
        k: v.detach() + 0.1 * torch.randn(v.shape, generator=draw).to(v)
        for k, v in players.phi.items()
    }
    return Problem(players, batch, trees.detached(players.theta), phi)


def direction(problem: Problem) -> Tree:
    """Return a seeded random direction like theta."""
    draw = torch.Generator().manual_seed(1)
    return {k: torch.randn(v.shape, generator=draw).to(v) for k, v in problem.theta.items()}


def measured_work(problem: Problem) -> dict[str, Callable[[], Tree]]:
    """Return what is timed, by name; operators are built once, as in a solve."""
    v = direction(problem)
    operators = {
        name: build_operator(name, problem.inner(), problem.theta, problem.phi)
        for name in ("hessian", "gauss_newton")
    }
    return {
        "gradient": problem.gradient,
        "hessian_product": lambda: operators["hessian"].matvec(v),
        "gauss_newton_product": lambda: operators["gauss_newton"].matvec(v),
        "hypergradient_10": lambda: problem.hypergradient(10),
        "hypergradient_20": lambda: problem.hypergradient(20),
    }


def relative_error(value: Tree, reference: Tree) -> float:
    """Return |value - reference| / |reference| over the whole tree, in float64."""
    wide = {k: v.double() for k, v in value.items()}
    return (trees.norm(trees.add_scaled(wide, -1.0, reference)) / trees.norm(reference)).item()


def time_side_by_side(
    work: dict[str, Callable[[], Tree]], repetitions: int, device: torch.device
) -> dict[str, list[float]]:
    """Return seconds by name; every repetition runs each piece of work in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repetition in range(repetitions + 2):
        for name, function in work.items():
            begin = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repetition >= 2:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def peak_bytes(function: Callable[[], Tree], device: torch.device) -> str:
    """Return the peak of one call beyond what was allocated before; GPU only, else empty."""
    if device.type != "cuda":
        return ""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return str(torch.cuda.max_memory_allocated() - before)


def commit() -> str:
    """Return the commit of this checkout, with a mark where it has changes."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def rows(problem_name: str, problem: Problem, errors: dict[str, float], repetitions: int) -> list:
    """Time the work and return one CSV row each."""
    device = problem.batch.weight.device
    work = measured_work(problem)
    seconds = time_side_by_side(work, repetitions, device)
    unit = statistics.median(seconds["gradient"])
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine() + " cpu"
    versions = f"torch {torch.__version__} python {platform.python_version()}"
    result = []
    for what, times in seconds.items():
        median = statistics.median(times)
        p20, p80 = (statistics.quantiles(times, n=5)[i] for i in (0, 3))
        result.append(
            ["ispen_dist", what, problem_name, name, torch.get_num_threads(), f"{median:.6f}",
             f"{p20:.6f}", f"{p80:.6f}", f"{median / unit:.2f}", f"{errors[what]:.1e}",
             peak_bytes(work[what], device), versions, commit()]
        )  # fmt: skip
    return result


def check(config: Config, batch_size: int, device: torch.device) -> tuple[Problem, dict]:
    """Compare every result with float64 and refuse to go on where one is wrong."""
    single = build_problem(config, batch_size, device, torch.float32)
    double = build_problem(config, batch_size, device, torch.float64)
    reference = {name: function() for name, function in measured_work(double).items()}
    errors = {
        name: relative_error(function(), reference[name])
        for name, function in measured_work(single).items()
    }
    wrong = {name: error for name, error in errors.items() if not error < MAX_ERROR}
    if wrong:
        sys.exit(f"error: expected errors below {MAX_ERROR:g} against float64, got {wrong}")
    return single, errors


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions, under a minute")
    parser.add_argument("--repetitions", type=int, default=51, help="default 51, with --quick 15")
    parser.add_argument("--batch-size", type=int, default=256, help="default 256")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    parser.add_argument("--output", type=Path, help="CSV file the rows are appended to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = load_config(ROOT / "configs" / "bibtex.yaml")
    problem, errors = check(config, arguments.batch_size, device)
    result = rows("bibtex", problem, errors, 15 if arguments.quick else arguments.repetitions)
    table = Table(title=f"bibtex shapes, batch {arguments.batch_size}, {result[0][3]}")
    for column in ("what", "median ms", "p20", "p80", "gradients", "error against float64"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in result:
        times = [f"{1e3 * float(t):.2f}" for t in row[5:8]]
        table.add_row(row[1], *times, row[8], row[9])
    Console().print(table)
    if arguments.output:
        append_rows(arguments.output, result)


def append_rows(path: Path, result: list) -> None:
    """Append rows to a CSV file, with a header where it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *result] if is_new else result)


if __name__ == "__main__":
    main()
