"""A picture of a table: test metrics of all methods with their spread over seeds."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from ispen_dist.tables.definition import TableDefinition
from ispen_dist.tables.summary import Row

# Of Okabe and Ito's palette, apart under the common colour blindnesses.
_IMPLICIT, _OTHER, _REFERENCE = "#D55E00", "#0072B2", "0.4"


def draw(table: TableDefinition, rows: Sequence[Row]) -> Figure:
    """Draw a panel for every metric: mean, standard deviation, and every seed as a small point.

    Implicit methods are red; a line stands at the mean of the reference.
    """
    metrics = list(dict.fromkeys(row.metric for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    height = 1.4 + 0.28 * len(methods)
    figure = Figure(
        figsize=(2.0 + 3.5 * max(1, len(metrics)), height), dpi=100,
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1),
    )  # fmt: skip
    FigureCanvasAgg(figure)
    figure.suptitle(table.name)
    for i, metric in enumerate(metrics):
        axes = figure.add_subplot(1, len(metrics), i + 1)
        _panel(axes, methods, [row for row in rows if row.metric == metric], table.reference)
        axes.set_xlabel(f"{metric} on test")
        if i > 0:
            axes.tick_params(labelleft=False)
    return figure


def _panel(axes: Axes, methods: Sequence[str], rows: Sequence[Row], reference: str) -> None:
    for row in rows:
        height = methods.index(row.method)
        colour = _IMPLICIT if row.method.endswith("implicit") else _OTHER
        axes.errorbar(row.mean, height, xerr=row.std, fmt="o", color=colour, capsize=3)
        axes.plot(row.test, [height] * len(row.test), ".", color=colour, alpha=0.4, markersize=4)
        if row.method == reference:
            axes.axvline(row.mean, color=_REFERENCE, linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    # Labels of a narrow range have many digits.
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.spines[["top", "right"]].set_visible(False)
