"""A run goes on under another number of ranks and another engine as if nothing had happened."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from launched import TRAIN
from ranks import start_ranks
from safetensors.torch import load_file
from tags import config  # noqa: F401

EXACT = [
    "--inference_net.dropout=0",
    "--energy.features.dropout=0",
    "--outer.objective=ssvm",
    "--inner.optimizer.learning_rate=0.001",
    "--solver.damping=30",
    "--train.average_decay=0.8",
]


def train(config_file: Path, output: Path, num_ranks: int, runtime: str) -> None:
    arguments = ["--config", str(config_file), "--output", str(output), *EXACT]
    start_ranks(TRAIN, num_ranks, *arguments, runtime=runtime)


def cut_after(folder: Path, copy: Path, last: int) -> Path:
    """Copy a run as it was when it was killed after a checkpoint."""
    shutil.copytree(folder, copy)
    for path in (copy / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > last:
            shutil.rmtree(path)
    shutil.rmtree(copy / "model")
    (copy / "summary.json").unlink()
    return copy


def state_after(folder: Path, step: int) -> dict[str, torch.Tensor]:
    files = (folder / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")
    return {f"{f.stem}/{k}": v for f in sorted(files) for k, v in load_file(f).items()}


@pytest.mark.parametrize(
    "chain",
    [
        pytest.param([("zero3", 4), ("zero3", 2), ("zero3", 3)], marks=pytest.mark.thorough),
        pytest.param([("fsdp2", 4), ("fsdp2", 2), ("fsdp2", 3)], marks=pytest.mark.thorough),
        [("zero1", 2), ("fsdp2", 2), ("replicas", 1)],
    ],
    ids=lambda chain: "-".join(f"{name}x{n}" for name, n in chain),
)
def test_a_run_goes_on_elsewhere(chain, config, tmp_path):  # noqa: F811
    """The oracle is the uninterrupted run of the first runtime, in every part of the state."""
    whole = tmp_path / "whole"
    train(config, whole, chain[0][1], chain[0][0])
    before = whole
    for number, (last, (runtime, num_ranks)) in enumerate(zip((2, 4), chain[1:], strict=True)):
        # After 2 the pre-training has just ended, after 4 the energy is being learned.
        resumed = cut_after(before, tmp_path / f"part{number}", last)
        train(config, resumed, num_ranks, runtime)
        before = resumed
        assert json.loads((resumed / "summary.json").read_text())["world_size"] == num_ranks
    expected, found = state_after(whole, 6), state_after(before, 6)
    assert found.keys() == expected.keys()
    parts = {"inference_net_exp_avg_sq", "energy_exp_avg", "solver_start", "best_energy"}
    assert parts | {"average_energy"} <= {key.split("/")[0] for key in found}
    for key, value in expected.items():
        error = (found[key] - value).norm() / (value.norm() + 1e-6)
        assert error < 1e-3, f"{key}: {error}"
    model = load_file(before / "model" / "inference_net.safetensors")
    reference = load_file(whole / "model" / "inference_net.safetensors")
    assert all(model[k].shape == reference[k].shape for k in reference)
