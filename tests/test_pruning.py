"""Which checkpoints are kept, and what is cleared away."""

import errno
import os
from pathlib import Path

import pytest
from checkpoints import save, small_trees, steps

from ispen_dist import pruning as pruning_module
from ispen_dist.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep=2)
    assert steps(tmp_path) == ["step_00000030", "step_00000040"]
    save(tmp_path, 50, keep=1)
    assert steps(tmp_path) == ["step_00000050"]


def test_keep_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep: expected 1 or more"):
        save(tmp_path, 1, keep=0)


def test_a_cut_checkpoint_does_not_count_as_kept(tmp_path: Path) -> None:
    save(tmp_path, 10)
    os.truncate(save(tmp_path, 20) / "theta.safetensors", 3)
    save(tmp_path, 30, keep=2)
    assert steps(tmp_path) == ["step_00000010", "step_00000020", "step_00000030"]


def test_later_checkpoints_of_an_earlier_attempt_are_reported_and_left(tmp_path: Path) -> None:
    save(tmp_path, 100)
    save(tmp_path, 200)
    with pytest.warns(UserWarning, match="earlier attempt left step_00000200"):
        save(tmp_path, 110, keep=1)
    assert steps(tmp_path) == ["step_00000110", "step_00000200"]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 7)
    save_checkpoint(tmp_path, 7, small_trees(-1.0), {}, keep=2)
    assert steps(tmp_path) == ["step_00000007"]
    found = find_checkpoint(tmp_path)
    assert found is not None
    assert load_checkpoint(found).trees["theta"]["w"].tolist() == [-1.0] * 3


def test_the_remains_of_killed_saves_are_removed(tmp_path: Path) -> None:
    for name in (".saving_step_00000010", ".deleting_step_00000005"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "theta.safetensors").write_text("half")
    save(tmp_path, 20)
    assert steps(tmp_path) == ["step_00000020"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "no", str(path))

    monkeypatch.setattr(pruning_module, "delete_folder", refuse)
    with pytest.warns(UserWarning, match="old checkpoint not deleted"):
        path = save(tmp_path, 2, keep=1)
    assert find_checkpoint(tmp_path) == path
