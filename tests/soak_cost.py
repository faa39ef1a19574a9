"""What saving costs a training of the size of configs/bibtex.yaml, at the default interval."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from launched import TRAIN

from ispen_dist.config import TrainConfig

CONFIG = TRAIN.parent.parent / "configs" / "bibtex.yaml"
MAX_SHARE = 0.05


@dataclass(frozen=True)
class Cost:
    """Seconds of a training that `num_saved` saves cost, one per `interval` rounds.

    Attributes:
        waited: in which training stood still for a copy, or for the save before.
        written: in which a thread wrote beside the training.
        seconds: of the training.
    """

    num_saved: int
    interval: int
    waited: float
    written: float
    seconds: float


def data_folder() -> Path:
    """Return the folder with the real data sets, which may be absent."""
    return Path(os.environ.get("ISPEN_DATA") or TRAIN.parents[2] / "shared" / "data")


def cost_of_saving(folder: Path, data: Path, num_saves: int) -> Cost:
    """Train on bibtex in one process until so many checkpoints are saved.

    Half of the rounds are warm-up, as in the configuration; dev is read in the end only, since
    that is no part of what a save interrupts.

    Raises:
        AssertionError: if training waits for saves for 5% of its time or more.
    """
    interval = TrainConfig().checkpoint_every
    num_rounds = num_saves * interval
    settings = {
        "checkpoint_every": interval, "warmup_rounds": num_rounds // 2,
        "max_outer_steps": num_rounds - num_rounds // 2, "eval_every": num_rounds,
        "num_threads": 1,
    }  # fmt: skip
    flags = [f"--train.{name}={value}" for name, value in settings.items()]
    subprocess.run(
        [sys.executable, TRAIN, "--config", CONFIG, "--output", folder, *flags],
        env=os.environ | {"ISPEN_DATA": str(data), "OMP_NUM_THREADS": "1"}, check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    saves = summary["checkpoints"]
    cost = Cost(
        saves["saved"], interval, saves["waited_seconds"], saves["write_seconds"],
        summary["seconds"],
    )  # fmt: skip
    assert cost.num_saved == num_saves, f"expected {num_saves} saves, got {cost.num_saved}"
    assert cost.waited < MAX_SHARE * cost.seconds, f"expected less than 5% of waiting, got {cost}"
    return cost
