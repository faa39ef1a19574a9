"""Metric rows, read back: exact, in order, and whole after a kill."""

import json
import os
from pathlib import Path

import pytest

from ispen_dist.recording.metrics_file import MetricsFile, read_metrics

NAN, INF = float("nan"), float("inf")


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


def test_metrics_lines_are_json_that_any_reader_takes(tmp_path: Path) -> None:
    write_rows(tmp_path / "m.jsonl", 3)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for line in (tmp_path / "m.jsonl").read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["step"] > 0
