"""The final fit, on train and dev together, once everything has been chosen on dev."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from labels import labels  # noqa: F401
from programs import called, train
from safetensors.torch import load_file
from tags import config  # noqa: F401

from ispen_dist.command_line import load_config
from ispen_dist.config.inference import UNTUNED
from ispen_dist.data.datasets import Subset
from ispen_dist.data.loading import load_splits

SPLIT = {"train": list(range(5, 25)), "dev": list(range(5)), "test": list(range(25, 40))}


@pytest.fixture(scope="module")
def with_test(labels):  # noqa: F811
    """Label sets with a split file, which names a test set."""
    (labels.parent / "split.json").write_text(json.dumps(SPLIT))
    settings = yaml.safe_load(labels.read_text())
    settings["data"]["split_file"] = "split.json"
    path = labels.with_name("with_test.yaml")
    path.write_text(yaml.safe_dump(settings))
    return path


FLAGS = (
    "--data.train_on_dev=true", "--inference.threshold=0.3", "--inference.temperature=0.8",
    "--inference.empty_weight=0.0", "--train.average_decay=0.7", "--train.eval_every=1",
    "--train.checkpoint_every=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def fitted(with_test, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "fitted"
    train(with_test, folder, *FLAGS)
    return folder


def test_train_has_the_examples_of_dev_from_any_kind_of_split(labels, with_test, config):  # noqa: F811
    def splits_of(path):
        read = load_config(path)
        labels = read.data.task == "multilabel"
        inference = replace(read.inference, **(UNTUNED if labels else {}))
        data = replace(read.data, train_on_dev=True)
        return load_splits(replace(read, data=data, inference=inference))

    by_rows = splits_of(with_test)
    assert isinstance(by_rows.train, Subset)
    assert isinstance(by_rows.test, Subset)
    assert sorted(by_rows.train.rows) == list(range(25))
    assert by_rows.test.rows.tolist() == SPLIT["test"]
    by_fraction = splits_of(labels)
    assert (len(by_fraction.train), len(by_fraction.dev)) == (40, 8)
    by_file = splits_of(config)
    assert (len(by_file.train), len(by_file.dev), len(by_file.test or ())) == (28, 6, 6)
    own = by_file.dev.collate(np.arange(6)).inputs["features"]
    joined = by_file.train.collate(np.arange(22, 28)).inputs["features"]
    assert torch.equal(joined, own)


def test_the_average_after_the_last_round_is_kept_and_dev_says_nothing(fitted):
    summary = json.loads((fitted / "summary.json").read_text())
    assert summary["train_examples"] == 25
    assert summary["dev"] == {}
    chosen = {"threshold": 0.3, "temperature": 0.8, "empty_weight": 0.0}
    assert chosen.items() <= summary["test"].items()
    rows = [json.loads(line) for line in (fitted / "metrics.jsonl").read_text().splitlines()]
    assert "dev" not in {row["phase"] for row in rows}
    for name in ("inference_net", "energy"):
        last = load_file(fitted / "checkpoints" / "step_00000006" / f"average_{name}.safetensors")
        model = load_file(fitted / "model" / f"{name}.safetensors")
        assert all(torch.equal(v, last[k]) for k, v in model.items())
    printed, _ = called("evaluate.py", fitted)
    assert summary["test"].items() <= json.loads(printed).items()


def test_a_resumed_final_fit_is_the_uninterrupted_one(fitted, with_test, tmp_path):
    checkpoint = fitted / "checkpoints" / "step_00000004"
    train(with_test, tmp_path / "resumed", *FLAGS, f"--resume={checkpoint}")
    for name in ("inference_net", "energy"):
        whole, resumed = (
            load_file(folder / "model" / f"{name}.safetensors")
            for folder in (fitted, tmp_path / "resumed")
        )
        assert all(torch.equal(v, whole[k]) for k, v in resumed.items())


def test_a_threshold_of_the_settings_is_not_tuned(with_test, tmp_path):
    train(with_test, tmp_path / "run", "--inference.threshold=0.75")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["dev"]["threshold"] == summary["test"]["threshold"] == 0.75


def test_without_a_dev_set_what_is_tuned_on_it_has_to_be_named(with_test, tmp_path):
    flags = ["--data.train_on_dev=true"]
    for name, tuned in (("threshold", 0.0), ("temperature", 0.0), ("empty_weight", -1.0)):
        printed = train(with_test, tmp_path / "run", *flags, expect=2)
        assert f"inference.{name}: expected a {name} with data.train_on_dev, got {tuned}" in printed
        flags.append(f"--inference.{name}={UNTUNED[name]}")
    printed = train(with_test, tmp_path / "run", "--inference.threshold=0.31", expect=2)
    assert "inference.threshold: expected 0, or one of 0.05, 0.1, " in printed
    printed = train(with_test, tmp_path / "run", "--inference.temperature=-1", expect=2)
    assert "inference.temperature: expected 0, or one of 0.3, 0.4, " in printed
    printed = train(with_test, tmp_path / "run", "--inference.empty_weight=0.5", expect=2)
    assert "inference.empty_weight: expected -1, or one of 1.0, 0.3, 0.1, 0.0" in printed
