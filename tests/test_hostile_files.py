"""Files that would run code if anything in them were executed: nothing is, and each is named."""

import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import multilabel_codec, multilabel_config

from ispen_dist.checkpoint import (
    CheckpointError,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from ispen_dist.command_line import load_config
from ispen_dist.config import ConfigError
from ispen_dist.data.arff import read_arff, read_label_names
from ispen_dist.data.conll import read_conll, read_conllu
from ispen_dist.data.errors import DataError
from ispen_dist.data.npz import read_npz
from ispen_dist.data.splits import read_split_file
from ispen_dist.data.svmlight import read_svmlight
from ispen_dist.players import build_players
from ispen_dist.predictor import ModelError, Predictor
from ispen_dist.recording.metrics_file import read_metrics


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path):
    """A path at which nothing may ever be; unpickling an `Evil` makes a file there."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Evil(path)))
    assert path.exists(), "the trap works"
    path.unlink()
    yield path
    assert not path.exists(), "code from a file has run"


READERS = {
    "npz": read_npz,
    "arff": lambda path: read_arff(path, None, 1),
    "xml": read_label_names,
    "svmlight": read_svmlight,
    "conll": read_conll,
    "conllu": read_conllu,
    "split file": lambda path: read_split_file(path, 10),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("protocol", [0, 4])
def test_a_pickle_is_no_data_file(reader, protocol, canary, tmp_path):
    path = tmp_path / "data"
    path.write_bytes(pickle.dumps(Evil(canary), protocol))
    with pytest.raises(DataError, match=re.escape(str(path))):
        READERS[reader](path)


@pytest.mark.parametrize("key", ["features", "targets", "label_names"])
def test_a_pickle_inside_an_npz_is_never_loaded(key, canary, tmp_path):
    arrays = {"features": np.ones((2, 3)), "targets": np.ones((2, 2), dtype=np.uint8)}
    evil = np.empty(2, dtype=object)
    evil[:] = [Evil(canary), Evil(canary)]
    np.savez(tmp_path / "data.npz", **arrays | {key: evil})
    with pytest.raises(DataError, match=r"data\.npz: .*pickled objects, which are never loaded"):
        read_npz(tmp_path / "data.npz")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("!!python/object/apply:os.system ['touch CANARY']", "python/object/apply:os.system"),
        ("data: !!python/object/new:os.system ['touch CANARY']", "python/object/new:os.system"),
        ("data: {train: [x]}\nenergy: !!python/name:os.system", "python/name:os.system"),
        (
            "data: {train: [x]}\nenergy: {class_path: subprocess.run, init_args: {args: touch}}",
            "energy.class_path: no such setting",
        ),
    ],
)
def test_settings_name_no_code(text, words, canary, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("CANARY", str(canary)))
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


# -- checkpoints -------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    trees = {"theta": {"w": torch.ones(3)}}
    return save_checkpoint(tmp_path / "checkpoints", 1, trees, {"round": 1}, keep=1)


def rewrite(checkpoint: Path, change: dict) -> None:
    file = checkpoint / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def entry(data: bytes) -> dict:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_a_pickle_with_the_right_sum_is_no_tensor_file(canary, checkpoint):
    data = pickle.dumps(Evil(canary))
    (checkpoint / "theta.safetensors").write_bytes(data)
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    rewrite(checkpoint, {"files": files | {"theta.safetensors": entry(data)}})
    with pytest.raises(CheckpointError, match=r"theta\.safetensors: expected safetensors, got"):
        load_checkpoint(checkpoint)
    with pytest.warns(UserWarning, match=r"damaged checkpoint: .*theta\.safetensors"):
        assert find_checkpoint(checkpoint.parent) is None


@pytest.mark.parametrize("name", ["manifest.json", "state.json"])
def test_a_pickle_is_no_json(name, canary, checkpoint):
    data = pickle.dumps(Evil(canary))
    (checkpoint / name).write_bytes(data)
    if name == "state.json":
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
        rewrite(checkpoint, {"files": files | {name: entry(data)}})
    with pytest.raises(CheckpointError, match=f"{name}: expected JSON, got"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("name", [".metadata", "mp_rank_00_model_states.pt"])
def test_files_of_other_formats_are_refused_in_a_manifest_and_else_not_opened(
    name, canary, checkpoint
):
    file = checkpoint / name
    file.write_bytes(pickle.dumps(Evil(canary)))
    file.chmod(0)
    assert load_checkpoint(checkpoint).step == 1
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    rewrite(checkpoint, {"files": files | {name: entry(b"")}})
    with pytest.raises(CheckpointError, match=rf"manifest\.json: expected files .*{name}"):
        load_checkpoint(checkpoint)


def test_a_checkpoint_of_another_system_is_refused(canary, tmp_path):
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Evil(canary)))
    with pytest.raises(CheckpointError, match=r"manifest\.json: expected a readable file"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/../../outside", ".hidden", "a\0b"]
)
def test_a_name_that_leads_out_of_the_folder_is_refused(name, checkpoint):
    (checkpoint.parent / "outside.safetensors").write_bytes(
        (checkpoint / "theta.safetensors").read_bytes()
    )
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    outside = {f"{name}.safetensors": files.pop("theta.safetensors")}
    rewrite(checkpoint, {"files": files | outside, "trees": {name: ["w"]}})
    with pytest.raises(CheckpointError, match=r"manifest\.json: expected files"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "theta.safetensors"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_file_that_is_none_is_refused(name, kind, checkpoint, tmp_path):
    """A link may lead to what the reader of a checkpoint was not asked for; a pipe never ends."""
    file = checkpoint / name
    shutil.move(file, tmp_path / "elsewhere")
    if kind == "link":
        file.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.mkdir()
    with pytest.raises(CheckpointError, match=rf"{name}: expected a regular file, got a link"):
        load_checkpoint(checkpoint)


def test_a_checkpoint_of_version_1_is_refused_by_name(checkpoint):
    rewrite(checkpoint, {"version": 1})
    with pytest.raises(CheckpointError, match=r"manifest\.json: expected format version 2, got 1;"):
        load_checkpoint(checkpoint)
    with pytest.warns(UserWarning, match=r"manifest\.json: expected format version 2, got 1"):
        assert find_checkpoint(checkpoint.parent) is None


def test_the_mark_of_the_best_is_only_a_mark(canary, checkpoint):
    mark = checkpoint.parent / "best.json"
    mark.write_bytes(pickle.dumps(Evil(canary)))
    trees = {"theta": {"w": torch.ones(3)}}
    with pytest.warns(UserWarning, match=r"best\.json: expected step and dev, got"):
        save_checkpoint(checkpoint.parent, 2, trees, {}, keep=1, best=0.5)
    assert json.loads(mark.read_text()) == {"step": 2, "dev": 0.5}


# -- the other files of a run ------------------------------------------------------------------


def test_a_pickle_in_a_model_folder_is_refused(canary, tmp_path):
    config, codec = multilabel_config(), multilabel_codec()
    players = build_players(config, codec, torch.device("cpu"))
    Predictor(players, codec, {"threshold": 0.5}).save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "energy.safetensors"
    torch.save({"x": Evil(canary)}, weights)
    with pytest.raises(ModelError, match=r"energy\.safetensors: expected the weights"):
        Predictor.from_pretrained(tmp_path)
    (tmp_path / "model" / "config.json").write_bytes(pickle.dumps(Evil(canary)))
    with pytest.raises(ModelError, match=r"config\.json: expected JSON"):
        Predictor.from_pretrained(tmp_path)


def test_a_pickle_among_the_metrics_is_named(canary, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(pickle.dumps(Evil(canary), 0).replace(b"\n", b" ") + b"\n{}\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: expected a metrics row"):
        read_metrics(path)
