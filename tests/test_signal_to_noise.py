"""What profiling/signal_to_noise.py measures, where the answer is known."""

import csv
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ispen_dist.command_line import parse_train
from ispen_dist.data.loading import load_splits
from ispen_dist.distributed import Session
from ispen_dist.recording.console import Console
from ispen_dist.recording.run_folder import RunFolder
from ispen_dist.trainer import Trainer

PROFILING = str(Path(__file__).parent.parent / "profiling")
NETWORK = {"name": "mlp", "hidden_size": 2, "activation": "softplus"}
SETTINGS = {
    "inference_net": NETWORK,
    "energy": {"name": "label_interaction", "features": NETWORK},
    "inner": {
        "batch_size": 64, "steps": 10, "energy_weight": 0.3,
        "optimizer": {"learning_rate": 0.01, "weight_decay": 0.0},
    },
    "outer": {"batch_size": 64, "objective": "task", "optimizer": {"learning_rate": 0.01}},
    "solver": {"max_steps": 60, "damping": 0.01},
    "train": {"warmup_rounds": 60, "max_outer_steps": 0, "num_threads": 1, "dtype": "float64"},
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(PROFILING)
    return importlib.import_module("signal_to_noise")


def test_signal_and_noise_of_a_known_distribution(bench):
    generator = torch.Generator().manual_seed(0)
    mean = torch.full((500,), 0.2, dtype=torch.float64)
    few = [
        bench.signal_and_noise(mean + torch.randn(5, 500, generator=generator).double())
        for _ in range(400)
    ]
    # Of the squares, which are unbiased; as many as are needed for a percent or two.
    signal, noise = torch.tensor(few).square().mean(0).tolist()
    assert signal == pytest.approx(mean.square().sum().item(), rel=0.05)
    assert noise == pytest.approx(500.0, rel=0.01)


@pytest.fixture
def run(tmp_path):
    """A run of all examples in every batch, at the optimum of a small smooth problem."""
    draw = np.random.default_rng(0)
    features = draw.normal(size=(80, 4))
    targets = draw.random((80, 3)) < 1 / (1 + np.exp(-features[:, :3]))
    np.savez(tmp_path / "all.npz", features=features, targets=targets.astype(np.uint8))
    data = {"task": "multilabel", "format": "npz", "root": str(tmp_path), "train": ["all.npz"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": data, **SETTINGS}))
    config = parse_train(["--config", str(tmp_path / "config.yaml")]).config
    with Console(is_main=False) as console:
        folder = RunFolder(tmp_path / "run", config, console, is_main=True)
        Trainer(config, load_splits(config), Session(), folder).run()
    return tmp_path / "run"


@pytest.mark.thorough
def test_full_batches_have_no_noise_and_the_network_answers(bench, run, tmp_path, monkeypatch):
    output = tmp_path / "rows.csv"
    flags = ["--run", run, "--repeats", "3", "--batch-sizes", "64", "--response", "1", "300"]
    monkeypatch.setattr(sys, "argv", ["", *map(str, flags), "--output", str(output)])
    bench.main()
    with output.open() as file:
        rows = {row["part"]: row for row in csv.DictReader(file)}
    assert rows["explicit"]["signal"] == "0"  # the task's cost does not see phi by itself
    assert float(rows["implicit"]["ratio"]) > 100.0
    assert all(row["usable"] == "3/3" for row in rows.values())
    with output.with_stem("rows_response").open() as file:
        one, many = (float(row["response"]) for row in csv.DictReader(file))
    assert 0.0 < 3.0 * one < many < 1.1  # in full only from and to an optimum
