"""What compiling costs, and that it does not grow with the depth of a network.

    python profiling/bench_compile.py --output profiling/results/bench_compile.csv

A transformer tagger (d=64, 16 tokens, batch 8) of 2, 8 and 24 blocks: seconds to trace and compile
the inner steps, and the curvature with its output loss. Every depth runs
in a process of its own with an empty cache. Then seconds of the inner steps, plain and compiled.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from bench_hypergradient import COLUMNS, commit, time_side_by_side
from bench_problems import TransformerSizes, build_problem
from csv_rows import append_rows
from rich.console import Console
from rich.table import Table

from ispen_dist.config import OptimizerConfig
from ispen_dist.graphs.compiler import Compiler
from ispen_dist.graphs.operators import CompiledOperator
from ispen_dist.inner import inner_step
from ispen_dist.inner_program import InnerProgram
from ispen_dist.optim import Phase
from ispen_dist.players import replicated

NUM_STEPS = 10
ENERGY_WEIGHT = 0.3


def measure(num_blocks: int, repetitions: int) -> list[tuple[str, str, list[float], float]]:
    """Return (system, what, seconds, ratio to plain) of a depth."""
    torch.set_num_threads(1)
    sizes = TransformerSizes(
        batch_size=8, num_tokens=16, num_blocks=num_blocks, width=64, num_heads=4, damping=1.0
    )
    problem = build_problem("transformer", torch.device("cpu"), torch.float32, sizes)
    engines = replicated(problem.players)
    settings = OptimizerConfig(learning_rate=1e-3)
    engines.inference_net.begin(Phase("inner", settings, 10**6, frozenset({"new"})))
    batches = [problem.batch] * NUM_STEPS
    inner, curvature = Compiler(), Compiler()
    program = InnerProgram(problem.players, engines, inner)

    def compiled() -> dict:
        return dict(program(batches, ENERGY_WEIGHT, lambda i: None)[-1])

    def plain() -> dict:
        rows = [inner_step(problem.players, engines, b, ENERGY_WEIGHT) for b in batches]
        return dict(rows[-1])

    compiled()
    operator = CompiledOperator(problem.inner_staged(), curvature, "hessian")
    operator.mixed(operator.matvec(operator.gradient))
    times = time_side_by_side({"plain": plain, "compiled": compiled}, repetitions, problem.device)
    both = zip(times["compiled"], times["plain"], strict=True)
    ratio = statistics.median(c / p for c, p in both)
    return [
        ("ispen_dist", f"compile_inner_{len(inner.names)}_functions", [inner.seconds], 0.0),
        ("ispen_dist", f"compile_curvature_{len(curvature.names)}_functions",
         [curvature.seconds], 0.0),
        ("reference", f"inner_steps_{NUM_STEPS}", times["plain"], 1.0),
        ("ispen_dist", f"inner_steps_{NUM_STEPS}", times["compiled"], ratio),
    ]  # fmt: skip


def measure_apart(num_blocks: int, repetitions: int) -> list[list]:
    """Measure a depth in a process with an empty cache, and return CSV rows."""
    command = [sys.executable, __file__, "--depth", num_blocks, "--repetitions", repetitions]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, check=True, env=environment
        )
    versions = f"torch {torch.__version__} python {platform.python_version()}"
    rows = []
    for system, what, seconds, ratio in json.loads(done.stdout.splitlines()[-1]):
        middle = statistics.median(seconds)
        spread = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else [middle] * 4
        times = [f"{s:.6f}" for s in (middle, spread[0], spread[3])]
        shown = f"{ratio:.2f}" if ratio else ""
        rows.append(
            [system, what, f"transformer, {num_blocks} blocks", platform.machine() + " cpu", 1,
             *times, shown, "", "", versions, commit()]
        )  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 8, 24])
    parser.add_argument("--repetitions", type=int, default=9, help="of the inner steps, default 9")
    parser.add_argument("--depth", type=int, help="measure this one here, and print JSON")
    parser.add_argument("--output", type=Path, help="CSV file the rows are appended to")
    arguments = parser.parse_args(argv)
    if arguments.depth:
        print(json.dumps(measure(arguments.depth, arguments.repetitions)))
        return
    rows = [row for d in arguments.depths for row in measure_apart(d, arguments.repetitions)]
    table = Table(title="compiling, by depth")
    for column in ("problem", "what", "system", "seconds", "to plain"):
        table.add_column(column, justify="right" if column in ("seconds", "to plain") else "left")
    for row in rows:
        table.add_row(row[2], row[1], row[0], f"{float(row[5]):.3f}", row[8])
    Console().print(table)
    if arguments.output:
        append_rows(arguments.output, [dict(zip(COLUMNS, r, strict=True)) for r in rows])


if __name__ == "__main__":
    main()
