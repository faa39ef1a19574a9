"""Where the time of a run goes, and what to change.

    accelerate launch launcher/train.py --config CONFIG --output RUN --profile.enabled=true
    python profiling/report.py RUN

Reads the newest traces under RUN/profile and the metrics, prints tables, and writes
RUN/report.html, one file without references to others. Exit code 2 for traces or records that
cannot be read.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from advice import largest_costs
from device_limits import Limits, measure_limits, read_limits
from phases import Breakdown, break_down
from report_page import Page, Table
from report_plots import data_uri, peak_bars, phase_bars, rate_bars, solver_curves, timeline
from rich.console import Console
from rich.table import Table as RichTable
from trace_events import find_traces, no_search_for_cycles, read_trace

from ispen_dist.command_line import load_config
from ispen_dist.config import Config
from ispen_dist.data.output_file import replacing
from ispen_dist.recording.metrics_file import read_metrics

MAX_GAP = 0.03
"""By how much phases and clock may differ before the report says so."""


def build_report(folder: Path, limits: Callable[[Config], Limits]) -> Page:
    """Return the report of a run folder.

    Raises:
        ValueError: with one line that names a file and what to do.
    """
    with no_search_for_cycles():
        breakdowns = [break_down(read_trace(path)) for path in find_traces(folder)]
    config = load_config(folder / "config.yaml")
    solves = _solves(folder / "metrics.jsonl")
    of_device = limits(config)
    page = Page(f"Where the time goes: {folder.name}")
    page.tables = [
        _phases(breakdowns),
        _figures(breakdowns),
        _memory(breakdowns),
        _rates(breakdowns, of_device),
        *([_convergence(solves)] if solves else []),
        _costs(breakdowns, config),
    ]
    first = breakdowns[0]
    pictures = {
        "time by phase": phase_bars(breakdowns),
        "timeline": timeline(breakdowns),
        **({"memory peak by phase": peak_bars(first)} if first.peaks else {}),
        **({"achieved rates": rate_bars(first, of_device)} if first.flops else {}),
        **({"solver convergence": solver_curves(solves)} if solves else {}),
    }
    page.pictures = [(what, data_uri(figure)) for what, figure in pictures.items()]
    return page


def _solves(path: Path) -> dict[int, list[float]]:
    """Return the newest solves' residuals by round."""
    if not path.exists():
        raise ValueError(f"{path}: expected the metrics of a run, found none; give its run folder")
    rows = [row for row in read_metrics(path) if row["phase"] == "solve"][-6:]
    return {
        row["step"]: [float("nan") if r is None else r for r in row["residuals"]] for row in rows
    }


def _phases(breakdowns: Sequence[Breakdown]) -> Table:
    phases = sorted(
        {p for b in breakdowns for p in b.phases},
        key=lambda p: -sum(b.phases.get(p, 0.0) for b in breakdowns),
    )
    on_gpu = any(b.device for b in breakdowns)
    rows = []
    for phase in phases:
        ms = [1e3 * b.phases.get(phase, 0.0) / b.num_rounds for b in breakdowns]
        shares = [b.phases.get(phase, 0.0) / b.traced for b in breakdowns]
        calls = breakdowns[0].calls.get(phase, 0) / breakdowns[0].num_rounds
        row = [phase, f"{calls:.1f}" if calls else "", *(f"{x:.2f}" for x in ms)]
        row += [f"{sum(shares) / len(shares):.1%}"]
        if on_gpu:
            row += [f"{1e3 * breakdowns[0].device.get(phase, 0.0) / breakdowns[0].num_rounds:.2f}"]
        rows.append(row)
    total = ["sum", "", *(f"{1e3 * b.traced / b.num_rounds:.2f}" for b in breakdowns), "100.0%"]
    clock = ["clock", "", *(f"{1e3 * b.wall / b.num_rounds:.2f}" for b in breakdowns), ""]
    rows += [[*row, *([""] if on_gpu else [])] for row in (total, clock)]
    gap = max(abs(b.traced / b.wall - 1.0) for b in breakdowns)
    note = (
        "Every moment of a round counts for the innermost range; what none covers is other. In "
        "solve is the solver's own work, without products and reductions. The clock is the run's, "
        f"beside the trace: they differ by {gap:.2%}."
    )
    if gap > MAX_GAP:
        note += " That is too much: the trace is incomplete, so do not trust this table."
    columns = ["phase", "calls per round", *(f"rank {b.rank}, ms" for b in breakdowns), "share"]
    columns += ["rank 0, ms of kernels"] if on_gpu else []
    return Table(f"Time by phase, mean of {breakdowns[0].num_rounds} rounds", columns, rows, note)


