"""What the profiler costs, on and off.

    python profiling/profiler_overhead.py --output profiling/results/profiler_overhead.csv

One run per variant records every third round, so that rounds with and without recording stand side
by side in one process; the seconds of a round are those of its steps, without writing the trace.
The rounds between have no ranges at all. What a range costs there is timed by itself. Rounds differ
in their batches too: by how much, the same rounds of a run without a profiler say, and the ratio is
free of it. Further settings of the run may follow, such as --inner.steps=5.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Sequence
from pathlib import Path

import torch
from bench_hypergradient import commit
from csv_rows import append_rows
from rich.console import Console
from rich.table import Table

from ispen_dist import ranges
from ispen_dist.command_line import load_config
from ispen_dist.recording.metrics_file import read_metrics

ROOT = Path(__file__).parent.parent
CYCLE = 3
"""Rounds of a schedule: one as if off, one recorded and thrown away, one recorded."""
SHORT = ["--solver.max_steps=2"]
"""Fewer events per trace, since most of the time goes into writing them."""
VARIANTS = {
    "ranges and operators": ["--profile.shapes=false", "--profile.memory=false"],
    "with shapes and memory (default)": [],
    "with stacks too": ["--profile.stacks=true"],
}


def measure(config: Path, flags: Sequence[str], num_cycles: int) -> tuple[list[float], float]:
    """Return seconds of all rounds of the schedule, and megabytes of a trace if there is one."""
    warmup = 1
    schedule = [
        f"--train.warmup_rounds={warmup}",
        f"--train.max_outer_steps={1 + CYCLE * num_cycles}",
        "--train.eval_every=100000",
        "--train.num_threads=1",
        "--profile.enabled=true",
        "--profile.wait=1",
        "--profile.warmup=1",
        "--profile.steps=1",
        "--profile.repeat=0",
    ]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, ROOT / "launcher" / "train.py", "--config", config]
        subprocess.run(
            [*map(str, command), "--output", str(run), *schedule, *flags],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        rows = [r for r in read_metrics(run / "metrics.jsonl") if r["phase"] == "train"]
        settings = load_config(run / "config.yaml")
        sizes = [p.stat().st_size for p in (run / "profile").glob("*.gz")]
    examples = settings.inner.steps * settings.inner.batch_size + settings.outer.batch_size
    seconds = [examples / row["examples_per_second"] for row in rows if row["step"] > warmup + 1]
    return seconds, sum(sizes) / max(len(sizes), 1) / 1e6


def off_and_recorded(seconds: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Return the first and the last round of every cycle."""
    return seconds[0::CYCLE], seconds[CYCLE - 1 :: CYCLE]


def without_batches(seconds: Sequence[float], plain: Sequence[float]) -> list[float]:
    """Return how much longer recorded rounds take, in order of size.

    Args:
        seconds: of the rounds of a run that records.
        plain: of the same rounds of a run that does not.
    """
    of_run, of_plain = off_and_recorded(seconds), off_and_recorded(plain)
    return sorted(
        recorded / off / (plain_recorded / plain_off)
        for off, recorded, plain_off, plain_recorded in zip(*of_run, *of_plain, strict=True)
    )


def nanoseconds_off(number: int = 200_000) -> float:
    """Return what one range costs in a round that is not recorded."""

    def enter() -> None:
        with ranges.named("product"):
            pass

    def empty() -> None:
        pass

    spent = min(timeit.repeat(enter, number=number)) - min(timeit.repeat(empty, number=number))
    return spent / number * 1e9


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "twitter_pos.yaml")
    parser.add_argument("--cycles", type=int, default=3, help="recorded rounds per variant")
    parser.add_argument("--output", type=Path, help="CSV that rows are added to")
    known, settings = parser.parse_known_args()
    settings = [*SHORT, *settings]
    off = nanoseconds_off()
    plain, _ = measure(known.config, [*settings, "--profile.enabled=false"], known.cycles)
    table = Table("variant", "off, s", "recorded, s", "ratio", "MB per trace")
    rows = []
    for variant, flags in VARIANTS.items():
        seconds, size = measure(known.config, [*settings, *flags], known.cycles)
        without, recorded = off_and_recorded(seconds)
        ratios = without_batches(seconds, plain)
        rows.append(
            {
                "commit": commit(),
                "device": platform.processor() or platform.machine(),
                "threads": 1,
                "torch": torch.__version__,
                "config": " ".join([known.config.stem, *settings]),
                "variant": variant,
                "rounds": len(ratios),
                "off_seconds_p50": round(statistics.median(without), 4),
                "recorded_seconds_p50": round(statistics.median(recorded), 4),
                "ratio_min": round(ratios[0], 3),
                "ratio_p50": round(statistics.median(ratios), 3),
                "ratio_max": round(ratios[-1], 3),
                "megabytes_per_trace": round(size, 2),
                "nanoseconds_per_range_off": round(off),
            }
        )
        row = rows[-1]
        table.add_row(
            variant,
            *(
                str(row[k])
                for k in (
                    "off_seconds_p50",
                    "recorded_seconds_p50",
                    "ratio_p50",
                    "megabytes_per_trace",
                )
            ),
        )
    Console().print(table, f"a range in a round that is not recorded: {off:.0f} ns")
    if known.output:
        append_rows(known.output, rows)


if __name__ == "__main__":
    main()
