"""launcher/reproduce.py with the real launcher/train.py on a tiny task."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parent.parent


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
