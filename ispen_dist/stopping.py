"""Stopping on request: a signal sets a flag, which is read between two rounds.

A handler saves nothing and calls no collective: it may run in the middle of either. The number of
the signal is one of the flags that all ranks reduce at the boundary of a round, so one signalled
rank is enough, and all stop after the same round.
"""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

STARTED = "ISPEN_DIST_STARTED"
"""Set in the environment of a run by a command of ours that starts runs and waits for them."""

SAME_SECONDS = 2.0
"""Two Ctrl-C within this time are one: the terminal sends it to all processes, and the launcher
then sends it to its workers once more."""


class Stopped(RuntimeError):
    """The run was asked to stop, and everything is saved.

    Args:
        round: number of finished rounds.
        reason: name of the signal.
    """

    def __init__(self, round: int, reason: str) -> None:
        super().__init__(f"stopped by {reason} after round {round}; everything is saved")
        self.round, self.reason = round, reason


class StopRequest:
    """Remembers the first signal that asked this process to stop.

    Attributes:
        signal: its number, or 0.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._interrupted = 0.0

    def install(self) -> None:
        """Handle the signals from now on; only the main thread may call this."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted and now - self._interrupted > SAME_SECONDS:
                os._exit(128 + number)
            if not self._interrupted:
                self._interrupted = now
                _say("stopping after this round; press Ctrl-C again to stop at once\n")
        self.signal = self.signal or number


def _say(text: str) -> None:
    """Write to standard error without its buffer, which the handler may have interrupted."""
    os.write(2, text.encode())


def stop_with_launcher() -> None:
    """Ask the kernel for SIGTERM when the process that started this one dies, on Linux.

    A launcher that is killed, or that dies of a signal it does not pass on, would otherwise leave
    its workers running. Without a launcher nothing is asked for: a shell may end before its jobs.
    """
    launchers = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", STARTED)
    if any(name in os.environ for name in launchers):
        set_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        prctl = getattr(ctypes.CDLL(None), "prctl", None)
        if prctl is not None:
            prctl(set_death_signal, signal.SIGTERM)


class Boundary:
    """What all ranks decide together between two rounds, as named flags in one small collective.

    Args:
        largest: returns the largest values over ranks of a list of numbers, in one collective.
    """

    def __init__(self, largest: Callable[[Sequence[int]], list[int]]) -> None:
        self._largest = largest
        self._flags: dict[str, Callable[[], int]] = {}

    def add(self, name: str, flag: Callable[[], int]) -> None:
        """Add a flag, 0 where there is nothing to say; every rank adds the same in one order."""
        self._flags[name] = flag

    def __call__(self) -> dict[str, int]:
        """Return the largest value over ranks of every flag; every rank calls it."""
        values = self._largest([int(flag()) for flag in self._flags.values()])
        return dict(zip(self._flags, values, strict=True))
