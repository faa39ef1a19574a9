"""How fast every Triton kernel is beside plain and compiled PyTorch, and beside the device's limit.

    python profiling/bench_kernels.py
    python profiling/bench_kernels.py --shapes full --output profiling/results/bench_kernels.csv
    python profiling/bench_kernels.py --only layer_norm

Every kernel is first compared with its reference in float64: an error above twice that of eager
PyTorch in the same type, plus one rounding of the result, ends the program before anything is
timed. `reference` is the plain PyTorch of `ispen_kernels`, `compiled` its trace by make_fx under
torch.compile, compilation excluded; a derivative is that of the reference by torch.func. The
verdict compares with `compiled`, and the CSV column `ratio_to_gradient`, shared with the other
benchmarks, holds here the ratio to `compiled`.

All timings of a repetition run side by side, on a GPU between two events and after a write that
empties the L2 cache; figures are medians. `limit` is measured in the same run: a large copy, in
bytes read and written, and for attention a large matrix product of the same type. A kernel of
known traffic is rated by the bytes of its inputs and results, each once.

Attention is rated in units of F = 4 B N T S H, the two products of a forward pass. TFLOP/s count
1 F for the value, 2 F for value and tangent, 3.5 F for value and gradient (five more products), and
7 F for the gradient with its tangent: a tangent doubles. `made` counts the products that our
kernels make, 1, 3, 4.5 and 12 F, as they rebuild the weights instead of keeping them: their share
of the limit is that of products made. Derivatives start from q, k and v alone, in every system.
Memory is linear in T where its bytes per entry of q are the same at two lengths.

On a CPU the kernels run in Triton's interpreter: they are checked at tiny shapes and not timed, as
the time of an interpreter says nothing; the references are. No other flag changes this.
"""

import argparse
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from bench_hypergradient import COLUMNS
from csv_rows import append_rows
from kernel_cases import COUNTED, FULL, MADE, QUICK, TINY, Case, build_cases
from kernel_errors import check_all
from kernel_timings import Measured, measure, measure_limits, versions
from rich.console import Console
from rich.table import Table

# No case is begun after this, so that a run with all its compilations ends within ten minutes.
BUDGET_S = 480.0


def verdict(case: Case, result: list[Measured], left_out: dict[str, str]) -> str:
    """Say whether the door should use the kernel at this shape."""
    median = {m.system: m.median for m in result if m.what == case.what}
    if "ispen_dist" not in median:
        said = "checked, not timed: no GPU"
    elif "compiled" not in median:
        said = f"use (compiled: {left_out.get('compiled', 'left out')})"
    elif median["ispen_dist"] < median["compiled"]:
        said = "use"
    else:
        said = "slower than compiled: not used"
    return f"{case.what} {case.problem}: {said}"


def goals(result: list[Measured]) -> list[str]:
    """Say what attention reaches, beside math mode and by itself, and its memory per entry of q."""
    lines = []
    ours = {(m.what, m.problem): m for m in result if m.system == "ispen_dist"}
    for m in result:
        if m.what.endswith(", sdpa math"):
            own = ours[m.what.removesuffix(", sdpa math"), m.problem]
            ratio = m.median / own.median
            lines.append(f"{own.what} {own.problem}: {ratio:.2f} times as fast as math mode")
    for (what, problem), m in ours.items():
        if what.startswith("attention") and m.peak and m.rate:
            kind = what.removeprefix("attention_")
            made = m.rate * MADE[kind] / COUNTED[kind]
            each = m.peak / math.prod(int(part.split("=")[1]) for part in problem.split()[:4])
            lines.append(
                f"{what} {problem}: {m.rate:.0f} TFLOP/s, {made:.0f} by products made, "
                f"peak {m.peak / 1e6:.0f} MB, {each:.2f} bytes per entry of q"
            )
    return lines


def show(result: list[Measured], device: str, console: Console) -> None:
    """Print the table."""
    table = Table(title=f"medians on {device}, {versions()}")
    for i, column in enumerate(
        ("what", "problem", "system", "median ms", "to compiled", "rate", "of limit", "peak MB",
         "error")
    ):  # fmt: skip
        table.add_column(column, justify="left" if i < 3 else "right", no_wrap=i == 0)
    for m in result:
        table.add_row(
            m.what,
            m.problem,
            m.system,
            f"{1e3 * m.median:.4f}",
            "" if m.ratio is None else f"{m.ratio:.2f}",
            "" if m.rate is None else f"{m.rate:.4g} {m.unit}",
            "" if m.share is None else f"{100 * m.share:.0f}%",
            "" if m.peak is None else f"{m.peak / 1e6:.1f}",
            "" if m.error is None else f"{m.error:.1e}",
        )
    console.print(table)


def run(
    cases: list[Case], device: torch.device, console: Console
) -> tuple[list[Measured], list[str]]:
    """Check everything, then time everything; return the measurements and lines to print last."""
    begin = time.perf_counter()
    all_errors = check_all(cases, device)
    console.print(f"{len(cases)} kernels and shapes are as exact as eager PyTorch")
    limits = measure_limits(cases, device)
    result, lines = list(limits.values()), []
    for case, errors in zip(cases, all_errors, strict=True):
        if time.perf_counter() - begin > BUDGET_S:
            lines.append(f"{case.what} {case.problem}: left out, out of time; use --only")
            continue
        left_out: dict[str, str] = {}
        measured = measure(case, errors, limits, device, left_out)
        result += measured
        lines.append(verdict(case, measured, left_out))
        lines += [f"  without {name}: {reason}" for name, reason in left_out.items()]
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return result, [*goals(result), *lines]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="CSV file the rows are appended to")
    parser.add_argument("--shapes", choices=("quick", "full"), default="quick", help="on a GPU")
    parser.add_argument("--only", default="", help="kernels with this in their name")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    cases = build_cases({"quick": QUICK, "full": FULL}[options.shapes] if on_gpu else TINY,
                        options.only)  # fmt: skip
    if not cases:
        names = sorted({case.what for case in build_cases(TINY, "")})
        parser.error(f"--only: expected part of one of {', '.join(names)}, got {options.only!r}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    if not on_gpu:
        console.print("no GPU: kernels run in Triton's interpreter, checked and not timed")
    result, lines = run(cases, device, console)
    name = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} cpu"
    show(result, name, console)
    for line in lines:
        console.print(line, highlight=False, markup=False)
    if options.output:
        rows = [dict(zip(COLUMNS, m.row(name), strict=True)) for m in result]
        append_rows(options.output, rows)


if __name__ == "__main__":
    main()
