"""Compare methods on one configuration over several seeds, and print the table of the README.

    python launcher/reproduce.py --config configs/bibtex.yaml --seeds 3

Each run is an ordinary `launcher/train.py` run in its own folder under `--runs`; runs whose
summary is already there are not repeated, so the command can be stopped and started again. Test is
read once per run, by the run itself, after selection on dev.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("mle", "explicit", "implicit")
COLUMNS = (
    "dataset", "method", "metric", "test_mean", "test_std", "dev_mean", "seeds",
    "seconds_per_round", "overhead",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run: a method and a seed of a configuration."""

    config: Path
    method: str
    seed: int
    folder: Path

    def run(self) -> dict:
        """Train unless done, and return the summary."""
        summary = self.folder / "summary.json"
        if not summary.exists():
            command = [
                sys.executable, str(ROOT / "launcher" / "train.py"), "--config", str(self.config),
                "--output", str(self.folder), f"--train.method={self.method}",
                f"--train.seed={self.seed}", "--train.num_threads=1",
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise SystemExit(f"error: {' '.join(command)}\n{done.stdout}{done.stderr}")
        return json.loads(summary.read_text("utf-8"))


def table_rows(dataset: str, summaries: dict[str, list[dict]]) -> list[list]:
    """Return one CSV row for every method and metric."""
    per_round = {
        method: statistics.median(s["seconds"] / s["rounds"] for s in runs)
        for method, runs in summaries.items()
    }
    base = per_round.get("mle", next(iter(per_round.values())))
    rows = []
    for method, runs in summaries.items():
        for metric in (name for name in runs[0]["test"] if name != "threshold"):
            test = [run["test"][metric] for run in runs]
            dev = [run["dev"][metric] for run in runs]
            spread = statistics.stdev(test) if len(test) > 1 else 0.0
            rows.append(
                [dataset, method, metric, f"{statistics.mean(test):.4f}", f"{spread:.4f}",
                 f"{statistics.mean(dev):.4f}", len(runs), f"{per_round[method]:.3f}",
                 f"{per_round[method] / base:.2f}"]
            )  # fmt: skip
    return rows


def print_table(rows: list[list]) -> None:
    """Print the rows for the console and as Markdown."""
    table = Table()
    for column in COLUMNS:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=140).print(table)
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def main() -> None:
    """Run the grid as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated; default all")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to N-1; default 3")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time; default 2")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--output", type=Path, help="CSV file to write")
    arguments = parser.parse_args()
    methods = arguments.methods.split(",")
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        parser.error(f"--methods: expected some of {', '.join(METHODS)}, got {unknown[0]!r}")
    name = arguments.config.stem
    jobs = [
        Job(arguments.config, method, seed, arguments.runs / f"{name}-{method}-{seed}")
        for seed in range(arguments.seeds)
        for method in methods
    ]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(Job.run, jobs))
    summaries = {
        method: [r for job, r in zip(jobs, results, strict=True) if job.method == method]
        for method in methods
    }
    rows = table_rows(name, summaries)
    print_table(rows)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with arguments.output.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
