"""A disk that fills up, turns read-only or vanishes under a run, on a real small file system."""

import json
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forks import Job
from launched import TRAIN
from records import rows_of
from tags import config  # noqa: F401

from ispen_dist.checkpoint import find_checkpoint, load_checkpoint
from ispen_dist.recording.metrics_file import MetricsFile, read_metrics
from ispen_dist.recording.run_lock import RunLock
from ispen_dist.trainer import Trainer

Events = dict[int, Callable[[], object]]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB, where mounting is allowed; test_saver.py has failing writes anyway."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("expected the right to mount a file system; run as root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def train(config, monkeypatch):  # noqa: F811
    """A function that trains in this process, with something happening before given rounds."""
    original = Trainer.run

    def trained(output: Path, *flags: str, events: Events | None = None) -> int:
        def run(self: Trainer) -> dict[str, Any]:
            take = self.rounds.take

            def take_after_event(number: int) -> dict[str, float]:
                if events and number in events:
                    self.saver.wait()
                    events[number]()
                return take(number)

            monkeypatch.setattr(self.rounds, "take", take_after_event)
            return original(self)

        monkeypatch.setattr(Trainer, "run", run)
        arguments = ["--config", str(config), "--output", str(output), "--train.checkpoint_every=1"]
        monkeypatch.setattr(sys, "argv", [str(TRAIN), *arguments, *flags])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TRAIN), run_name="__main__")
        return int(end.value.code or 0)

    return trained


@pytest.fixture(autouse=True)
def no_lock(monkeypatch):
    """Its open file would keep the disk from turning read-only; and one process runs many here."""
    monkeypatch.setattr(RunLock, "take", lambda self: None)


def fill(disk: Path) -> None:
    """Take all space but for less than a row."""
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (65536, 512, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def free(disk: Path) -> None:
    (disk / "filler").unlink()


def remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)


@pytest.fixture
def whole(train, tmp_path):
    assert train(tmp_path / "whole") == 0
    return tmp_path / "whole"


def same_model(first: Path, second: Path) -> bool:
    """Compare parameters; `config.json` holds the settings, of which one differs."""
    files = sorted(path.name for path in (first / "model").glob("*.safetensors"))
    assert len(files) == 2
    return all(
        (first / "model" / f).read_bytes() == (second / "model" / f).read_bytes() for f in files
    )


@pytest.mark.parametrize("way", ["full", "read-only"])
def test_a_run_stops_and_goes_on_when_the_disk_is_mended(way, train, whole, disk, capsys):
    output = disk / "run"
    broken, mended = {
        "full": (lambda: fill(disk), lambda: free(disk)),
        "read-only": (lambda: remount(disk, "ro"), lambda: remount(disk, "rw")),
    }[way]
    assert train(output, events={3: broken}) == 5
    printed = capsys.readouterr()
    assert "error: expected everything to be written, got" in printed.err
    assert "--resume auto" in printed.err
    found = find_checkpoint(output / "checkpoints")
    assert found is not None
    assert load_checkpoint(found).step == 3
    mended()
    assert train(output) == 0
    assert rows_of(output) == rows_of(whole)
    assert same_model(output, whole)


def test_going_on_loses_no_row_when_space_comes_back(train, whole, disk, capsys):
    output = disk / "run"
    events = {2: lambda: fill(disk), 4: lambda: free(disk)}
    assert train(output, "--train.on_save_error=continue", events=events) == 0
    printed = capsys.readouterr().out
    assert printed.count("warning: checkpoint: expected to be written, got [Errno 28]") == 1
    assert "checkpoint: written again" in printed
    assert rows_of(output) == rows_of(whole)
    assert same_model(output, whole)
    summary = json.loads((output / "summary.json").read_text())["checkpoints"]
    assert summary["failed_writes"] >= 2
    assert summary["saved"] == 4
    found = find_checkpoint(output / "checkpoints")
    assert found is not None
    assert load_checkpoint(found).step == 6


def test_rows_wait_until_there_is_space_and_no_half_row_stays(disk):
    file = MetricsFile(disk / "m.jsonl")
    fill(disk)
    step, num_failed = 0, 0
    while num_failed < 3:
        step += 1
        try:
            file.write(step, "train", {"loss": step / 3})
        except OSError:
            num_failed += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # half a row may be there while the disk is full
        assert [row["step"] for row in read_metrics(disk / "m.jsonl")] == list(range(1, step - 2))
    free(disk)
    file.write(step + 1, "train", {"loss": 0.0})
    file.close()
    assert [row["step"] for row in read_metrics(disk / "m.jsonl")] == list(range(1, step + 2))


def test_going_on_to_the_end_with_a_full_disk_is_no_success(train, disk, capsys):
    output = disk / "run"
    flag = "--train.on_save_error=continue"
    assert train(output, flag, events={3: lambda: fill(disk)}) == 5
    assert "error: expected everything to be written, got" in capsys.readouterr().err
    found = find_checkpoint(output / "checkpoints")
    assert found is not None
    assert load_checkpoint(found).step == 3


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_folder_that_vanishes_is_not_made_again(on_error, train, tmp_path, capsys):
    output = tmp_path / "run"
    events = {3: lambda: shutil.rmtree(output), 5: lambda: tmp_path / "run"}
    flag = f"--train.on_save_error={on_error}"
    assert train(output, flag, events=events) == 5
    assert "No such file or directory" in capsys.readouterr().out
    assert not (output / "checkpoints").exists()


@pytest.mark.thorough
def test_all_ranks_stop_together(config, disk, tmp_path):  # noqa: F811
    """The disk is full after a few checkpoints; rank 1 does not write and must not hang."""
    flags = ["checkpoint_every=1", "keep_checkpoints=99", "max_outer_steps=400"]
    output = ["--config", config, "--output", disk / "run"]
    job = Job(tmp_path / "job", *output, *(f"--train.{flag}" for flag in flags))
    assert job.codes(timeout=240.0) == [5, 5], job.text()
    printed = job.logs[0].read_text()
    assert "warning: checkpoint: expected to be written" in printed or (
        "warning: tensorboard: expected to be written" in printed
    )
    assert find_checkpoint(disk / "run" / "checkpoints") is not None
