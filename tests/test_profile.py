"""Profiling: nothing is called when it is off, traces and report of a run, files that are none."""

import gzip
import json
import re
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from labels import labels  # noqa: F401
from problems import multilabel_config
from profiled import FIRST, STEPS, profiled  # noqa: F401
from torch._C import _distributed_c10d

from ispen_dist import ranges, watchdog
from ispen_dist.command_line import _HINTS, load_config, parse_train
from ispen_dist.config import ConfigError, ProfileConfig
from ispen_dist.data.loading import load_splits
from ispen_dist.distributed import Session
from ispen_dist.distributed.flight_record import FlightRecord
from ispen_dist.recording import profiler
from ispen_dist.recording.console import Console
from ispen_dist.recording.metrics_file import read_metrics
from ispen_dist.recording.profiler import RoundProfiler, first_profiled
from ispen_dist.recording.run_folder import RunFolder, check_folder
from ispen_dist.trainer import Trainer
from ispen_dist.watchdog import Watchdog
from ispen_dist.write_failures import StorageFailed

sys.path.append(str(Path(__file__).parent.parent / "profiling"))

import advice
import phases
import report
from device_limits import measure_limits, read_limits
from operator_costs import input_bytes, leaves, matrix_product_flops
from phases import Breakdown, Timeline, break_down
from report_page import Page, Table
from trace_events import Event, Trace, find_traces, read_trace

# -- on and off ----------------------------------------------------------------------------------


@pytest.fixture
def called(monkeypatch):
    """Counts what a run asks of the profilers: ranges of ours by name, and recorders."""
    counts: Counter[str] = Counter()

    def watch(owner, method, name_of):
        original = getattr(owner, method)

        def counted(self, *args, **kwargs):
            if (name := name_of(*args)) is not None:
                counts[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, counted)

    def own(name, *rest):  # AdamW has ranges of its own.
        return name if name in ranges.NAMES else None

    watch(torch.autograd.profiler.record_function, "__init__", own)
    watch(torch.profiler.profile, "__init__", lambda *args: "recorder")
    fast = torch._C._profiler._RecordFunctionFast

    def fast_counted(name, *rest):
        counts["fast"] += 1
        return fast(name, *rest)

    monkeypatch.setattr(torch._C._profiler, "_RecordFunctionFast", fast_counted)
    return counts


def train(config_file, output, *flags):
    config = parse_train(["--config", str(config_file), *flags]).config
    with Console(is_main=True) as console:
        folder = RunFolder(output, config, console, is_main=True)
        Trainer(config, load_splits(config), Session(), folder).run()


def test_a_run_that_is_not_profiled_calls_no_profiler(labels, tmp_path, called):  # noqa: F811
    train(labels, tmp_path / "off")
    assert not called
    assert not (tmp_path / "off" / "profile").exists()
    assert all(row["phase"] != "solve" for row in read_metrics(tmp_path / "off" / "metrics.jsonl"))
    train(labels, tmp_path / "on", "--profile.enabled=true", "--profile.steps=2")
    assert called["recorder"] == 1
    # Two recorded rounds and the one before; each has a warm start and three steps.
    assert called["product"] == 3 * 4
    assert called["outer step"] == 3
    assert called["inner step"] == 9
    assert not called["fast"]
    assert ranges.named("product") is ranges.named("solve"), "recording went on"


def test_a_range_is_made_only_while_one_is_wanted():
    seen = []

    class Range:
        def __init__(self, name):
            seen.append(name)

        def __enter__(self):
            seen.append("in")

        def __exit__(self, *error):
            seen.append("out")

    double = ranges.marked("data")(lambda x: 2 * x)
    assert double(1) == 2
    ranges.use(Range)
    try:
        assert double(2) == 4
    finally:
        ranges.use(None)
    assert double(3) == 6
    assert seen == ["data", "in", "out"]


@pytest.mark.parametrize("values", [{"steps": 0}, {"warmup": 0}, {"repeat": -1}, {"nsys": True}])
def test_settings_that_cannot_work_are_named(values):
    with pytest.raises(ConfigError, match=r"^profile\."):
        ProfileConfig(**values)


