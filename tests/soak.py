"""Kill and stop a training again and again, and damage its checkpoints; nothing may be lost.

    python tests/soak.py --minutes 60 --kills 100 --output profiling/results/soak.csv

Two ranks train a tiny problem that saves after every round. A rank is killed with SIGKILL at a
random moment, more than half of the time while a checkpoint is being written, and the run is
started again with --resume auto. After every kill there must be an intact checkpoint no older than
the newest published one, and in the end the run must be that of an undisturbed one bit for bit.
Then it is stopped by signals, continued and compared likewise; last, bytes of its checkpoints are
flipped and cut off.
"""

import argparse
import csv
import platform
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
from soak_damage import damage
from soak_kills import Elastic, Forked, copy_of_checkpoints, soak
from soak_stops import stop_again

import ispen_dist.trainer  # noqa: F401  (so that forked ranks have it)

COLUMNS = ("what", "count", "of", "seconds", "versions", "commit")
ROOT = Path(__file__).resolve().parent.parent
STARTS = {"elastic": Elastic, "fork": Forked}


def commit() -> str:
    """Return the short hash of the working tree's commit."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"


def rows_of(arguments: argparse.Namespace, folder: Path) -> list[list]:
    """Run the soak and return (what, count, of, seconds)."""
    begin = time.monotonic()
    kills = soak(
        STARTS[arguments.start], folder, arguments.kills, arguments.seed,
        begin + 60.0 * arguments.minutes, lambda text: print(text, flush=True),
    )  # fmt: skip
    stopped = time.monotonic()
    to_saved = stop_again(
        STARTS[arguments.start], folder, arguments.stops, arguments.seed,
        lambda text: print(text, flush=True),
    )  # fmt: skip
    killed = time.monotonic()
    outcomes = damage(
        copy_of_checkpoints(folder, folder / "damaged"), arguments.damages, arguments.seed
    )
    seconds, start = round(stopped - begin), arguments.start
    rows = [
        [f"kills survived ({start}, 2 ranks)", kills.num, kills.num, seconds],
        [f"kills inside a checkpoint write ({start})", kills.num_in_write, kills.num, seconds],
        [f"stops continued ({start})", len(to_saved), arguments.stops, round(killed - stopped)],
        ["signal to saved, median", 1, 1, round(statistics.median(to_saved), 2)],
        ["signal to saved, slowest", 1, 1, round(max(to_saved), 2)],
    ]
    for kind, outcome in outcomes.items():
        lost = outcome.num - outcome.num_found - outcome.num_harmless
        assert lost == 0, f"{kind}: expected all to be found, {lost} were not"
        took = round(time.monotonic() - killed)
        rows.append([f"{kind} found", outcome.num_found, outcome.num, took])
        rows.append([f"{kind} harmless in a manifest", outcome.num_harmless, outcome.num, took])
    return rows


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="no kill after; default 60")
    parser.add_argument("--kills", type=int, default=100, help="default 100")
    parser.add_argument("--stops", type=int, default=20, help="by signals; default 20")
    parser.add_argument("--damages", type=int, default=1000, help="flips and cuts; default 1000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--start", choices=STARTS, default="elastic",
        help="elastic (default): accelerate launch; fork: ranks of a process that has imported all",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="CSV file to append to")
    parser.add_argument("--folder", type=Path, help="where to work, and keep it; default temporary")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="soak_"))
    folder.mkdir(parents=True, exist_ok=True)
    versions = f"torch {torch.__version__} python {platform.python_version()}"
    rows = [[*row, versions, commit()] for row in rows_of(arguments, folder)]
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*map(str, row))
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
