"""Jobs under `accelerate launch`, and how processes are found by their variables."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil

TRAIN = Path(__file__).parent.parent / "launcher" / "train.py"
LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip
_LIMIT = 3600.0
_PARTING_SECONDS = 60.0


def processes_with(**variables: str) -> list[psutil.Process]:
    """Return the living processes that were started with variables of these values."""
    found = []
    for process in psutil.process_iter():
        # Processes end while one looks; those that have ended have no variables.
        with contextlib.suppress(psutil.Error):
            if variables.items() <= process.environ().items():
                found.append(process)
    return found


def send(number: signal.Signals, process: psutil.Process) -> None:
    """Send a signal to a process that may have ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


class Launched:
    """A job of launcher/train.py with its launcher.

    Workers have sessions of their own, so a variable marks the processes.

    Args:
        folder: of the log.
        arguments: of launcher/train.py.
        num_ranks: processes.
        environment: further variables.

    Attributes:
        launcher: the first process.
    """

    def __init__(
        self, folder: Path, *arguments: str | Path, num_ranks: int = 2, **environment: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log, self._num_ranks = folder / "log", num_ranks
        self._mark = {"PROCESSES_OF": str(uuid.uuid4())}
        self._ranks: dict[int, psutil.Process] = {}
        own = os.environ | {"OMP_NUM_THREADS": "1"} | self._mark | environment
        command = [*LAUNCH, "--num_processes", str(num_ranks), str(TRAIN), *map(str, arguments)]
        with self._log.open("wb") as file:
            self.launcher = subprocess.Popen(command, env=own, stdout=file, stderr=file)

    def processes(self) -> list[psutil.Process]:
        """Return the processes that are alive."""
        self.launcher.poll()
        return processes_with(**self._mark)

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the processes that run train.py by rank, as far as they have started."""
        # All of a job start once: a look at every process of the machine takes its time.
        if len(self._ranks) < self._num_ranks:
            for process in self.processes():
                with contextlib.suppress(psutil.Error):
                    if rank := process.environ().get("RANK"):
                        self._ranks.setdefault(int(rank), process)
        return self._ranks

    def send(self, number: signal.Signals, rank: int) -> None:
        """Send a signal to a rank that may have ended."""
        send(number, self.ranks()[rank])

    def text(self) -> str:
        """Return what launcher and ranks have printed."""
        return self._log.read_text()

    def wait_for(self, words: str, seconds: float = 120.0) -> None:
        """Wait until somebody has printed some words."""
        end = time.monotonic() + seconds
        while words not in self.text():
            assert time.monotonic() < end, self.text()
            assert self.launcher.poll() is None, self.text()
            time.sleep(0.05)

    def is_over(self) -> bool:
        """Whether the launcher has ended."""
        return self.launcher.poll() is not None

    def code(self, seconds: float = _LIMIT) -> int:
        """Wait for the end, see that no process is left, and return the launcher's code."""
        code = self.launcher.wait(seconds)
        assert self.gone_within(_PARTING_SECONDS), f"left: {self.processes()}\n{self.text()}"
        return code

    def gone_within(self, seconds: float) -> bool:
        """Wait until no process is alive."""
        end = time.monotonic() + seconds
        while self.processes():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def kill(self) -> None:
        """End what is left."""
        for process in self.processes():
            send(signal.SIGKILL, process)
        self.launcher.wait()