def test_a_recording_must_end_within_the_run(labels):  # noqa: F811
    def first(*flags):
        flags = ["--profile.steps=2", *flags]
        return first_profiled(parse_train(["--config", str(labels), *flags]).config)

    assert first() == 3  # after two warm-up rounds and an outer step
    assert first("--train.method=mle") == 0
    with pytest.raises(ConfigError, match=r"^profile\.steps: .* 6 rounds.* after 7"):
        first("--profile.first_round=1", "--profile.steps=5")


@pytest.mark.parametrize("name", ["nsys", "memory_snapshot"])
def test_what_needs_a_gpu_says_so(name, labels, tmp_path):  # noqa: F811
    flags = ["--profile.enabled=true", "--profile.steps=2", f"--profile.{name}=true"]
    with pytest.raises(ConfigError, match=rf"^profile\.{name}: expected a run on a GPU"):
        train(labels, tmp_path / "run", *flags)


def test_nsight_gets_ranges_around_the_recorded_rounds(labels, tmp_path, monkeypatch):  # noqa: F811
    """The calls, without a GPU: none is there to take them."""
    calls = []
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: calls.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: calls.append("stop"))
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: calls.append(name))
    memory = torch.cuda.memory
    monkeypatch.setattr(
        memory,
        "_record_memory_history",
        lambda enabled="all", **_: calls.append(f"history {enabled}"),
    )
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: Path(path).write_text("snapshot"))
    flags = [f"--profile.{n}=true" for n in ("enabled", "nsys", "memory_snapshot")]
    config = parse_train(["--config", str(labels), *flags, "--profile.steps=2"]).config
    folder = RunFolder(tmp_path, config, Console(is_main=False), is_main=True)

    class OnGpu:
        rank, device, watchdog = 1, torch.device("cuda"), Watchdog(0.0)

    with RoundProfiler(config, OnGpu(), folder).begin(0) as recorder:
        for number in range(6):
            ranges.named("product")
            calls.append(number)
            recorder.end_round()
    begins = ["history all", "start"]
    assert calls == [
        0,
        1,
        2,
        "product",
        3,
        *begins,
        "product",
        4,
        "product",
        5,
        "stop",
        "history None",
    ]
    assert (tmp_path / "profile" / "rank_1.6.memory.pickle").read_text() == "snapshot"


def test_an_interrupted_recording_leaves_its_whole_rounds(labels, tmp_path):  # noqa: F811
    flags = ["--profile.enabled=true", "--profile.first_round=0", "--profile.steps=5"]
    config = parse_train(["--config", str(labels), *flags]).config
    folder = RunFolder(tmp_path, config, Console(is_main=False), is_main=True)

    class OnCpu:
        rank, device, watchdog = 0, torch.device("cpu"), Watchdog(0.0)

    def rounds(recorder):
        for number in range(4):
            with ranges.named("data"):
                time.sleep(0.05)
            if number == 3:
                raise RuntimeError("interrupted")
            recorder.end_round()

    with (
        pytest.raises(RuntimeError, match="interrupted"),
        RoundProfiler(config, OnCpu(), folder).begin(0) as recorder,
    ):
        rounds(recorder)
    (path,) = find_traces(tmp_path)
    b = break_down(read_trace(path))
    assert (path.name, b.num_rounds) == ("rank_0.3.pt.trace.json.gz", 2)
    assert b.calls == {"data": 2}
    assert b.traced == pytest.approx(b.wall, rel=0.03)


# -- traces of a run -----------------------------------------------------------------------------


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


# -- arithmetic of traces, by hand -----------------------------------------------------------------


def event(name, begin, end, category="user_annotation", thread=1, **args):
    return Event(name, category, float(begin), float(end), thread, args)


