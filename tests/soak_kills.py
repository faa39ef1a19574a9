"""A small training of two ranks, killed at random moments and started again until it is done."""

import contextlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from ranks import free_port
from records import events_of, rows_of

from ispen_dist.checkpoint import find_checkpoint, load_checkpoint
from ispen_dist.command_line import load_config
from ispen_dist.recording.metrics_file import read_metrics

TRAIN = Path(__file__).parent.parent / "launcher" / "train.py"
NUM_RANKS = 2
_ROUNDS_PER_KILL = 8
_LIMIT = 3600.0


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


# -- starting ----------------------------------------------------------------------------------


class Elastic:
    """Ranks under `accelerate launch`, whose elastic agent ends the others when one dies."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._mark = uuid.uuid4().hex
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines",
            "1", "--num_processes", str(NUM_RANKS), "--mixed_precision", "no",
            "--dynamo_backend", "no", "--main_process_port", str(free_port()), str(TRAIN),
            *arguments,
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1", "SOAK": self._mark}
        with log.open("a") as file:
            self._launcher = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

    def ranks(self) -> dict[int, int]:
        """Return process ids by rank, as far as they have started."""
        found = {}
        for process, environment in _environments():
            if f"SOAK={self._mark}" in environment and process != self._launcher.pid:
                rank = [value for value in environment if value.startswith("RANK=")]
                if rank:
                    found[int(rank[0].removeprefix("RANK="))] = process
        return found

    def is_over(self) -> bool:
        """Whether the launcher has ended."""
        return self._launcher.poll() is not None

    def code(self) -> int:
        """Wait for the end and return the exit code."""
        return self._launcher.wait(_LIMIT)

    def num_left(self) -> int:
        """Return how many processes of this start are alive."""
        return sum(f"SOAK={self._mark}" in environment for _, environment in _environments())


def _environments() -> list[tuple[int, list[str]]]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            found.append((int(path.parent.name), path.read_bytes().decode(errors="replace")))
    return [(process, text.split("\0")) for process, text in found]


class Forked:
    """Ranks forked from this process, which has imported everything: a start takes no seconds.

    Does what an elastic agent does: when one rank dies, it ends the others.
    """

    def __init__(self, arguments: list[str], log: Path) -> None:
        port = str(free_port())
        self._processes = {r: self._fork(r, port, arguments, log) for r in range(NUM_RANKS)}
        self._codes: dict[int, int] = {}

    def _fork(self, rank: int, port: str, arguments: list[str], log: Path) -> int:
        process = os.fork()
        if process:
            return process
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS),
            "LOCAL_WORLD_SIZE": str(NUM_RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.argv = [str(TRAIN), *arguments]
        code = 1
        try:
            runpy.run_path(str(TRAIN), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)

    def ranks(self) -> dict[int, int]:
        """Return process ids by rank of those that run."""
        self._look()
        return {r: p for r, p in self._processes.items() if r not in self._codes}

    def _look(self) -> None:
        for rank, process in self._processes.items():
            if rank not in self._codes:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    self._codes[rank] = os.waitstatus_to_exitcode(status)

    def is_over(self) -> bool:
        """Whether all ranks have ended; one that failed takes the others with it."""
        self._look()
        if any(self._codes.values()):
            self._end()
        return len(self._codes) == NUM_RANKS

    def _end(self) -> None:
        begin = time.monotonic()
        while living := self.ranks():
            for process in living.values():
                late = time.monotonic() - begin > 5.0
                os.kill(process, signal.SIGKILL if late else signal.SIGTERM)
            time.sleep(0.01)

    def code(self) -> int:
        """Wait for the end and return the exit code of a rank that failed, or 0."""
        begin = time.monotonic()
        while not self.is_over():
            if time.monotonic() - begin > _LIMIT:
                raise TimeoutError("expected the ranks to end")
            time.sleep(0.005)
        return next(filter(None, self._codes.values()), 0)

    def num_left(self) -> int:
        """Return how many ranks are alive."""
        return len(self.ranks())


Start = Elastic | Forked


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
        if is_time() and (process := start.ranks().get(victim)):
            if in_write:
                time.sleep(draw.uniform(0.0, 0.004))
                if not saves(output) - left:
                    continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
                return True
        time.sleep(0.0003 if published(output) >= 0 else 0.01)
    return False


def soak(
    start: Callable[[list[str], Path], Start],
    folder: Path,
    num_kills: int,
    seed: int,
    until: float,
    report: Callable[[str], None],
) -> Kills:
    """Kill a run until `num_kills` or the time is reached, let it end, and compare it."""
    config = write_problem(folder, num_kills, seed)
    whole, killed, log = folder / "whole", folder / "killed", folder / "log.txt"

    def arguments(output: Path) -> list[str]:
        return ["--config", str(config), "--output", str(output), "--resume", "auto"]

    draw, kills = random.Random(seed), Kills()
    begin = time.monotonic()
    first = start(arguments(whole), log)
    startup = 0.0
    while not startup and not first.is_over():
        startup = time.monotonic() - begin if published(whole) >= 0 else 0.0
        time.sleep(0.01)
    assert first.code() == 0, log.read_text()[-3000:]
    report(f"undisturbed run: {time.monotonic() - begin:.0f} s, {startup:.1f} s to start")
    while kills.num < num_kills and time.monotonic() < until:
        left = saves(killed)
        run = start(arguments(killed), log)
        if not kill_once(run, killed, draw, startup, left):
            assert run.code() == 0, log.read_text()[-3000:]
            report("the run was over before its kills were")
            break
        before = published(killed)
        run.code()
        kills.num += 1
        kills.num_in_write += bool(saves(killed) - left)
        kills.steps.append(check_remains(killed, before))
        assert run.num_left() == 0, "a process was left"
        report(f"kill {kills.num}: step {kills.steps[-1]}, {kills.num_in_write} inside a write")
    last = start(arguments(killed), log)
    assert last.code() == 0, log.read_text()[-3000:]
    assert last.num_left() == 0, "a process was left"
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