def _figures(breakdowns: Sequence[Breakdown]) -> Table:
    rows = [
        ["products per outer step", *(f"{b.products_per_outer_step:.1f}" for b in breakdowns)],
        ["communication", *(f"{b.communication / b.traced:.1%}" for b in breakdowns)],
        ["of it hidden behind computation", *(_hidden(b) for b in breakdowns)],
        ["idle", *(f"{b.idle / b.traced:.1%}" for b in breakdowns)],
    ]
    note = (
        "A warm start costs one product more. Idle: no operator on the CPU, or no kernel on the "
        "GPU, was at work; Python was, or nothing."
    )
    return Table("Overlap", ["", *(f"rank {b.rank}" for b in breakdowns)], rows, note)


def _hidden(b: Breakdown) -> str:
    return f"{1.0 - b.exposed / b.communication:.1%}" if b.communication else "-"


def _memory(breakdowns: Sequence[Breakdown]) -> Table:
    phases = sorted(
        {p for b in breakdowns for p in b.peaks},
        key=lambda p: -max(b.peaks.get(p, 0) for b in breakdowns),
    )
    rows = [[p, *(f"{b.peaks.get(p, 0) / 1e6:.3f}" for b in breakdowns)] for p in phases]
    note = "Of what was allocated while the trace was recorded."
    if not rows:
        note = "Not recorded: profile.memory was false."
    return Table(
        "Memory peak by phase, MB", ["phase", *(f"rank {b.rank}" for b in breakdowns)], rows, note
    )


def _rates(breakdowns: Sequence[Breakdown], limits: Limits) -> Table:
    rows = []
    for b in breakdowns:
        flops, read = b.flops / b.wall, b.read_bytes / b.wall
        rows.append(
            [
                f"rank {b.rank}",
                f"{flops / 1e9:.3g} GFLOP/s",
                f"{flops / limits.flops:.2%}",
                f"{read / 1e9:.3g} GB/s",
                f"{read / limits.read_bytes:.2%}",
            ]
        )
    note = (
        f"Limits {limits.source}: {limits.flops / 1e9:.4g} GFLOP/s, reading "
        f"{limits.read_bytes / 1e9:.4g} GB/s. Counted are dense matrix products, and inputs of "
        "operators; fused code and kernels of our own are not seen, so these are lower bounds."
    )
    if not any(b.read_bytes for b in breakdowns):
        note += " Nothing was counted: profile.shapes was false."
    columns = ["", "matrix products", "of the limit", "read by operators", "of the limit"]
    return Table("Achieved rates", columns, rows, note)


def _convergence(solves: dict[int, list[float]]) -> Table:
    longest = max(map(len, solves.values()))
    rows = [
        [f"round {n}", *(f"{r:.2e}" for r in residuals), *[""] * (longest - len(residuals))]
        for n, residuals in solves.items()
    ]
    columns = ["residual after", *(str(i) for i in range(longest))]
    return Table("Solver convergence, |b - A q| / |b| by products", columns, rows)


def _costs(breakdowns: list[Breakdown], config: Config) -> Table:
    rows = [[c.phase, f"{c.share:.1%}", c.advice] for c in largest_costs(breakdowns, config)]
    return Table("The largest costs, and what to change", ["phase", "share", "change"], rows)


def show(page: Page, console: Console) -> None:
    """Print the tables."""
    for table in page.tables:
        shown = RichTable(title=table.title, title_justify="left", caption=table.note or None)
        for i, column in enumerate(table.columns):
            is_text = i == 0 or column == "change"
            shown.add_column(column, justify="left" if is_text else "right")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--limits", type=Path, help="JSON of the device's flops and read_bytes")
    parser.add_argument("--output", type=Path, help="HTML file (default: RUN/report.html)")
    known = parser.parse_args(argv)

    def limits(config: Config) -> Limits:
        return (
            read_limits(known.limits) if known.limits else measure_limits(config.train.num_threads)
        )

    try:
        page = build_report(known.run, limits)
        output = known.output or known.run / "report.html"
        with replacing(output) as partial:
            partial.write_text(page.html(), "utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    console = Console()
    show(page, console)
    console.print(f"written: {output}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
