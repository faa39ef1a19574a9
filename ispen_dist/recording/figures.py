"""Pictures of a run, drawn without a display and without matplotlib's global state."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
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

    Up to 48 rows or columns are labelled one by one, more at regular intervals. The ends of the
    scale are plus and minus the 99.5th percentile of the absolute entries; entries beyond it are
    marked by the pointed ends of the colour bar. Entries that are not finite are grey.

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
    width, height = (_side(num) for num in reversed(shape))
    figure = Figure(figsize=(width + 1.6, height + 0.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    limit, extend = _scale(values)
    image = axes.imshow(
        np.ma.masked_invalid(values), cmap=colormaps[_DIVERGING].with_extremes(bad="0.75"), vmin=-limit, vmax=limit,
        interpolation="nearest",
    )  # fmt: skip
    _label_axes(axes, row_labels, column_labels)
    axes.set(title=title, xlabel=column_name, ylabel=row_name)
    bar = figure.colorbar(image, ax=axes, extend=extend, fraction=0.046, pad=0.03)
    bar.set_label(value_name)
    bar.outline.set_visible(False)
    return figure


def _side(num: int) -> float:
    """Return inches for `num` cells: a label's height each, within the size of a screen."""
    return float(np.clip(0.26 * num, 2.8, 8.0))


def _scale(values: NDArray[np.float64]) -> tuple[float, str]:
    """Return the end of the colour scale and which ends of the bar are pointed."""
    finite = values[np.isfinite(values)]
    largest = float(np.abs(finite).max(initial=0.0))
    if largest == 0.0:
        return 1.0, "neither"
    limit = float(np.quantile(np.abs(finite), _CLIP_QUANTILE)) or largest
    below, above = finite.min() < -limit, finite.max() > limit
    return limit, {(0, 0): "neither", (1, 0): "min", (0, 1): "max"}.get((below, above), "both")


def _label_axes(axes: Axes, row_labels: Sequence[str], column_labels: Sequence[str]) -> None:
    rows, columns = _shown(len(row_labels)), _shown(len(column_labels))
    size = 8 if max(len(row_labels), len(column_labels)) <= _MAX_LABELS else 7
    axes.set_yticks(rows, [_short(row_labels[i]) for i in rows], fontsize=size)
    axes.set_xticks(columns, [_short(column_labels[i]) for i in columns], fontsize=size)
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
    # A dollar would start matplotlib's mathematics, and `$` is a tag of its own in tag sets.
    return (label if len(label) <= 20 else f"{label[:18]}..").replace("$", r"\$")


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
    figure = Figure(figsize=(7.0, 4.0), dpi=100, layout="constrained")
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
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
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


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Render a figure into RGB values of shape (height, width, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
