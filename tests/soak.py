"""Kill and stop a training again and again, and damage its checkpoints; nothing may be lost.

    python tests/soak.py --output profiling/results/soak.csv

Two ranks train a tiny problem that saves after every round. A rank is killed with SIGKILL at a
random moment, more than half of the time while a checkpoint is being written, and the run is
started again with --resume auto. After every kill there must be an intact checkpoint no older than
the newest published one, and in the end the run must be that of an undisturbed one bit for bit.
Then it is stopped by signals, continued and compared likewise; bytes of its checkpoints are flipped
and cut off; last, a run of configs/bibtex.yaml tells what saving costs.
"""

import argparse
import csv
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from soak_cost import cost_of_saving, data_folder
from soak_damage import damage
from soak_kills import copy_of_checkpoints, soak
from soak_starts import NUM_RANKS, STARTS
from soak_stops import stop_again

COLUMNS = ("what", "count", "of", "seconds", "versions", "commit", "command")
ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """Return the short hash of the working tree's commit."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"


def rows_of(arguments: argparse.Namespace, folder: Path) -> list[list]:
    """Run the soak and return (what, count, of, seconds)."""
    return [
        *rows_of_kills(arguments, folder),
        *rows_of_stops(arguments, folder),
        *rows_of_damages(arguments, folder),
        *rows_of_cost(arguments, folder),
    ]


def rows_of_kills(arguments: argparse.Namespace, folder: Path) -> list[list]:
    begin = time.monotonic()
    kills = soak(
        STARTS[arguments.start], folder, arguments.kills, arguments.seed,
        begin + 60.0 * arguments.minutes, say,
    )  # fmt: skip
    took, start = round(time.monotonic() - begin), arguments.start
    return [
        [f"kills survived ({start}, {NUM_RANKS} ranks)", kills.num, arguments.kills, took],
        [f"kills inside a checkpoint write ({start})", kills.num_in_write, kills.num, took],
    ]


def rows_of_stops(arguments: argparse.Namespace, folder: Path) -> list[list]:
    begin = time.monotonic()
    to_saved = stop_again(STARTS[arguments.start], folder, arguments.stops, arguments.seed, say)
    took, num, start = round(time.monotonic() - begin), len(to_saved), arguments.start
    return [
        [f"requeues done ({start}, {NUM_RANKS} ranks)", num, arguments.stops, took],
        [f"signal to saved, median ({start})", num, num, round(statistics.median(to_saved), 2)],
        [f"signal to saved, slowest ({start})", 1, num, round(max(to_saved), 2)],
    ]


def rows_of_damages(arguments: argparse.Namespace, folder: Path) -> list[list]:
    begin, rows = time.monotonic(), []
    outcomes = damage(
        copy_of_checkpoints(folder, folder / "damaged"), arguments.damages, arguments.seed
    )
    took = round(time.monotonic() - begin)
    for kind, outcome in outcomes.items():
        lost = outcome.num - outcome.num_found - outcome.num_harmless
        assert lost == 0, f"{kind}: expected all to be found, {lost} were not"
        rows.append([f"{kind} found", outcome.num_found, outcome.num, took])
        rows.append([f"{kind} harmless in a manifest", outcome.num_harmless, outcome.num, took])
    return rows


def rows_of_cost(arguments: argparse.Namespace, folder: Path) -> list[list]:
    root = data_folder()
    if not (root / "bibtex").is_dir():
        say(f"cost of saving: skipped, no bibtex in {root}; set ISPEN_DATA to the folder with it")
        return []
    cost = cost_of_saving(folder / "cost", root, arguments.saves)
    where = f"{cost.num_saved} saves, one per {cost.interval} rounds of configs/bibtex.yaml"
    return [
        [f"percent of training spent waiting for saves ({where})",
         round(100.0 * cost.waited / cost.seconds, 3), 100, round(cost.waited, 3)],
        [f"percent of training with a write in the background ({where})",
         round(100.0 * cost.written / cost.seconds, 3), 100, round(cost.written, 3)],
    ]  # fmt: skip


def say(text: str) -> None:
    print(text, flush=True)


def main(words: list[str] | None = None) -> int:
    """Run the command line."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=180.0, help="no kill after; default 180")
    parser.add_argument("--kills", type=int, default=100, help="default 100")
    parser.add_argument("--stops", type=int, default=10, help="by signals; default 10")
    parser.add_argument("--damages", type=int, default=1000, help="flips and cuts; default 1000")
    parser.add_argument("--saves", type=int, default=3, help="of the cost; default 3")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--start", choices=STARTS, default="elastic",
        help="elastic (default): accelerate launch; fork: ranks of a process that has imported all",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="CSV file to append to")
    parser.add_argument("--folder", type=Path, help="where to work, and keep it; default temporary")
    arguments = parser.parse_args(words)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="soak_"))
    folder.mkdir(parents=True, exist_ok=True)
    versions = f"torch {torch.__version__} python {platform.python_version()}"
    command = shlex.join(["python", "tests/soak.py", *words])
    rows = [[*row, versions, commit(), command] for row in rows_of(arguments, folder)]
    table = Table(*COLUMNS[:-1])
    for row in rows:
        table.add_row(*map(str, row[:-1]))
    Console(width=140).print(table)
    if arguments.output:
        is_new = not arguments.output.exists()
        with arguments.output.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows] if is_new else rows)
    if arguments.folder is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
