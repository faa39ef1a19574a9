"""One run of launcher/train.py: started here or by SLURM, unless it is done already."""

import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ispen_dist.exits import Exit
from ispen_dist.stopping import STARTED


@dataclass(frozen=True)
class Run:
    """A run, which is done when its folder has a summary.

    Attributes:
        configs: files of settings; of several, each wins over those before it.
        settings: by dotted name; they win over the files.
        folder: of the run; the log stands beside it.
    """

    configs: tuple[Path, ...]
    settings: Mapping[str, Any]
    folder: Path

    @property
    def log(self) -> Path:
        """What the run printed, all attempts."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def files(self) -> list[str]:
        """Return the flags of the files and the folder."""
        configs = [part for path in self.configs for part in ("--config", str(path))]
        return [*configs, "--output", str(self.folder)]

    def flags(self) -> list[str]:
        """Return the flags of the settings, as YAML reads them."""
        return [
            f"--{name}={value if isinstance(value, str) else json.dumps(value)}"
            for name, value in self.settings.items()
        ]

    def summary(self) -> dict[str, Any] | None:
        """Return the summary of a run that is done, otherwise None."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else None


class RunFailed(Exception):
    """A run that left no summary.

    Attributes:
        run: which.
        code: its exit code, where it is known.
    """

    def __init__(self, run: Run, code: int | None, log: Path) -> None:
        words = "" if code is None else f"exit code {code}; "
        super().__init__(f"{run.folder}: {words}log: {log}")
        self.run, self.code = run, code


class Interrupted(Exception):
    """No run is started any more, since the whole command was told to end."""


class Runs(Protocol):
    """Where runs are executed; safe to call from several threads."""

    def __call__(self, run: Run) -> dict[str, Any]:
        """Return the summary of a run, after training unless it is done.

        Raises:
            RunFailed: if it leaves none.
            Interrupted: after `stop`.
        """

    def stop(self) -> None:
        """Start no further run, and end those that run here, which save first."""


@dataclass
class LocalRuns:
    """Runs as processes of this machine.

    Args:
        command: of launcher/train.py.
        gpus: one run at a time on each of these; without any, runs use one CPU thread.
    """

    command: Sequence[str]
    gpus: Sequence[str] = ()
    _alive: set[subprocess.Popen] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False

    def __post_init__(self) -> None:
        self._free: queue.Queue[str] = queue.Queue()
        for gpu in self.gpus:
            self._free.put(gpu)

    def __call__(self, run: Run) -> dict[str, Any]:
        """Train in a process and wait for it."""
        if summary := run.summary():
            return summary
        gpu = self._free.get() if self.gpus else None
        try:
            code = self._wait(self._start(run, gpu))
        finally:
            if gpu is not None:
                self._free.put(gpu)
        if self._stopped and code != Exit.DONE:
            raise Interrupted
        summary = run.summary()
        if code != Exit.DONE or summary is None:
            raise RunFailed(run, code, run.log)
        return summary

    def _start(self, run: Run, gpu: str | None) -> subprocess.Popen:
        threads = [] if gpu is not None else ["--train.num_threads=1"]
        command = [*self.command, *run.files(), *threads, *run.flags()]
        own = {STARTED: "1"} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, run.log.open("ab") as log:
            if self._stopped:
                raise Interrupted
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | own
            )
            self._alive.add(process)
        return process

    def _wait(self, process: subprocess.Popen) -> int:
        code = process.wait()
        with self._lock:
            self._alive.discard(process)
        return code

    def stop(self) -> None:
        """Start no further run; those alive get SIGTERM, at which they save and end."""
        with self._lock:
            self._stopped = True
            for process in self._alive:
                process.terminate()


@dataclass
class SlurmRuns:
    """Runs as jobs of a SLURM cluster, submitted by launcher/slurm.py.

    The number of the newest job of a run stands beside its folder, so that a command that is
    started again waits for jobs that are still there, and submits others once more.

    Args:
        launcher: launcher/slurm.py.
        options: its flags: nodes, GPUs, time, partition.
        poll: seconds between looks at the queue.
    """

    launcher: Path
    options: Sequence[str]
    poll: float = 15.0
    _stopped: threading.Event = field(default_factory=threading.Event)

    def __call__(self, run: Run) -> dict[str, Any]:
        """Submit unless a job of this run is queued, and wait for the summary."""
        if summary := run.summary():
            return summary
        job = self._job_file(run)
        number = job.read_text("ascii") if job.exists() else ""
        if not number or not self._is_queued(number):
            number = self._submit(run)
            job.write_text(number, "ascii")
        while self._is_queued(number):
            if self._stopped.wait(self.poll):
                raise Interrupted
        summary = run.summary()
        if summary is None:
            time.sleep(self.poll)  # A shared file system may be late.
            summary = run.summary()
        if summary is None:
            raise RunFailed(run, None, run.folder / "slurm" / f"job-{number}.log")
        return summary

    def _job_file(self, run: Run) -> Path:
        return run.folder.with_name(f"{run.folder.name}.job")

    def _submit(self, run: Run) -> str:
        if self._stopped.is_set():
            raise Interrupted
        run.log.parent.mkdir(parents=True, exist_ok=True)
        script = run.folder / "slurm" / "job.sbatch"
        again = script.exists()
        command = ["sbatch", "--parsable", str(script)] if again else [
            sys.executable, str(self.launcher), *run.files(), *self.options, "--", *run.flags(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        with run.log.open("a", encoding="utf-8") as log:
            log.write(done.stdout + done.stderr)
        match = re.match(r"(?:job )?(\d+)", done.stdout)
        if done.returncode != 0 or match is None:
            raise RunFailed(run, done.returncode, run.log)
        return match[1]

    def _is_queued(self, number: str) -> bool:
        """Whether a job waits or runs; a controller that does not answer says nothing about it."""
        command = ["squeue", "--noheader", "--jobs", number, "--format=%T"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return "Invalid job id" not in done.stderr
        return bool(done.stdout.strip())

    def stop(self) -> None:
        """Submit no further job and wait no longer; jobs go on, and are waited for next time."""
        self._stopped.set()
