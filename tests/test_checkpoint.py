"""Checkpoints: bit for bit, and intact or not there at all."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import flip, same, save, steps
from torch import nn

from ispen_dist.checkpoint import CheckpointError, find_checkpoint, load_checkpoint, save_checkpoint

STATE = {"round": 3, "damping": 0.1 + 0.2, "best": {"f1": 1e-320}, "list": [None, True, "x"]}


def test_round_trip_is_exact_in_every_type_and_shape(tmp_path: Path) -> None:
    special = [0.0, -0.0, float("nan"), float("inf"), 1e-42, 1 / 3]
    tree = {
        "z_float32": torch.tensor(special),
        "float64": torch.tensor([*special, 5e-324], dtype=torch.float64),
        "bfloat16": torch.randn(3, 5).bfloat16(),
        "float16": torch.randn(7).half(),
        "int64": torch.tensor([[-(2**63), 2**63 - 1]]),
        "bool": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4, dtype=torch.float64),
        "zero_dim": torch.tensor(2.5),
        "zero_dim_bool": torch.tensor(True),
        "parameter": nn.Parameter(torch.randn(2, 3)),
    }
    path = save_checkpoint(tmp_path, 120, {"all": tree, "nothing": {}}, STATE, keep=1)
    loaded = load_checkpoint(path)
    assert path.name == "step_00000120"
    assert loaded.step == 120
    assert loaded.state == STATE
    assert loaded.trees["nothing"] == {}
    assert list(loaded.trees["all"]) == list(tree), "arithmetic on trees relies on the order"
    assert all(same(tree[key], loaded.trees["all"][key]) for key in tree)


def test_tied_and_strided_tensors_keep_their_values(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tree = {
        "a": base,
        "tied": base,
        "transposed": base.t(),
        "column": base[:, 2],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    loaded = load_checkpoint(save_checkpoint(tmp_path, 1, {"t": tree}, {}, keep=1)).trees["t"]
    assert all(same(tree[key], loaded[key]) for key in tree)
    loaded["a"].zero_()
    assert same(loaded["tied"], base)


def test_loaded_tensors_do_not_depend_on_the_files(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    loaded = load_checkpoint(path)
    for file in path.iterdir():
        file.write_bytes(bytes(file.stat().st_size))
    shutil.rmtree(path)
    assert loaded.trees["theta"]["w"].tolist() == [5.0] * 3


def test_the_same_contents_give_the_same_files(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a", 4), save(tmp_path / "b", 4)
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": [1.0, float("nan")]}, "state.a[1]: expected a finite number, got nan"),
        ({"a": float("inf")}, "state.a: expected a finite number, got inf"),
        ({"a": {3: 1}}, "state.a: expected string keys, got 3"),
        ({"a": torch.ones(1)}, "state.a: expected a JSON value, got Tensor"),
    ],
)
def test_state_that_json_would_change_is_refused(tmp_path: Path, state: dict, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        save_checkpoint(tmp_path, 1, {}, state, keep=1)
    assert steps(tmp_path) == []


@pytest.mark.parametrize("name", ["../theta", "", ".hidden", "a/b"])
def test_a_tree_name_that_is_no_file_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="rename it"):
        save_checkpoint(tmp_path / "c", 1, {name: {}}, {}, keep=1)
    assert steps(tmp_path) == []


@pytest.mark.parametrize("name", ["theta.safetensors", "none.safetensors", "state.json"])
def test_every_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    file = save(tmp_path, 1) / name
    good = file.read_bytes()
    for i in range(len(good)):
        file.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
        with pytest.raises(CheckpointError, match="SHA-256") as caught:
            load_checkpoint(file.parent)
        assert str(file) in str(caught.value)


def test_a_flipped_byte_in_the_manifest_never_changes_what_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    good, num_found = (path / "manifest.json").read_bytes(), 0
    for i in range(len(good)):
        (path / "manifest.json").write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
        try:
            loaded = load_checkpoint(path)
        except CheckpointError:
            num_found += 1
        else:
            assert loaded.step == 1
            assert loaded.state == {"round": 1}
            assert same(loaded.trees["theta"]["w"], torch.ones(3))
    assert num_found > 0.7 * len(good), "only flips between kinds of white space may pass"


def test_a_cut_file_and_a_missing_file_are_named(tmp_path: Path) -> None:
    file = save(tmp_path, 1) / "theta.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(CheckpointError, match=f"theta.safetensors: expected {size} bytes, got"):
        load_checkpoint(file.parent)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"theta.safetensors: expected a readable file"):
        load_checkpoint(file.parent)


def test_a_missing_manifest_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest.json: expected a readable file, got No"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 7}, "expected format version 2, got 7; load it with the release"),
        ({"version": None}, "expected format version 2, got None"),
        ({"format": "other"}, "expected format 'ispen-dist checkpoint', got 'other'"),
        ({"step": 2}, "expected step 1 as in the folder's name, got step 2"),
        ({"step": "1"}, "expected a step, files and trees"),
        ({"files": []}, "expected a step, files and trees"),
        ({"files": {}}, "expected files ['none.safetensors', 'state.json', 'theta."),
        ({"trees": {"../x": []}}, "expected files"),
        ({"trees": {"theta": ["w", "v"], "none": []}}, "expected tensors ['v', 'w'], got ['w']"),
        ({"trees": {"theta": 3, "none": []}}, "expected a list of keys of theta, got 3"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path: Path, change: dict, words: str) -> None:
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(CheckpointError, match=re.escape(words)):
        load_checkpoint(path)


def test_the_newest_intact_one_is_found_and_the_damaged_named(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (80, 100, 120, 140)]
    (paths[3] / "manifest.json").unlink()
    flip(paths[2] / "theta.safetensors")
    with pytest.warns(UserWarning, match="skipping a damaged checkpoint") as caught:
        assert find_checkpoint(tmp_path) == paths[1]
    assert "step_00000140/manifest.json" in str(caught[0].message)
    assert "step_00000120/theta.safetensors" in str(caught[1].message)


def test_the_step_number_decides_and_not_links_or_times(tmp_path: Path) -> None:
    older, newest = save(tmp_path, 99_999_999), save(tmp_path, 100_000_000)
    os.utime(newest, (0, 0))
    (tmp_path / "latest").symlink_to(older, target_is_directory=True)
    (tmp_path / "step_00000000200000000").symlink_to(older, target_is_directory=True)
    (tmp_path / "step_banana").mkdir()
    (tmp_path / "step_00000300").write_text("a file")
    assert find_checkpoint(tmp_path) == newest


def test_links_are_neither_resumed_from_nor_deleted(tmp_path: Path) -> None:
    elsewhere = save(tmp_path / "other", 5)
    for step in (5, 40):
        linked = save(tmp_path / "other", step)
        (tmp_path / "own" / linked.name).parent.mkdir(exist_ok=True)
        (tmp_path / "own" / linked.name).symlink_to(linked, target_is_directory=True)
    newest = save(tmp_path / "own", 20, keep=1)
    assert find_checkpoint(tmp_path / "own") == newest
    assert (tmp_path / "own" / elsewhere.name).is_symlink()
    assert load_checkpoint(elsewhere).step == 5


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "missing") is None
    assert find_checkpoint(tmp_path) is None


def test_a_flipped_key_in_the_newest_manifest_does_not_keep_a_run_from_resuming(
    tmp_path: Path,
) -> None:
    """The files agree with their sums, but a tensor would have another name."""
    older, newest = save(tmp_path, 1), save(tmp_path, 2)
    file = newest / "manifest.json"
    file.write_text(file.read_text().replace('"w"', '"v"'))
    with pytest.warns(UserWarning, match=r"theta.safetensors: expected tensors \['v'\]"):
        assert find_checkpoint(tmp_path) == older