def test_each_moment_belongs_to_the_innermost_range():
    nested = [event("solve", 1, 9), event("product", 2, 4), event("all-reduce", 3, 4),
              event("product", 4, 6), event("data", 11, 12)]  # fmt: skip
    timeline = Timeline(nested, [event("ProfilerStep#1", 0, 10), event("ProfilerStep#2", 10.5, 13)])
    assert timeline.pieces() == [
        (0, 1, "other"), (1, 2, "solve"), (2, 3, "product"), (3, 4, "all-reduce"),
        (4, 6, "product"), (6, 9, "solve"), (9, 10, "other"), (10.5, 11, "other"),
        (11, 12, "data"), (12, 13, "other"),
    ]  # fmt: skip
    assert [timeline.at(t) for t in (0.5, 3.5, 5, 8)] == ["other", "all-reduce", "product", "solve"]


def test_kernels_count_for_the_phase_that_launched_them_and_hide_communication():
    trace = Trace(Path("x"), 0, 1, [10.0])
    for e in (
        event("ProfilerStep#0", 0, 10),
        event("product", 0, 5),
        event("cudaLaunchKernel", 1, 1, "cuda_runtime", correlation=7),
        event("cudaLaunchKernel", 6, 6, "cuda_runtime", correlation=8),
        event("gemm", 2, 6, "kernel", 9, correlation=7),
        event("ncclDevKernel_AllReduce", 5, 8, "kernel", 10, correlation=8),
    ):
        trace.add(e)
    b = break_down(trace)
    assert b.phases == {"product": 5.0, "other": 5.0}
    assert b.device == {"product": 4.0, "other": 3.0}
    assert (b.communication, b.exposed, b.idle) == (3.0, 2.0, 4.0)


def test_a_gather_behind_operators_is_hidden_and_a_wait_is_not():
    trace = Trace(Path("x"), 0, 1, [10.0])
    for e in (
        event("ProfilerStep#0", 0, 10),
        event("gloo:all_gather", 1, 6, thread=2),
        event("aten::mm", 1, 4, "cpu_op"),
        event("all-gather", 4, 6),
        event("c10d::allgather_", 4, 6, "cpu_op"),
    ):
        trace.add(e)
    b = break_down(trace)
    assert (b.communication, b.exposed, b.idle) == (5.0, 2.0, 5.0)


def test_intervals():
    assert phases.union([(3, 4), (0, 1), (0.5, 2), (4, 5)]) == [(0, 2), (3, 5)]
    assert phases.without([(0, 10)], [(1, 2), (3, 4), (9, 12)]) == [(0, 1), (2, 3), (4, 9)]
    assert phases.without([(0, 1), (2, 3)], [(0, 5)]) == []


def operator(name, *shapes, begin=0.0, end=1.0, kind="float"):
    inputs = {"Input Dims": list(map(list, shapes)), "Input type": [kind] * len(shapes)}
    return event(name, begin, end, "cpu_op", **inputs)


def test_matrix_products_are_counted_by_their_shapes():
    assert matrix_product_flops(operator("aten::mm", (2, 3), (3, 5))) == 60
    assert matrix_product_flops(operator("aten::addmm", (5,), (2, 3), (3, 5))) == 60
    assert matrix_product_flops(operator("aten::bmm", (7, 2, 3), (7, 3, 5))) == 420
    assert matrix_product_flops(operator("aten::mv", (2, 3), (3,))) == 12
    assert matrix_product_flops(operator("aten::add", (2, 3), (2, 3))) == 0
    assert matrix_product_flops(event("aten::mm", 0, 1)) == 0


def test_bytes_are_those_of_operators_that_call_no_other():
    outer = operator("aten::linear", (2, 3), (5, 3), begin=0, end=10)
    inner = operator("aten::mm", (2, 3), (3, 5), begin=1, end=9)
    assert leaves([outer, inner]) == [inner]
    assert input_bytes(inner) == 4 * (6 + 15)
    assert input_bytes(operator("aten::view", (2, 3))) == 0
    assert input_bytes(operator("aten::add", (2, 3), (), kind="double")) == 48


# -- advice ----------------------------------------------------------------------------------------


def costs(phase, **changed):
    """The advice for a phase; `changed` are fields by section."""
    config = multilabel_config()
    for section, fields in changed.items():
        config = replace(config, **{section: replace(getattr(config, section), **fields)})
    return advice.largest_costs([Breakdown(0, 1, 1.0, {phase: 1.0})], config)[0].advice


