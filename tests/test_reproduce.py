"""launcher/reproduce.py with the real launcher/train.py on a tiny task."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from programs import called
from scipy import stats
from small_table import TABLE

from ispen_dist.tables.definition import read_table

ROOT = Path(__file__).parent.parent
TASK = {"data": {"task": "tagging", "format": "npz", "train": ["no.npz"], "test": "no.npz"}}


@pytest.fixture
def flags(tmp_path):
    """A table whose data are not there, so that whatever ends well has run nothing."""
    for method in TABLE["methods"]:
        (tmp_path / f"{method}.yaml").write_text("train: {method: mle}\n")
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK))
    (tmp_path / "tables").mkdir()
    table = TABLE | {"config": "../task.yaml"}
    (tmp_path / "tables" / "tiny.yaml").write_text(yaml.safe_dump(table))
    (tmp_path / "file").write_text("")
    folders = {"tables": "tables", "method-files": "", "runs": "runs", "output": "out"}
    return [part for flag, name in folders.items() for part in (f"--{flag}", tmp_path / name)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--list", "--tables", "no"], "--tables no: expected a folder of tables, found no NAME"),
        (["--table", "tiny", "--tables", "no"], "--tables no: expected a folder of tables, found"),
        (["--table", "tinny"], "--table: expected one of tiny, got 'tinny'"),
        (["--table", "tiny", "--output", "file"], "--output file: expected a folder that can be"),
        (["--table", "tiny", "--output", "file/out"], "--output file/out: expected a folder that"),
        (["--table", "tiny", "--runs", "file"], "file/tiny: expected a folder that can be writte"),
    ],
)
def test_folders_that_cannot_be_used_are_named_before_any_run(
    flags, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    printed, error = called("reproduce.py", *flags, *arguments, expect=2)
    assert error.startswith("error: --")
    assert message in error
    assert error.count("\n") == 1
    assert not printed
    assert not (tmp_path / "runs").exists()
    assert "--runs" not in arguments or error.startswith("error: --runs ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"test": ""}}, "expected a test set for the final runs, found none; set data.te"),
        ({"train": {"read_test": False}}, "train.read_test: expected true, found false; leave it"),
        ({"data": {"test": "", "split_file": "no.json"}}, "no.json: expected a file, got nothing"),
        ({"data": {"test": "", "split_file": "two.json"}}, "expected a test set for the final ru"),
        ({"data": {"test": "", "split_file": "three.json"}}, "--output file: expected a folder"),
        ({"data": {"split_file": "two.json"}}, "--output file: expected a folder"),
        (
            {"data": {"test": "", "train_folds": [0], "test_folds": [1]}},
            "--output file: expected a folder",
        ),
    ],
)
def test_a_table_without_a_test_set_is_refused_before_any_run(
    flags, tmp_path, monkeypatch, change, message
):
    """Those that have one come to the next check, which refuses the folder."""
    monkeypatch.chdir(tmp_path)
    rows = {"train": [0], "dev": [1]}
    (tmp_path / "two.json").write_text(json.dumps(rows))
    (tmp_path / "three.json").write_text(json.dumps(rows | {"test": [2]}))
    task = {**change, "data": {**TASK["data"], "root": str(tmp_path), **change.get("data", {})}}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    _, error = called("reproduce.py", *flags, "--table", "tiny", "--output", "file", expect=2)
    assert message in error
    if "a test set" in message:
        files = f"{tmp_path / 'task.yaml'}, {tmp_path / 'mle.yaml'}"
        assert error.startswith(f"error: config {files}: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_malformed_table_among_those_listed_is_named(flags, tmp_path):
    assert "tiny" in called("reproduce.py", *flags, "--list")[0]
    broken = tmp_path / "tables" / "broken.yaml"
    broken.write_text("methods: 3\n")
    _, error = called("reproduce.py", *flags, "--list", expect=2)
    assert error == f"error: {broken}: methods: expected a list of names, found 3\n"


@pytest.mark.thorough
def test_a_table_of_two_methods_from_data_to_picture(tmp_path):
    draw = np.random.default_rng(0)
    targets = draw.integers(0, 2, (30, 3))
    np.savez(tmp_path / "tiny.npz", features=draw.normal(size=(30, 5)), targets=targets)
    rows = {"train": [*range(18)], "dev": [*range(18, 24)], "test": [*range(24, 30)]}
    (tmp_path / "split.json").write_text(json.dumps(rows))
    net = {"name": "mlp", "hidden_size": 4}
    task = {
        "data": {"root": str(tmp_path), "task": "multilabel", "format": "npz",
                 "train": ["tiny.npz"], "split_file": "split.json"},
        "inference_net": net, "energy": {"name": "label_interaction", "features": net},
        "inner": {"batch_size": 6, "steps": 2}, "outer": {"batch_size": 6},
    }  # fmt: skip
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    for method in ("mle", "implicit"):
        train = {"method": method, "warmup_rounds": 1, "max_outer_steps": 1}
        (tmp_path / f"{method}.yaml").write_text(yaml.safe_dump(task | {"train": train}))
    table = {
        "config": "task.yaml", "methods": ["mle", "implicit"], "reference": "mle",
        "metric": "example_f1_at_0.5", "search": {"inner.energy_weight": [0.1, 1.0]},
    }  # fmt: skip
    (tmp_path / "tables").mkdir()
    table["config"] = "../task.yaml"
    (tmp_path / "tables" / "tiny.yaml").write_text(yaml.safe_dump(table))
    command = [
        sys.executable, ROOT / "launcher" / "reproduce.py", "--table", "tiny", "--budget", "1",
        "--seeds", "2", "--tables", tmp_path / "tables", "--method-files", tmp_path,
        "--runs", tmp_path / "runs", "--output", tmp_path,
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summaries = {p.parent.name: json.loads(p.read_text()) for p in tmp_path.rglob("summary.json")}
    assert {name: bool(s["test"]) for name, s in summaries.items()} == {
        "trial-000": False, "seed-0": True, "seed-1": True,
    }  # fmt: skip
    found = list(csv.DictReader((tmp_path / "tiny.csv").open()))
    assert {row["method"] for row in found} == {"mle", "implicit"}
    assert all(row["seeds"] == "2" and float(row["seconds_per_epoch"]) > 0 for row in found)


COLUMNS = "dataset,method,seed,metric,test,dev,seconds_per_epoch,budget,settings"
SEEDS = {"mle": (0.40, 0.42, 0.43), "nce_explicit": (0.44, 0.45, 0.44)}


def test_recorded_seeds_are_shown_against_any_method_and_nothing_is_run(tmp_path):
    for method in TABLE["methods"]:
        (tmp_path / f"{method}.yaml").write_text("train: {method: mle}\n")
    (tmp_path / "task.yaml").write_text("data: {}\n")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TABLE))
    table = read_table(tmp_path / "tiny.yaml", tmp_path)
    rows = [
        f"tiny,{method},{seed},f1,{test},0.5,1.0,0,{table.settings_sum(method, 0)}"
        for method, values in SEEDS.items()
        for seed, test in enumerate(values)
    ]
    flags = ("--tables", tmp_path, "--method-files", tmp_path, "--output", tmp_path)
    command = ("reproduce.py", "--table", "tiny", *flags, "--show")
    _, error = called(*command, expect=2)
    assert "--show: expected seeds with the present settings in" in error
    (tmp_path / "tiny_seeds.csv").write_text("\n".join([COLUMNS, *rows]) + "\n")
    before = sorted(tmp_path.rglob("*"))
    expected = stats.ttest_rel(SEEDS["mle"], SEEDS["nce_explicit"]).pvalue
    printed, _ = called(*command)
    assert f"| nce_explicit | f1 | 3 | 0 | 0.4433 +- 0.0058 | 0.5000 | {expected:.4f} |" in printed
    printed, _ = called(*command, "--reference", "nce_explicit")
    assert f"| mle | f1 | 3 | 0 | 0.4167 +- 0.0153 | 0.5000 | {expected:.4f} |" in printed
    assert "p against nce_explicit" in printed
    assert "left out: nce_implicit" in printed
    _, error = called(*command, "--reference", "nce_implicit", expect=2)
    assert "mle, nce_explicit, got 'nce_implicit'" in error
    _, error = called(*command[:-1], "--reference", "mle", expect=2)
    assert "--reference: expected --show with it" in error
    _, error = called(*command, "--seeds", "3", expect=2)
    assert "--seeds: expected none with --show" in error
    _, error = called(*command, "--first-seed", "0", expect=2)
    assert "--first-seed: expected none with --show" in error
    _, error = called(*command[:-1], "--first-seed", "-1", expect=2)
    assert "--first-seed: expected a whole number of at least 0, got -1" in error
    assert sorted(tmp_path.rglob("*")) == before
