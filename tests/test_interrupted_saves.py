"""Saves that a full disk, a broken one or a kill ends: an intact checkpoint is left."""

import contextlib
import errno
import os
import shutil
import warnings
from pathlib import Path

import pytest
from checkpoints import flip, save, small_trees, steps

from ispen_dist import checkpoint as checkpoint_module
from ispen_dist import manifest as manifest_module
from ispen_dist.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint


@pytest.mark.parametrize("num_files_that_fit", [0, 1, 2, 3])
@pytest.mark.parametrize("step", [10, 20])
def test_a_full_disk_leaves_the_old_checkpoints_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_files_that_fit: int, step: int
) -> None:
    save(tmp_path, 10)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()}
    synced = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > num_files_that_fit:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(manifest_module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save(tmp_path, step, keep=1)
    assert "older checkpoints are as they were" in caught.value.__notes__[0]
    assert steps(tmp_path) == ["step_00000010"]
    assert all(file.read_bytes() == data for file, data in before.items())


@pytest.mark.parametrize("step", [10, 20])
def test_a_rename_that_fails_leaves_the_old_checkpoints_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    old = save(tmp_path, 10)
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if source.name.startswith(".saving"):
            raise OSError(errno.EIO, "broken disk")
        rename(source, target)

    monkeypatch.setattr(checkpoint_module.os, "rename", refuse)
    with pytest.raises(OSError, match="broken disk"):
        save(tmp_path, step, keep=1)
    assert steps(tmp_path) == ["step_00000010"]
    assert find_checkpoint(tmp_path) == old


class Killed(BaseException):
    """Stands for the end of the process: nothing after it has any effect."""


class Mortal:
    """Lets `num_calls` operations on the disk through and then none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_calls: int) -> None:
        self.left = num_calls
        for name in ("rename", "fsync", "open"):
            monkeypatch.setattr(os, name, self.limited(getattr(os, name)))
        monkeypatch.setattr(shutil, "rmtree", self.remove)

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed

    def limited(self, call):
        def limited_call(*args):
            self.spend()
            return call(*args)

        return limited_call

    def remove(self, path: Path, ignore_errors: bool = False) -> None:
        self.spend()
        for file in sorted(path.iterdir()):
            file.unlink()
            self.spend()
        path.rmdir()


@pytest.mark.parametrize("step", [20, 30], ids=["same step", "new step"])
def test_a_kill_at_any_moment_leaves_an_intact_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    save(tmp_path / "before", 10)
    save(tmp_path / "before", 20)
    finished, num_calls, outcomes = False, 0, set()
    while not finished:
        folder = tmp_path / str(num_calls)
        shutil.copytree(tmp_path / "before", folder)
        with monkeypatch.context() as patch:
            Mortal(patch, num_calls)
            try:
                save_checkpoint(folder, step, small_trees(-1.0), {}, keep=1)
                finished = True
            except Killed:
                pass
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = find_checkpoint(folder)
        assert found is not None
        for path in folder.glob("step_*"):
            load_checkpoint(path)
        value = load_checkpoint(found).trees["theta"]["w"][0].item()
        assert value in (20.0, -1.0)
        outcomes.add(value)

        save(folder, 40, keep=1)
        assert steps(folder) == ["step_00000040"], "the next save clears the remains"
        num_calls += 1
    assert outcomes == {20.0, -1.0}
    assert num_calls > 10


def test_a_kill_does_not_cost_the_last_intact_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "before", 10)
    flip(save(tmp_path / "before", 20) / "theta.safetensors")
    found, num_calls = None, 0
    while found != "step_00000030":
        folder = tmp_path / str(num_calls)
        shutil.copytree(tmp_path / "before", folder)
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            Mortal(patch, num_calls)
            save(folder, 30, keep=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = find_checkpoint(folder)
        assert path is not None
        found = path.name
        assert found in ("step_00000010", "step_00000030")
        num_calls += 1
    assert num_calls > 5
