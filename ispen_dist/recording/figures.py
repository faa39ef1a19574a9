"""Pictures of a run, drawn without a display and without matplotlib's global state."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

# Blue, white, red: zero is white, and both ends stay apart under the common colour blindnesses.
_DIVERGING = "RdBu_r"
# Okabe and Ito's palette, made for the same readers.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Up to here every row gets its label; above, labels would be unreadable or the picture huge.
_MAX_LABELS = 48
# A few outliers must not wash out the rest; what lies beyond is drawn in the end colours.
_CLIP_QUANTILE = 0.995


def heat_map(
    matrix: ArrayLike,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str,
    *,
    row_name: str = "",
    column_name: str = "",
    value_name: str = "",
) -> Figure:
    """Draw a matrix in diverging colours centred on zero.

    Up to 48 rows or columns are labelled one by one, more at regular intervals. The scale ends at
    the largest absolute entry; where that is more than twice the 99.5th percentile, at the
    percentile, with a pointed end of the colour bar for what lies beyond. Entries that are not
    finite are grey.

    Args:
        matrix: (R, C).
        row_labels: R names.
        column_labels: C names.
        title: of the picture.
        row_name: what the rows are.
        column_name: what the columns are.
        value_name: what the entries are, beside the colour bar.
    """
    values = np.asarray(matrix, dtype=np.float64)
    shape = (len(row_labels), len(column_labels))
    if values.shape != shape or 0 in shape:
        raise ValueError(
            f"heat_map {title!r}: expected a matrix of shape {shape} after its labels, with at "
            f"least one entry, got {values.shape}; give one label per row and column"
        )
    figure = _empty_figure(*_size(row_labels, column_labels))
    axes = figure.add_subplot()
    limit, extend = _scale(values)
    colours = colormaps[_DIVERGING].with_extremes(bad="0.75")
    # The picture's size already makes cells about square; a fixed aspect would fight the layout.
    image = axes.imshow(
        np.ma.masked_invalid(values), cmap=colours, vmin=-limit, vmax=limit, aspect="auto"
    )
    _label_axes(axes, row_labels, column_labels)
    axes.set(title=title, xlabel=column_name, ylabel=row_name)
    bar = figure.colorbar(image, ax=axes, extend=extend, fraction=0.046, pad=0.03)
    bar.set_label(value_name)
    bar.outline.set_visible(False)
    return figure


def _size(row_labels: Sequence[str], column_labels: Sequence[str]) -> tuple[float, float]:
    """Return width and height in inches: a label's height per cell, within a screen, and text."""
    width, height = (
        float(np.clip(0.26 * len(labels), 2.6, 8.0)) for labels in (column_labels, row_labels)
    )
    left, below = (
        0.07 * max(len(_short(label)) for label in labels) for labels in (row_labels, column_labels)
    )
    return width + left + 1.5, height + below + 0.8


def _scale(values: NDArray[np.float64]) -> tuple[float, str]:
    """Return the end of the colour scale and which ends of the bar are pointed."""
    finite = values[np.isfinite(values)]
    largest = float(np.abs(finite).max(initial=0.0))
    if largest == 0.0:
        return 1.0, "neither"
    limit = float(np.quantile(np.abs(finite), _CLIP_QUANTILE))
    if largest <= 2.0 * limit or limit == 0.0:
        return largest, "neither"
    below, above = finite.min() < -limit, finite.max() > limit
    return limit, {(0, 0): "neither", (1, 0): "min", (0, 1): "max"}.get((below, above), "both")


def _label_axes(axes: Axes, row_labels: Sequence[str], column_labels: Sequence[str]) -> None:
    rows, columns = _shown(len(row_labels)), _shown(len(column_labels))
    size = 8 if max(len(row_labels), len(column_labels)) <= _MAX_LABELS else 7
    # Labels are names as they are: two dollars would start matplotlib's mathematics.
    text: dict[str, Any] = {"fontsize": size, "parse_math": False}
    axes.set_yticks(rows, [_short(row_labels[i]) for i in rows], **text)
    axes.set_xticks(columns, [_short(column_labels[i]) for i in columns], **text)
    # Short tags stand upright; longer names are turned so that neighbours do not collide.
    if max(len(column_labels[i]) for i in columns) > 2:
        axes.tick_params(axis="x", rotation=90)
    axes.tick_params(length=2, color="0.5")
    axes.spines[:].set_visible(False)
    if max(len(row_labels), len(column_labels)) <= _MAX_LABELS:
        _draw_grid(axes, len(row_labels), len(column_labels))


