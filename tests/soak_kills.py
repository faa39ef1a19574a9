"""A small training of two ranks, killed at random moments and started again until it is done."""

import contextlib
import json
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from records import events_of, rows_of
from soak_starts import NUM_RANKS, Start

from ispen_dist.checkpoint import find_checkpoint, load_checkpoint
from ispen_dist.command_line import load_config
from ispen_dist.recording.metrics_file import read_metrics

_ROUNDS_PER_KILL = 8


def write_problem(folder: Path, num_kills: int, seed: int) -> Path:
    """Write data and settings of a run that is long enough for so many kills."""
    draw = np.random.default_rng(seed)
    features = draw.normal(size=(60, 12)).astype(np.float32)
    targets = (features[:, :5] + 0.3 * draw.normal(size=(60, 5)) > 0).astype(np.uint8)
    np.savez(folder / "all.npz", features=features, targets=targets)
    network = {"name": "mlp", "hidden_size": 48, "num_layers": 2, "dropout": 0.2}
    settings = {
        "data": {
            "task": "multilabel", "format": "npz", "root": str(folder), "train": ["all.npz"],
        },
        "inference_net": network,
        "energy": {"name": "label_interaction", "features": network, "num_units": 4},
        "inner": {"batch_size": 8, "steps": 1},
        "outer": {"batch_size": 8, "objective": "nce", "task_weight": 1.0, "num_samples": 3},
        "solver": {"max_steps": 2, "damping": 1.0},
        "train": {
            "warmup_rounds": 4, "max_outer_steps": num_kills * _ROUNDS_PER_KILL + 8,
            "eval_every": 20, "checkpoint_every": 1, "keep_checkpoints": 2, "num_threads": 1,
            "seed": seed,
        },
    }  # fmt: skip
    path = folder / "soak.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


# -- killing -----------------------------------------------------------------------------------


@dataclass
class Kills:
    """What the kills of a soak came to."""

    num: int = 0
    num_in_write: int = 0
    steps: list[int] = field(default_factory=list)


def published(output: Path) -> int:
    """Return the newest step under a final name, or -1."""
    names = _names(output / "checkpoints")
    return max((int(n.removeprefix("step_")) for n in names if n.startswith("step_")), default=-1)


def _names(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if not name.endswith(".replaced")]
    except FileNotFoundError:
        return []


def saves(output: Path) -> set[tuple[str, int, int]]:
    """Return name, number and time of change of the hidden folders of saves.

    One that an earlier kill left stays as it is until the next save begins; what is new or changes
    is being written.
    """
    found = set()
    for name in _names(output / "checkpoints"):
        if name.startswith(".saving_"):
            with contextlib.suppress(FileNotFoundError):
                status = (output / "checkpoints" / name).stat()
                found.add((name, status.st_ino, status.st_mtime_ns))
    return found


def kill_once(
    start: Start,
    output: Path,
    draw: random.Random,
    startup: float,
    left: set[tuple[str, int, int]],
) -> bool:
    """Kill a rank at a random moment, half of the time inside a write; False if it was over."""
    before, begin = published(output), time.monotonic()
    in_write = draw.random() < 0.55
    num_more, delay = draw.randint(0, 6), draw.uniform(0.0, startup + 1.0)

    def is_time() -> bool:
        if in_write:
            return published(output) >= before + num_more and bool(saves(output) - left)
        return time.monotonic() - begin >= delay or published(output) >= before + 8

    victim = 0 if in_write else draw.randrange(NUM_RANKS)
    while not start.is_over():
        if victim in start.ranks() and is_time():
            if in_write:
                time.sleep(draw.uniform(0.0, 0.004))
                if not saves(output) - left:
                    continue
            start.send(signal.SIGKILL, victim)
            return True
        time.sleep(0.0003 if published(output) >= 0 else 0.01)
    return False


def soak(
    start: type[Start],
    folder: Path,
    num_kills: int,
    seed: int,
    until: float,
    report: Callable[[str], None],
) -> Kills:
    """Kill a run until `num_kills` or the time is reached, let it end, and compare it."""
    config = write_problem(folder, num_kills, seed)
    whole, killed = folder / "whole", folder / "killed"

    def started(output: Path) -> Start:
        arguments = ["--config", str(config), "--output", str(output), "--resume", "auto"]
        return start(folder / "logs", *arguments)

    draw, kills = random.Random(seed), Kills()
    begin = time.monotonic()
    first = started(whole)
    startup = 0.0
    while not startup and not first.is_over():
        startup = time.monotonic() - begin if published(whole) >= 0 else 0.0
        time.sleep(0.01)
    assert first.code() == 0, first.text()
    report(f"undisturbed run: {time.monotonic() - begin:.0f} s, {startup:.1f} s to start")
    while kills.num < num_kills and time.monotonic() < until:
        left = saves(killed)
        run = started(killed)
        if not kill_once(run, killed, draw, startup, left):
            assert run.code() == 0, run.text()
            report("the run was over before its kills were")
            break
        before = published(killed)
        run.code()
        kills.num += 1
        kills.num_in_write += bool(saves(killed) - left)
        kills.steps.append(check_remains(killed, before))
        report(f"kill {kills.num}: step {kills.steps[-1]}, {kills.num_in_write} inside a write")
    last = started(killed)
    assert last.code() == 0, last.text()
    compare(whole, killed)
    return kills


# -- checking ----------------------------------------------------------------------------------


def check_remains(output: Path, before: int) -> int:
    """See that a kill left an intact newest checkpoint and nothing half under a final name."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = find_checkpoint(output / "checkpoints")
    step = -1 if path is None else load_checkpoint(path).step
    assert step >= before, f"expected a checkpoint of step {before} or later, got {step}"
    for other in (output / "checkpoints").glob("step_*"):
        load_checkpoint(other)
    best = output / "checkpoints" / "best.json"
    if best.exists():
        marked = json.loads(best.read_text())["step"]
        assert load_checkpoint(best.parent / f"step_{marked:08d}").step == marked
    if (output / "config.yaml").exists():
        load_config(output / "config.yaml")
    if (output / "metrics.jsonl").exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # half of a last row is what a kill may leave
            last = max((row["step"] for row in read_metrics(output / "metrics.jsonl")), default=0)
        assert last >= step, f"expected rows up to step {step}, got {last}"
    return step


def compare(whole: Path, killed: Path) -> None:
    """See that two runs left the same, bit for bit, but for how long things took."""
    for file in sorted((whole / "model").iterdir()):
        assert file.read_bytes() == (killed / "model" / file.name).read_bytes(), file.name
    assert rows_of(whole) == rows_of(killed)
    assert events_of(whole) == events_of(killed)
    first, second = (json.loads((f / "summary.json").read_text()) for f in (whole, killed))
    for name in ("rounds", "dev", "test", "hypergradient"):
        assert first[name] == second[name], name


def copy_of_checkpoints(folder: Path, copy: Path) -> Path:
    """Copy the checkpoints of a soaked run."""
    return Path(shutil.copytree(folder / "killed" / "checkpoints", copy))
