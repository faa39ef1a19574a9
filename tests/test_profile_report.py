"""The traces of a profiled run and the report on them; files that are no traces."""

import gzip
from dataclasses import replace

import advice
import phases
import pytest
import report
from device_limits import measure_limits, read_limits
from phases import break_down
from profiled import FIRST, STEPS, profiled  # noqa: F401
from report_page import Page, Table
from trace_events import find_traces, read_trace

from ispen_dist.command_line import load_config
from ispen_dist.config import ProfileConfig
from ispen_dist.recording.metrics_file import read_metrics
from ispen_dist.recording.run_folder import check_folder


@pytest.fixture(scope="module")
def breakdowns(profiled):  # noqa: F811
    return [break_down(read_trace(path)) for path in find_traces(profiled)]


def test_every_rank_leaves_a_trace_with_all_ranges(profiled, breakdowns):  # noqa: F811
    names = sorted(p.name for p in (profiled / "profile").iterdir())
    assert names == [f"rank_{r}.6.pt.trace.json.gz" for r in range(2)]
    for rank, b in enumerate(breakdowns):
        assert (b.rank, b.num_rounds) == (rank, STEPS)
        per_round = {name: number / STEPS for name, number in b.calls.items()}
        expected = {
            "data": 4, "inner step": 3, "outer step": 1, "outer gradient": 1, "curvature": 1,
            "solve": 1, "product": 4, "mixed product": 1, "energy update": 1,
        }  # fmt: skip
        assert {name: per_round[name] for name in expected} == expected
        assert b.calls["evaluation"] == 1  # after the last round
        assert b.calls["all-reduce"] > 20 * STEPS
        assert b.products_per_outer_step == 4


def test_phases_add_up_to_the_clock_of_the_run(breakdowns):
    for b in breakdowns:
        assert sum(b.phases.values()) == pytest.approx(b.wall, rel=0.03)
        assert 0.0 < b.phases[phases.OTHER] < 0.3 * b.wall
        assert 0.0 < b.exposed <= b.communication < b.wall
        assert 0.0 < b.idle < b.wall
        assert b.peaks["product"] > 0
        assert b.flops > 0.0
        assert b.read_bytes > 0.0


def test_residuals_of_every_solve_are_in_the_metrics(profiled):  # noqa: F811
    rows = [r for r in read_metrics(profiled / "metrics.jsonl") if r["phase"] == "solve"]
    assert [row["step"] for row in rows] == [FIRST, 4, 5, 6]
    trained = {r["step"]: r for r in read_metrics(profiled / "metrics.jsonl") if "residual" in r}
    for row in rows:
        assert len(row["residuals"]) == 4
        assert row["residuals"][-1] == trained[row["step"]]["residual"]


def test_settings_of_the_profiler_may_change_when_a_run_goes_on(profiled):  # noqa: F811
    before = load_config(profiled / "config.yaml")
    now = replace(before, profile=ProfileConfig())
    check_folder(profiled, now, may_continue=True)


def test_the_report_prints_tables_and_writes_a_page(profiled, tmp_path, capsys):  # noqa: F811
    (tmp_path / "limits.json").write_text('{"flops": 5e10, "read_bytes": 1e10}')
    page = tmp_path / "report.html"
    limits = ["--limits", str(tmp_path / "limits.json")]
    assert report.main([str(profiled), *limits, "--output", str(page)]) == 0
    printed = capsys.readouterr().out
    for title in ("Time by phase", "Overlap", "Memory peak", "Achieved rates", "Solver", "largest"):
        assert title in printed
    text = page.read_text()
    assert text.count('src="data:image/svg+xml;base64,') == text.count("<img") == 5
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "<script" not in text
    assert text.rpartition("The largest costs")[2].count("<tr>") == 1 + advice.NUM_COSTS


def test_the_page_escapes_what_it_shows():
    page = Page("a <b>", [Table("t", ["c"], [["<script>"]])], [("p", "data:,")])
    assert "<script>" not in page.html()
    assert "&lt;script&gt;" in page.html()


def test_a_run_without_traces_is_refused_in_one_line(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'profile'}: expected traces")
    assert error.count("\n") == 1


BROKEN = {
    "empty": lambda whole: b"",
    "cut short": lambda whole: whole[: len(whole) // 2],
    "flipped": lambda whole: whole[:5000] + b"\0\xff\0\xff" + whole[5004:],
    "text": lambda whole: gzip.compress(b"hello"),
    "not compressed": lambda whole: b"{}",
    "JSON of another form": lambda whole: gzip.compress(b'{"ispen_dist": [1], "traceEvents": []}'),
    "foreign": lambda whole: gzip.compress(b'{"traceEvents": [{"ph": "X"}]}'),
    "no rounds": lambda whole: gzip.compress(
        b'{"ispen_dist": {"rank": 0, "last_round": 6, "seconds": []}, "traceEvents": []}'
    ),
    "cut in an event": lambda whole: gzip.compress(gzip.decompress(whole)[:200000]),
    "an event without a time": lambda whole: gzip.compress(
        b'{"ispen_dist": {"rank": 0, "last_round": 6, "seconds": []}, '
        b'"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "a"}]}'
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_whole_trace_is_refused_in_one_line(kind, profiled, tmp_path, capsys):  # noqa: F811
    (tmp_path / "profile").mkdir()
    whole = find_traces(profiled)[0]
    broken = tmp_path / "profile" / whole.name
    broken.write_bytes(BROKEN[kind](whole.read_bytes()))
    assert report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {broken}: expected ")
    assert "profile the run again" in error
    assert error.count("\n") == 1


def test_the_newest_recording_is_read(tmp_path):
    (tmp_path / "profile").mkdir()
    for name in ("rank_0.9", "rank_10.30", "rank_2.30", "rank_2.30.memory.pickle", "other"):
        (tmp_path / "profile" / f"{name}.pt.trace.json.gz").touch()
    found = [path.name.partition(".pt")[0] for path in find_traces(tmp_path)]
    assert found == ["rank_2.30", "rank_10.30"]


def test_limits_are_measured_or_read(tmp_path):
    limits = measure_limits(1)
    assert 1e8 < limits.flops < 1e16
    assert 1e8 < limits.read_bytes < 1e14
    (tmp_path / "limits.json").write_text('{"flops": 0, "read_bytes": 1}')
    with pytest.raises(ValueError, match=r"limits\.json: expected .*--limits"):
        read_limits(tmp_path / "limits.json")
