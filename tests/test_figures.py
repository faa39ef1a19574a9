"""Pictures of a run: heat maps and curves."""

from itertools import pairwise

import numpy as np
import pytest

from ispen_dist.recording import figures

NAN, INF = float("nan"), float("inf")


def tick_labels(figure, axis: str) -> list[str]:
    return [text.get_text() for text in getattr(figure.axes[0], f"get_{axis}ticklabels")()]


@pytest.mark.parametrize(
    ("num", "stride"), [(1, 1), (25, 1), (48, 1), (49, 5), (159, 5), (983, 50), (9000, 9000)]
)
def test_labels_are_thinned_where_there_is_no_room(num: int, stride: int) -> None:
    labels = [f"l{i}" for i in range(num)]
    tall = figures.heat_map(np.ones((num, 1)), labels, ["one"], "t")
    wide = figures.heat_map(np.ones((1, num)), ["one"], labels, "t")
    assert tick_labels(tall, "y") == tick_labels(wide, "x") == labels[::stride]
    assert wide.axes[0].get_xticks().tolist() == list(range(0, num, stride))


def test_labels_are_shown_as_they_are() -> None:
    labels = ["$^$", "$", "\\a", "x" * 20, "y" * 21]
    figure = figures.heat_map(np.eye(5), labels, labels, "t")
    assert figures.pixels(figure).shape[2] == 3, "$^$ as mathematics would be an error"
    assert tick_labels(figure, "x") == [*labels[:4], "y" * 18 + ".."]


@pytest.mark.parametrize(("num", "length"), [(25, 1), (17, 5), (159, 18), (48, 30)])
def test_labels_neither_overlap_nor_leave_the_picture(num: int, length: int) -> None:
    labels = [f"{i:0{length}d}"[-length:] if length > 2 else "W" for i in range(num)]
    figure = figures.heat_map(np.eye(num), labels, labels, "t", row_name="r", column_name="c")
    picture = figures.pixels(figure)
    axes = figure.axes[0]
    for axis in (axes.xaxis, axes.yaxis):
        boxes = [text.get_window_extent() for text in axis.get_ticklabels()]
        boxes.sort(key=lambda box: (box.x0, box.y0))
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))
        for box in (*boxes, axis.label.get_window_extent()):
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= picture.shape[1]
            assert box.y1 <= picture.shape[0]


@pytest.mark.parametrize(
    ("matrix", "limit", "extend"),
    [
        ([[3.0, -1.0]], 3.0, "neither"),
        ([[0.5, -4.0]], 4.0, "neither"),
        ([[0.0, 0.0]], 1.0, "neither"),
        ([[NAN, INF]], 1.0, "neither"),
        ([[NAN, 2.0]], 2.0, "neither"),
        ([[1.0] * 999 + [100.0]], 1.0, "max"),
        ([[1.0] * 999 + [-100.0]], 1.0, "min"),
        ([[1.0] * 1998 + [-100.0, 100.0]], 1.0, "both"),
        ([[0.0] * 999 + [100.0]], 100.0, "neither"),
    ],
)
def test_colours_are_centred_on_zero(matrix: list, limit: float, extend: str) -> None:
    figure = figures.heat_map(matrix, ["row"], ["x"] * len(matrix[0]), "t")
    image = figure.axes[0].images[0]
    assert image.get_clim() == (-limit, limit)
    assert image.colorbar is not None
    assert image.colorbar.extend == extend
    assert image.cmap(0.5)[:3] == pytest.approx((0.97, 0.97, 0.97), abs=0.01)


def test_cells_have_the_colours_of_their_values() -> None:
    figure = figures.heat_map([[5.0, -5.0], [0.0, NAN]], ["a", "b"], ["c", "d"], "t")
    picture, axes = figures.pixels(figure).astype(int), figure.axes[0]

    def colour(row: int, column: int) -> list[int]:
        # A quarter off the middle of the cell, in pixels from the top.
        x, y = axes.transData.transform((column + 0.25, row + 0.25))
        return picture[picture.shape[0] - int(y), int(x)].tolist()

    red, blue, white, grey = colour(0, 0), colour(0, 1), colour(1, 0), colour(1, 1)
    assert red[0] - red[2] > 50
    assert blue[2] - blue[0] > 50
    assert min(white) > 240
    assert grey == [191] * 3


def test_a_matrix_must_fit_its_labels() -> None:
    with pytest.raises(ValueError, match=r"expected a matrix of shape \(1, 2\)"):
        figures.heat_map(np.eye(2), ["a"], ["b", "c"], "t")
    with pytest.raises(ValueError, match="at least one entry"):
        figures.heat_map(np.zeros((0, 0)), [], [], "t")


def test_a_curve_shows_its_points_its_best_and_what_happened() -> None:
    points = [(10, 0.2), (20, NAN), (30, 0.5), (40, 0.4)]
    figure = figures.curves({"f1": points, "accuracy": []}, "dev", mark={15: "end of warm-up"})
    axes = figure.axes[0]
    ring, line = axes.lines[0], axes.lines[1]
    np.testing.assert_array_equal(ring.get_xydata(), [[30.0, 0.5]])
    np.testing.assert_array_equal(line.get_xydata(), points)
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["f1: best 0.5 at 30", "accuracy"]
    assert axes.texts[0].get_text() == "end of warm-up"
    assert figures.pixels(figure).shape == (400, 700, 3)


@pytest.mark.parametrize("series", [{}, {"f1": []}, {"f1": [(1, NAN)]}, {"f1": [(1, 0.5)]}])
def test_little_data_makes_a_picture_too(series: dict) -> None:
    assert figures.pixels(figures.curves(series, "dev")).std() > 0
