"""Records of a run, read back: metric rows, TensorBoard events, pictures and the console."""

import io
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from ispen_dist.recording import figures
from ispen_dist.recording.console import Console, compact
from ispen_dist.recording.metrics_file import MetricsFile, read_metrics
from ispen_dist.recording.tensorboard import TensorBoardRecorder

NAN, INF = float("nan"), float("inf")


# -- metric rows -------------------------------------------------------------------------------


def write_rows(path: Path, last: int, resume_step: int | None = None) -> None:
    file = MetricsFile(path, resume_step)
    for step in range((resume_step or 0) + 1, last + 1):
        file.write(step, "train", {"inner_loss": step / 3})
        if step % 2 == 0:
            file.write(step, "dev", {"f1": step / 7})
    file.close()


def test_rows_come_back_in_order_and_exactly(tmp_path: Path) -> None:
    write_rows(tmp_path / "m.jsonl", 2)
    assert (tmp_path / "m.jsonl").read_text().splitlines()[0] == (
        '{"step": 1, "phase": "train", "inner_loss": 0.3333333333333333}'
    )
    assert read_metrics(tmp_path / "m.jsonl") == [
        {"step": 1, "phase": "train", "inner_loss": 1 / 3},
        {"step": 2, "phase": "train", "inner_loss": 2 / 3},
        {"step": 2, "phase": "dev", "f1": 2 / 7},
    ]


