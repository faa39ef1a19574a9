"""The pictures of a report, as self-contained data URIs."""

import base64
import io
from collections.abc import Mapping, Sequence

from device_limits import Limits
from matplotlib import colormaps
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from phases import OTHER, Breakdown

from ispen_dist import ranges
from ispen_dist.recording.figures import convergence

MAX_PIECES = 4000
"""Of a rank in the timeline; shorter ones beyond it would not be seen anyway."""


def _colour(phase: str) -> str:
    names = list(ranges.NAMES)
    return "0.8" if phase == OTHER else to_hex(colormaps["tab20"](names.index(phase) % 20))


def data_uri(figure: Figure) -> str:
    """Render a figure as SVG into a URI that needs nothing else."""
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _figure(height: float) -> Figure:
    return Figure(figsize=(9.0, height), layout="constrained")


def phase_bars(breakdowns: Sequence[Breakdown]) -> Figure:
    """Draw the time of every rank, one bar cut into phases."""
    figure = _figure(1.6 + 0.4 * len(breakdowns))
    axes = figure.add_subplot()
    shown = _shown(breakdowns)
    for b in breakdowns:
        left = 0.0
        for phase in shown:
            width = 1e3 * b.phases.get(phase, 0.0) / b.num_rounds
            axes.barh(f"rank {b.rank}", width, left=left, color=_colour(phase))
            left += width
    axes.set(xlabel="ms per round", title="time by phase")
    _legend(figure, shown)
    return figure


def timeline(breakdowns: Sequence[Breakdown]) -> Figure:
    """Draw which phase every rank was in, over the rounds of the trace."""
    figure = _figure(1.6 + 0.4 * len(breakdowns))
    axes = figure.add_subplot()
    for row, b in enumerate(breakdowns):
        begin = b.pieces[0][0]
        longest = sorted(b.pieces, key=lambda p: p[0] - p[1])[:MAX_PIECES]
        axes.broken_barh(
            [((a - begin) * 1e3, (z - a) * 1e3) for a, z, _ in longest],
            (row - 0.4, 0.8),
            facecolors=[_colour(phase) for _, _, phase in longest],
        )
    axes.set_yticks(range(len(breakdowns)), [f"rank {b.rank}" for b in breakdowns])
    axes.set(xlabel="ms from the first profiled round on", title="timeline")
    _legend(figure, _shown(breakdowns))
    return figure


def peak_bars(breakdown: Breakdown) -> Figure:
    """Draw the memory peak of every phase of a rank."""
    figure = _figure(1.2 + 0.25 * len(breakdown.peaks))
    axes = figure.add_subplot()
    ranked = sorted(breakdown.peaks.items(), key=lambda item: item[1])
    axes.barh(
        [phase for phase, _ in ranked],
        [peak / 1e6 for _, peak in ranked],
        color=[_colour(phase) for phase, _ in ranked],
    )
    axes.set(xlabel="MB", title=f"memory peak by phase, rank {breakdown.rank}")
    return figure


def rate_bars(breakdown: Breakdown, limits: Limits) -> Figure:
    """Draw what was achieved of the device's arithmetic and memory rate."""
    figure = _figure(1.8)
    axes = figure.add_subplot()
    shares = {
        "matrix products": breakdown.flops / breakdown.wall / limits.flops,
        "reading": breakdown.read_bytes / breakdown.wall / limits.read_bytes,
    }
    axes.barh(list(shares), [100.0 * s for s in shares.values()], color="#0072B2")
    axes.set(xlabel="% of the device's limit", xlim=(0, 100), title="achieved rates")
    return figure


def solver_curves(solves: Mapping[int, Sequence[float]]) -> Figure:
    """Draw the residuals of solves by round."""
    return convergence(solves, "solver convergence")


def _shown(breakdowns: Sequence[Breakdown]) -> list[str]:
    return [p for p in (*ranges.NAMES, OTHER) if any(p in b.phases for b in breakdowns)]


def _legend(figure: Figure, phases: Sequence[str]) -> None:
    handles = [Patch(color=_colour(phase), label=phase) for phase in phases]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
