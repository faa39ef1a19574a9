"""The main job end to end on tiny data: files it leaves, resume, ranks, errors."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from labels import labels  # noqa: F401
from launched import LAUNCH, TRAIN
from programs import LAUNCHER, called, run, train
from records import rows_of
from safetensors.torch import load_file
from tags import WORDS, config  # noqa: F401

from ispen_dist.checkpoint import load_checkpoint, save_checkpoint
from ispen_dist.config.inference import CHOICES
from ispen_dist.decisions import decide
from ispen_dist.predictor import ModelError, Predictor
from ispen_dist.recording.console import compact


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):  # noqa: F811
    output = tmp_path_factory.mktemp("runs") / "whole"
    return output, run(sys.executable, TRAIN, "--config", config, "--output", output)


def test_a_run_leaves_what_the_readme_promises(finished):
    folder, done = finished
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "tensorboard", "checkpoints"):
        assert (folder / name).exists(), name
    for name in ("inference_net.safetensors", "energy.safetensors", "config.json"):
        assert (folder / "model" / name).exists(), name
    summary = json.loads((folder / "summary.json").read_text())
    assert {"task", "world_size", "seconds", "dev", "test", "hypergradient"} <= summary.keys()
    assert summary["hypergradient"]["statuses"]
    assert "accuracy" in done.stdout
    assert "results" in done.stdout
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    outer = [row for row in rows if row["phase"] == "train" and "outer_loss" in row]
    assert [row["step"] for row in outer] == [3, 4, 5, 6]
    wanted = {
        "inner_loss",
        "energy",
        "stationarity",
        "solver_steps",
        "residual",
        "examples_per_second",
    }
    assert wanted <= outer[0].keys()
    assert any(row["implicit_norm"] > 0 for row in outer)
    # The line of a round has the evaluation after it, not the one before.
    shown = re.findall(r"^step (\d+)/6 .* dev accuracy (\S+)", done.stdout, re.MULTILINE)
    dev = {row["step"]: row["accuracy"] for row in rows if row["phase"] == "dev"}
    assert shown[-1] == ("6", compact(dev[6]))


def test_the_model_loads_and_repeats_its_figures(finished):
    folder, _ = finished
    summary = json.loads((folder / "summary.json").read_text())
    done = run(sys.executable, LAUNCHER / "evaluate.py", folder, "--split", "test")
    assert json.loads(done.stdout)["accuracy"] == summary["test"]["accuracy"]
    for split, expected in (("dev", "dev"), ("again", "test")):
        printed, _ = called("evaluate.py", folder, "--split", split)
        assert json.loads(printed)["accuracy"] == summary[expected]["accuracy"]
    _, error = called("evaluate.py", folder, "--split", "no", expect=2)
    assert "expected one of train, dev, test, again, got 'no'" in error


def test_prediction_accepts_an_unlabelled_file_and_repeats_it_with_tags(finished, tmp_path):
    folder, _ = finished
    source, target = tmp_path / "new.conll", tmp_path / "tagged.conll"
    source.write_text("the\ndog\nruns\n\nxyzzy\n")
    called("predict.py", folder, "--input", source, "--output", target, "--probabilities")
    lines = target.read_text().rstrip("\n").split("\n")
    assert [line.split("\t")[0] for line in lines] == ["the", "dog", "runs", "", "xyzzy"]
    for line in filter(None, lines):
        _, tag, probability = line.split("\t")
        assert tag in WORDS
        assert 1 / 3 <= float(probability) <= 1.0
    done = run(sys.executable, LAUNCHER / "predict.py", folder, "--input", source)
    printed = done.stdout.splitlines()
    assert printed[: len(lines)] == ["\t".join(line.split("\t")[:2]) for line in lines]


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(config, finished, tmp_path):  # noqa: F811
    """Also from a checkpoint of an earlier version, which did not count steps left out."""
    whole, _ = finished
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    for late in ("step_00000004", "step_00000006"):
        shutil.rmtree(resumed / "checkpoints" / late)
    for name in ("summary.json", "model"):
        path = resumed / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    saved = load_checkpoint(resumed / "checkpoints" / "step_00000002")
    before = {key: value for key, value in saved.state.items() if key != "not_finite"}
    save_checkpoint(resumed / "checkpoints", 2, saved.trees, before, keep=9)
    assert "at round 2" in train(config, resumed, "--resume", "auto")
    last = [f / "checkpoints" / "step_00000006" for f in (whole, resumed)]
    files = sorted(p.name for p in last[0].glob("*.safetensors"))
    assert len(files) > 5
    for name in files:
        first, second = (load_file(folder / name) for folder in last)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[k], second[k]) for k in first), name
    states = [json.loads((folder / "state.json").read_text()) for folder in last]
    for state in states:
        state.pop("seconds")
        assert state.pop("not_finite")["skipped"] == {}
    assert states[0] == states[1]
    assert rows_of(whole) == rows_of(resumed)
    weights = [load_file(f / "model" / "inference_net.safetensors") for f in (whole, resumed)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


@pytest.mark.thorough
def test_two_ranks_follow_the_trajectory_of_one(config, tmp_path):  # noqa: F811
    exact = [
        "--train.dtype=float64", "--inference_net.dropout=0", "--energy.features.dropout=0",
        "--outer.objective=ssvm",
    ]  # fmt: skip
    train(config, tmp_path / "one", *exact)
    output = ["--config", config, "--output", tmp_path / "two"]
    run(*LAUNCH, "--num_processes", "2", TRAIN, *output, *exact)
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for first, second in zip(one, two, strict=True):
        for key in first.keys() - {"phase"}:
            assert second[key] == pytest.approx(first[key], rel=1e-9, abs=1e-12), key
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["world_size"] == 2


def test_print_config_says_what_it_will_cost_and_leaves_nothing(config, tmp_path):  # noqa: F811
    printed = train(config, tmp_path / "none", "--print-config")
    assert yaml.safe_load(printed)["inner"]["steps"] == 2
    for word in ("parameters", "steps", "memory per rank", "checkpoint"):
        assert word in printed
    assert not (tmp_path / "none").exists()


def test_settings_that_are_not_read_to_the_end_are_no_error(config):  # noqa: F811
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, TRAIN, "--config", config, "--print-config"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--inner.stepz=3"], "inner.steps"),
        (["--inner.steps=many"], "inner.steps"),
        (["--outer.task_weight=0"], "outer.task_weight: expected a number above 0"),
        (["--data.dev=absent.conll"], "absent.conll"),
    ],
)
def test_bad_settings_end_with_code_2_and_one_line(config, tmp_path, flags, message):  # noqa: F811
    printed = train(config, tmp_path / "bad", *flags, expect=2)
    assert message in printed
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1
    assert not (tmp_path / "bad").exists()


def test_a_bad_line_is_named_with_file_and_line(config, tmp_path):  # noqa: F811
    bad = tmp_path / "bad.conll"
    bad.write_text("the\tD\ndog\tN\textra\n")
    printed = train(config, tmp_path / "run", f"--data.dev={bad}", expect=2)
    assert f"{bad}:2: expected" in printed


def test_a_used_folder_is_not_overwritten(config, finished):  # noqa: F811
    folder, _ = finished
    before = rows_of(folder)
    printed = train(config, folder, "--resume", "none", expect=2)
    assert "expected a new or empty folder" in printed
    printed = train(config, folder, "--inner.steps=3", expect=2)
    assert "inner.steps: expected 2, got 3" in printed
    assert rows_of(folder) == before


def test_data_that_has_changed_since_is_no_data_of_the_run(config, tmp_path):  # noqa: F811
    data = tmp_path / "data"
    shutil.copytree(config.parent, data)
    flags = [f"--data.root={data}", "--train.max_outer_steps=1"]
    run_folder = tmp_path / "run"
    train(config, run_folder, *flags)
    names = ("again", "test", "dev", "train")
    before = {n: called("evaluate.py", run_folder, "--split", n)[0] for n in names}
    with (data / "train.conll").open("a") as file:
        file.write("\nowl\tA\n")  # A tag before all others: each of them has another number now.
    for name in names[:-1]:
        assert called("evaluate.py", run_folder, "--split", name)[0] == before[name]
    _, errors = called("evaluate.py", run_folder, "--split", "train", expect=2)
    assert "train.conll: expected the labels and features of the model, got others" in errors
    shutil.rmtree(run_folder / "checkpoints" / "step_00000003")
    printed = train(config, run_folder, *flags, expect=2)
    assert "step_00000002: expected the labels, features and numbers of examples" in printed
    assert printed.count("\n") == 1


def test_a_checkpoint_of_another_network_is_refused(config, finished, tmp_path):  # noqa: F811
    newest = sorted((finished[0] / "checkpoints").glob("step_*"))[-1]
    flags = ["--resume", newest, "--inference_net.hidden_size=6"]
    printed = train(config, tmp_path / "run", *map(str, flags), expect=2)
    assert "expected shape" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "{folder}"], "--output: expected a file that can be written, got {folder}"),
        (["--output", "{file}/tags"], "--output: expected a file that can be written, got {file}/"),
        (["--threshold", "0.4"], "--threshold: expected none, as tags are not decided by one"),
        (["--device", "foo"], "device: expected cpu, or a GPU that this machine has, got 'foo'"),
        (["--device", "cuda:99"], "device: expected cpu, or a GPU that this machine has, got 'cud"),
    ],
)
def test_a_prediction_that_cannot_be_is_refused_in_one_line(finished, tmp_path, flags, message):
    file = tmp_path / "words.conll"
    file.write_text("the\ndog\n")
    names = {"folder": tmp_path, "file": file}
    arguments = [flag.format(**names) for flag in flags]
    printed, errors = called("predict.py", finished[0], "--input", file, *arguments, expect=2)
    assert (printed, errors.count("\n")) == ("", 1)
    assert message.format(**names) in errors
    assert file.read_text() == "the\ndog\n"


def test_a_damaged_model_is_refused_by_name(finished, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(finished[0] / "model", folder)
    weights = folder / "energy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(ModelError, match=r"energy\.safetensors: expected the weights"):
        Predictor.from_pretrained(folder)
    with pytest.raises(ModelError, match=r"config\.json: expected the description"):
        Predictor.from_pretrained(tmp_path / "nothing")


def test_label_sets_train_and_predict_in_their_own_format(labels, tmp_path):  # noqa: F811
    features = np.load(labels.parent / "all.npz")["features"][:4]
    np.savez(tmp_path / "new.npz", features=features)
    train(labels, tmp_path / "run", "--solver.curvature=gauss_newton")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    figures = {"example_f1_at_0.5", "example_f1_tuned", "example_f1_decoded"}
    assert figures | CHOICES.keys() == summary["dev"].keys()
    assert summary["test"] == {}
    called(
        "predict.py", tmp_path / "run", "--probabilities",
        "--input", tmp_path / "new.npz", "--output", tmp_path / "out.npz",
    )  # fmt: skip
    written = np.load(tmp_path / "out.npz", allow_pickle=False)
    expected = written["probabilities"] > summary["dev"]["threshold"]
    assert np.array_equal(written["targets"].astype(bool), expected)
    assert np.array_equal(written["features"], features)


def test_label_sets_of_largest_expected_f1_select_and_are_written(labels, tmp_path):  # noqa: F811
    train(
        labels, tmp_path / "run", "--inference.decoder=expected_f1", "--train.eval_every=1",
        "--train.warmup_rounds=0",
    )  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    figures = [row["example_f1_decoded"] for row in rows if row["phase"] == "dev"]
    assert summary["dev"]["example_f1_decoded"] == max(figures)
    source = tmp_path / "new.npz"
    np.savez(source, features=np.load(labels.parent / "all.npz")["features"][:9])

    def predicted(*flags):
        called(
            "predict.py", tmp_path / "run", "--probabilities", "--input", source,
            "--output", tmp_path / "out.npz", *flags,
        )  # fmt: skip
        return np.load(tmp_path / "out.npz", allow_pickle=False)

    written = predicted()
    probability = torch.from_numpy(written["probabilities"])
    expected = decide(probability, "expected_f1", summary["dev"])
    assert np.array_equal(written["targets"].astype(bool), expected.numpy())
    written = predicted("--threshold", "0.4")
    assert np.array_equal(written["targets"].astype(bool), written["probabilities"] > 0.4)
