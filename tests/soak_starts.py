"""The two ways in which a soak starts its ranks; both end all of them when one has failed."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Protocol

from forks import Job
from launched import Launched

NUM_RANKS = 2
_LIMIT = 3600.0
_PARTING_SECONDS = 5.0


class Start(Protocol):
    """A started run, by its arguments; made with the folder of its logs."""

    def __init__(self, folder: Path, *arguments: str) -> None: ...

    def ranks(self) -> dict:
        """Return processes by rank, as far as they have started."""

    def send(self, number: signal.Signals, rank: int) -> None:
        """Send a signal to a rank that may have ended."""

    def is_over(self) -> bool:
        """Whether the run has ended."""

    def code(self) -> int:
        """Wait for the end of all processes and return the exit code."""

    def text(self) -> str:
        """Return what all have printed."""


class Forked(Job):
    """Ranks forked from a process that has imported everything; does what an elastic agent does."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        super().__init__(folder, *arguments, num_ranks=NUM_RANKS)
        self._code = 0

    def ranks(self) -> dict:
        """Return the processes that are alive by rank."""
        return {r: process for r, process in enumerate(self.processes) if process.is_alive()}

    def send(self, number: signal.Signals, rank: int) -> None:
        """Send a signal to a rank that may have ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.processes[rank].pid, number)

    def is_over(self) -> bool:
        """Whether all ranks have ended; the first that fails takes the others with it."""
        living = self.ranks()
        failed = [process.exitcode for process in self.processes if process.exitcode]
        if failed and not self._code:
            self._code = failed[0]
            for process in living.values():
                process.terminate()
            self.codes(timeout=_PARTING_SECONDS)
        return not self.ranks()

    def code(self) -> int:
        """Wait for the end and return the exit code of the first rank that failed, or 0."""
        end = time.monotonic() + _LIMIT
        while not self.is_over():
            assert time.monotonic() < end, f"expected the ranks to end\n{self.text()}"
            time.sleep(0.005)
        return self._code


STARTS: dict[str, type[Start]] = {"elastic": Launched, "fork": Forked}