def _shown(num: int) -> list[int]:
    """Return which of `num` positions are labelled: all, or every n-th for a round n."""
    stride = next(n for n in (1, 5, 10, 20, 50, 100, num) if num <= _MAX_LABELS * n)
    return list(range(0, num, stride))


def _short(label: str) -> str:
    return label if len(label) <= 20 else f"{label[:18]}.."


def _draw_grid(axes: Axes, num_rows: int, num_columns: int) -> None:
    axes.set_xticks(np.arange(num_columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(num_rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="minor", length=0)


def curves(
    series: Mapping[str, Sequence[tuple[int, float]]],
    title: str,
    *,
    step_name: str = "round",
    value_name: str = "",
    mark: Mapping[int, str] | None = None,
) -> Figure:
    """Draw figures over steps, such as the dev metrics, and ring the highest point of each.

    Args:
        series: (step, value) pairs by name; values that are not finite leave a gap.
        title: of the picture.
        step_name: what a step is.
        value_name: what the values are.
        mark: steps to point out, by what happened there, such as the end of the warm-up.
    """
    figure = _empty_figure(7.0, 4.0)
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(series.items()):
        _draw_curve(axes, name, points, _COLOURS[i % len(_COLOURS)])
    for step, event in (mark or {}).items():
        axes.axvline(step, color="0.6", linewidth=1.0, linestyle=(0, (4, 3)), zorder=0)
        axes.annotate(
            event, (step, 1.0), xycoords=("data", "axes fraction"), xytext=(4, -4),
            textcoords="offset points", va="top", fontsize=8, color="0.4",
        )  # fmt: skip
    axes.set(title=title, xlabel=step_name, ylabel=value_name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    if series:
        axes.legend(loc="best", frameon=False, fontsize=9)
    return figure


def _draw_curve(axes: Axes, name: str, points: Sequence[tuple[int, float]], colour: str) -> None:
    steps = np.array([step for step, _ in points], dtype=np.float64)
    values = np.array([value for _, value in points], dtype=np.float64)
    finite = np.isfinite(values)
    label = name
    if finite.any():
        best = int(np.argmax(np.where(finite, values, -np.inf)))
        label = f"{name}: best {values[best]:.4g} at {steps[best]:.0f}"
        axes.plot(steps[best], values[best], "o", ms=9, mfc="none", mec=colour, mew=1.5)
    marker = "o" if len(points) <= 60 else ""
    axes.plot(steps, values, color=colour, linewidth=1.5, marker=marker, ms=3, label=label)


def convergence(solves: Mapping[int, Sequence[float]], title: str) -> Figure:
    """Draw the relative residuals of solves over their steps, on a logarithmic axis.

    Args:
        solves: residuals before each step and at the end, by the round of the solve; what is not
            finite or zero leaves a gap.
        title: of the picture.
    """
    figure = _empty_figure(7.0, 4.0)
    axes = figure.add_subplot()
    for i, (number, residuals) in enumerate(solves.items()):
        values = np.array(residuals, dtype=np.float64)
        values[~(np.isfinite(values) & (values > 0.0))] = np.nan
        colour = _COLOURS[i % len(_COLOURS)]
        axes.plot(values, color=colour, marker="o", ms=3, linewidth=1.5, label=f"round {number}")
    axes.set(title=title, xlabel="product", ylabel="|b - A q| / |b|", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    if solves:
        axes.legend(loc="best", frameon=False, fontsize=9)
    return figure


def _empty_figure(width: float, height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    return Figure(figsize=(width, height), dpi=100, layout=layout)


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Render a figure into RGB values of shape (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
