"""Recording of traces: nothing is called when it is off, whole rounds when it is on."""

import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from labels import labels  # noqa: F401
from phases import break_down
from trace_events import find_traces, read_trace

from ispen_dist import ranges
from ispen_dist.command_line import parse_train
from ispen_dist.config import ConfigError, ProfileConfig
from ispen_dist.data.loading import load_splits
from ispen_dist.distributed import Session
from ispen_dist.recording import profiler
from ispen_dist.recording.console import Console
from ispen_dist.recording.metrics_file import read_metrics
from ispen_dist.recording.profiler import RoundProfiler, first_profiled
from ispen_dist.recording.run_folder import RunFolder
from ispen_dist.trainer import Trainer
from ispen_dist.watchdog import Watchdog
from ispen_dist.write_failures import StorageFailed


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