def test_a_row_can_be_read_before_the_file_is_closed(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.write(1, "train", {"x": 1})
    assert len(read_metrics(tmp_path / "m.jsonl")) == 1
    file.close()
    file.close()


def test_what_json_lacks_becomes_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.write(1, "train", {"a": NAN, "b": INF, "c": -INF, "d": "caf\u00e9", "e": None, "f": True})
    file.close()
    assert "NaN" not in (tmp_path / "m.jsonl").read_text()
    row = read_metrics(tmp_path / "m.jsonl")[0]
    assert list(row.values()) == [1, "train", None, None, None, "caf\u00e9", None, True]


@pytest.mark.parametrize("resume_step", [0, 3, 4, 9, 12])
def test_a_resumed_run_writes_the_rows_of_an_uninterrupted_one(
    tmp_path: Path, resume_step: int
) -> None:
    write_rows(tmp_path / "whole.jsonl", 12)
    write_rows(tmp_path / "m.jsonl", 9 if resume_step < 10 else 12)
    write_rows(tmp_path / "m.jsonl", 12, resume_step)
    assert (tmp_path / "m.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["m.jsonl", "whole.jsonl"]


@pytest.mark.parametrize("num_bytes", range(1, 25))
def test_a_half_written_last_row_is_dropped_with_a_warning(tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "m.jsonl"
    write_rows(path, 2)
    path.write_bytes(path.read_bytes() + b'{"step": 3, "phase": "train"}\n'[:num_bytes])
    with pytest.warns(UserWarning, match="line 4: dropped a half-written last row"):
        assert len(read_metrics(path)) == 3
    with pytest.warns(UserWarning, match=r"m\.jsonl, line 4"):
        write_rows(path, 3, resume_step=2)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 2, 3]


def test_a_whole_last_row_without_its_line_end_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_rows(path, 3)
    path.write_bytes(path.read_bytes().rstrip())
    write_rows(path, 4, resume_step=3)
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("line", ['{"step": 1, "ph', "[1]", '{"step": 1}', '{"phase": "dev"}', ""])
def test_a_broken_row_inside_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(f'{{"step": 1, "phase": "train"}}\n{line}\n{{"step": 2, "phase": "train"}}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: expected a metrics row"):
        read_metrics(path)


def test_a_kill_while_rewriting_leaves_the_old_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.jsonl"
    write_rows(path, 5)
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(KeyboardInterrupt):
        MetricsFile(path, resume_step=2)
    assert path.read_bytes() == before


def test_a_new_run_does_not_write_into_the_rows_of_another(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_rows(path, 2)
    with pytest.raises(ValueError, match="expected no rows in a new run, got 3"):
        MetricsFile(path)
    assert len(read_metrics(path)) == 3


def test_no_step_of_a_phase_stands_twice(tmp_path: Path) -> None:
    write_rows(tmp_path / "m.jsonl", 4)
    file = MetricsFile(tmp_path / "m.jsonl", resume_step=3)
    with pytest.raises(ValueError, match="expected a step above 3 for phase train, got 3"):
        file.write(3, "train", {})
    file.write(3, "dev", {})
    with pytest.raises(ValueError, match="'phase' has a reserved name"):
        file.write(4, "train", {"phase": 1})
    file.close()


# -- TensorBoard -------------------------------------------------------------------------------


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


def test_scalars_texts_and_pictures_are_read_back(tmp_path: Path) -> None:
    labels = ["a", "$", "c"]
    matrix = torch.randn(3, 3, dtype=torch.bfloat16, requires_grad=True)
    with TensorBoardRecorder(tmp_path) as recorder:
        recorder.scalars({"inner/loss": 0.5, "dev/f1": None, "solver/steps": 7}, 3)
        recorder.scalars({"inner/loss": NAN}, 4)
        recorder.text("config", "train:\n  seed: 1")
        recorder.heat_map("interaction", matrix, labels, labels, 3, value_name="score")
        recorder.heat_map("interaction", matrix, labels, labels, 6)
        recorder.curves("dev", {"f1": [(1, 0.1), (2, NAN), (3, 0.3)]}, 3, mark={2: "here"})
    accumulator = events(tmp_path)
    tags = accumulator.Tags()
    assert sorted(tags["scalars"]) == ["inner/loss", "solver/steps"]
    assert accumulator.Scalars("inner/loss")[0].value == 0.5
    assert np.isnan(accumulator.Scalars("inner/loss")[1].value)
    assert sorted(tags["images"]) == ["dev", "interaction"]
    assert [image.step for image in accumulator.Images("interaction")] == [3, 6]
    assert accumulator.Images("dev")[0].encoded_image_string.startswith(b"\x89PNG")
    assert (accumulator.Images("dev")[0].width, accumulator.Images("dev")[0].height) == (700, 400)
    text = accumulator.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert text == b"train:\n  seed: 1"


def test_a_resumed_run_shows_each_step_once(tmp_path: Path) -> None:
    with TensorBoardRecorder(tmp_path) as recorder:
        for step in range(1, 7):
            recorder.scalars({"loss": float(step)}, step)
    with TensorBoardRecorder(tmp_path, purge_step=4) as recorder:
        for step in range(4, 9):
            recorder.scalars({"loss": 10.0 * step}, step)
    assert scalars(tmp_path, "loss") == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0), (7, 70.0), (8, 80.0)
    ]  # fmt: skip


def test_settings_and_results_are_in_the_same_run(tmp_path: Path) -> None:
    settings = {"solver": {"name": "cg", "rtol": 1e-3}, "files": ["a", "b"], "on": True, "no": None}
    with TensorBoardRecorder(tmp_path) as recorder:
        recorder.hparams(settings, {"final/f1": 0.25}, 9)
    assert [path.is_file() for path in tmp_path.iterdir()] == [True], "no folder of a second run"
    assert scalars(tmp_path, "final/f1") == [(9, 0.25)]
    content = events(tmp_path).SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    start = metadata.parse_session_start_info_plugin_data(content).hparams
    assert {name: start[name].WhichOneof("kind") for name in start} == {
        "solver.name": "string_value",
        "solver.rtol": "number_value",
        "files": "string_value",
        "on": "string_value",
        "no": "string_value",
    }
    assert start["solver.rtol"].number_value == 1e-3
    assert start["files"].string_value == "['a', 'b']"
    assert start["on"].string_value == "True"


def test_drawing_needs_neither_pyplot_nor_a_display() -> None:
    code = (
        "import sys; from ispen_dist.recording import figures, tensorboard\n"
        "figures.pixels(figures.heat_map([[1.0]], ['a'], ['b'], 't'))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# -- pictures ----------------------------------------------------------------------------------


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


# -- console -----------------------------------------------------------------------------------


def run_console(console: Console, total: int = 12, completed: int = 0) -> None:
    with console:
        console.message("read [data.train] :smile: " + "x" * 150)
        console.start(total, "training", completed)
        for step in range(completed + 1, total + 1):
            console.update(step, {"inner loss": 1 / step, "solver": "converged", "dev": None})
        console.table("Result [final]", ["metric", "dev"], [["F1", 0.43012], ["none", None]])


def test_a_log_gets_plain_lines() -> None:
    stream = io.StringIO()
    run_console(Console(True, every=5, stream=stream))
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()
    assert lines[0] == "read [data.train] :smile: " + "x" * 150
    assert lines[1] == "training: 12 steps"
    rows = [line for line in lines if line.startswith("step ")]
    assert [row.split()[1] for row in rows] == ["1/12", "5/12", "10/12", "12/12"]
    assert rows[1].startswith("step 5/12  inner loss 0.2  solver converged  dev -  ")
    assert rows[1].endswith(" s")
    assert lines[-7:] == [
        "Result [final]",
        "+--------+--------+",
        "| metric |    dev |",
        "+--------+--------+",
        "| F1     | 0.4301 |",
        "| none   |      - |",
        "+--------+--------+",
    ]


def test_a_resumed_log_says_where_it_begins() -> None:
    stream = io.StringIO()
    run_console(Console(True, every=100, stream=stream), total=9, completed=6)
    lines = stream.getvalue().splitlines()
    assert lines[1] == "training: 9 steps from step 6"
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["7/9", "9/9"]


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    run_console(Console(False, every=1, stream=stream))
    run_console(Console(False, every=1))
    assert stream.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_a_command_in_a_pipe_prints_plain_lines() -> None:
    code = (
        "from ispen_dist.recording.console import Console\n"
        "with Console(True, every=2) as console:\n"
        "    console.start(4, 'training')\n"
        "    for step in range(1, 5): console.update(step, {'loss': 0.5})\n"
    )
    environment = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert [line[:8] for line in done.stdout.splitlines()] == [
        "training", "step 1/4", "step 2/4", "step 4/4"
    ]  # fmt: skip


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    run_console(Console(True, stream=stream))
    output = stream.getvalue()
    assert "12/12" in output
    assert "converged" in output
    assert "step 12/12" not in output
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1, "the cursor is shown again"


def test_the_terminal_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()

    def fail() -> None:
        with Console(True, stream=stream) as console:
            console.start(3, "training")
            console.update(1, {"loss": 1.0})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    run_console(Console(True, stream=stream))
    assert "step 12/12" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (-0.0, "-0"), (1.0, "1"), (0.001, "0.001"), (0.00099, "9.90e-04"),
        (-3.14159, "-3.142"), (999.94, "999.9"), (1234.5, "1,234"), (5e7, "5.00e+07"),
        (NAN, "nan"), (INF, "inf"), (-INF, "-inf"), (12345678, "12345678"), ("cg", "cg"),
        (None, "-"), (True, "True"),
    ],
)  # fmt: skip
def test_figures_are_compact(value: float | str | None, text: str) -> None:
    assert compact(value) == text


def test_metrics_lines_are_json_that_any_reader_takes(tmp_path: Path) -> None:
    write_rows(tmp_path / "m.jsonl", 3)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in (tmp_path / "m.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["step"] > 0