@pytest.mark.parametrize("phase", [*ranges.NAMES, phases.OTHER])
def test_every_phase_has_advice(phase):
    assert len(costs(phase)) > 20


def test_advice_follows_the_settings():
    assert "compile.curvature=true" in costs("product")
    assert "compile.curvature" not in costs("product", compile={"curvature": True})
    assert "solver.max_steps=7" in costs("product", solver={"max_steps": 7})
    assert "cg_single_reduction" in costs("all-reduce")
    assert "cg_single" not in costs("all-reduce", solver={"name": "cg_single_reduction"})
    assert "solver.prefetch=true" in costs("all-gather", solver={"prefetch": False})
    assert "compile.whole_round=true" in costs("inner step", compile={"inner": True})
    assert "train.eval_every=4" in costs("evaluation", train={"eval_every": 4})


def test_settings_in_advice_exist():
    """A setting that is renamed must be renamed here too."""
    text = Path(advice.__file__).read_text("utf-8")
    sections = "|".join(sorted({name.partition(".")[0] for name in _HINTS}))
    named = set(re.findall(rf"\b((?:{sections})\.[a-z_]+)", text))
    assert len(named) > 15
    assert {n for n in named if not n.startswith("profile.first")} <= set(_HINTS)


def test_the_page_escapes_what_it_shows():
    page = Page("a <b>", [Table("t", ["c"], [["<script>"]])], [("p", "data:,")])
    assert "<script>" not in page.html()
    assert "&lt;script&gt;" in page.html()


# -- the record of collectives ---------------------------------------------------------------------


RECORD = {
    "entries": [
        {"collective_seq_id": n, "input_sizes": [[5, 2]], "pg_id": 0,
         "profiling_name": "gloo:all_reduce", "state": "scheduled"} for n in (1, 2)
    ],
    "pg_status": {"0": {"last_completed_collective": "1"}},
}  # fmt: skip


def test_the_record_names_the_collective_that_is_under_way(tmp_path, monkeypatch):
    monkeypatch.setattr(
        _distributed_c10d, "_dump_fr_trace_json", lambda: json.dumps(RECORD), raising=False
    )
    monkeypatch.setattr(_distributed_c10d, "_dump_fr_trace", lambda: b"pickled", raising=False)
    record = FlightRecord(1)
    record.folder = tmp_path / "flight_record"
    lines = record.describe().splitlines()
    assert lines[1:3] == [
        "  1: gloo:all_reduce of 5x2, done",
        "  2: gloo:all_reduce of 5x2, not done (scheduled)",
    ]
    assert (tmp_path / "flight_record" / "rank_1").read_bytes() == b"pickled"


def test_a_torch_without_a_record_says_so(monkeypatch):
    for kind in ("fr", "nccl"):
        monkeypatch.delattr(_distributed_c10d, f"_dump_{kind}_trace_json", raising=False)
    assert "keeps no record" in FlightRecord(0).describe()


def test_details_that_never_come_do_not_keep_a_hanging_process(monkeypatch, capfd):
    monkeypatch.setattr(watchdog, "DETAILS_SECONDS", 0.05)
    watching = Watchdog(1.0)
    never = threading.Event()
    watching.details = lambda: str(never.wait(20.0))
    watching.report()
    never.set()
    assert "no progress for" in capfd.readouterr().err


def test_a_trace_that_cannot_be_written_is_a_failed_write(labels, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(
        profiler.profile,
        "export_chrome_trace",
        lambda *_: (_ for _ in ()).throw(OSError(28, "full")),
    )
    flags = ["--profile.enabled=true", "--profile.steps=2", "--train.on_save_error=continue"]
    with pytest.raises(StorageFailed, match="profile"):
        train(labels, tmp_path / "run", *flags)
    assert list((tmp_path / "run" / "profile").iterdir()) == []


def test_settings_of_the_profiler_may_change_when_a_run_goes_on(profiled):  # noqa: F811
    before = load_config(profiled / "config.yaml")
    now = replace(before, profile=ProfileConfig())
    check_folder(profiled, now, may_continue=True)
