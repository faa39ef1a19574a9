"""Ends a process that makes no progress, with the stacks of all its threads in the log."""

import faulthandler
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from ispen_dist.exits import Exit

FIRST_TIME = 600.0
"""Seconds that every kind of work has at least when it is done for the first time: processes meet,
operators are compiled, data is read."""

POLL_SECONDS = 1.0

LINGER_SECONDS = 3.0
"""Between the stacks and the exit: an exit closes the connections of the other ranks, which are to
write their own stacks first."""

DETAILS_SECONDS = 10.0
"""How long `details` may take: it asks libraries that may be stuck themselves."""


class Watchdog:
    """A thread that looks whether `beat` was called in time.

    It counts its own ticks in place of reading a clock, so a process that was suspended as a whole
    does not look like one that hangs. A beat costs an addition and two stores.

    Args:
        timeout: seconds without a beat; 0 watches nothing.
        poll: seconds between two looks.

    Attributes:
        details: returns what else is known of a hang, such as the last collectives.
    """

    def __init__(self, timeout: float, poll: float = POLL_SECONDS) -> None:
        self.timeout, self._poll = timeout, poll
        self._beats, self._work, self._known = 0, "start", {"start"}
        self._limit = max(timeout, FIRST_TIME)
        self._waited = 0.0
        self._ended = threading.Event()
        self.details: Callable[[], str] = str

    @property
    def is_late(self) -> bool:
        """Whether half the time is over: an error now comes of ranks that ended for a hang."""
        return self._waited > 0.5 * self._limit

    def start(self) -> None:
        """Begin to watch."""
        if self.timeout > 0.0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, work: str) -> None:
        """Say that something was finished and that `work` begins, a kind of work such as "save".

        The first time of a kind has `FIRST_TIME` seconds at least.
        """
        if work in self._known:
            self._limit = self.timeout
        else:
            self._limit = max(self.timeout, FIRST_TIME)
            self._known.add(work)
        self._work = work
        self._beats += 1

    def stop(self) -> None:
        """Cease to watch."""
        self._ended.set()

    def _watch(self) -> None:
        seen, before = -1, time.monotonic()
        while not self._ended.wait(self._poll):
            now = time.monotonic()
            # A longer tick means that this thread, and with it the process, did not run.
            self._waited += min(now - before, 2.0 * self._poll)
            before = now
            if seen != self._beats:
                seen, self._waited = self._beats, 0.0
            elif self._waited > self._limit:
                self._end()

    def report(self) -> None:
        """Write to the log how long there was no progress, and the stacks of all threads."""
        write_prefixed(
            f"error: no progress for {self._waited:.0f} s in: {self._work}; raise "
            "train.hang_timeout if it only needs longer; stacks of all threads follow\n" + stacks()
        )
        asking = threading.Thread(target=lambda: write_prefixed(self.details()), daemon=True)
        asking.start()
        asking.join(DETAILS_SECONDS)

    def _end(self) -> None:
        self.report()
        time.sleep(LINGER_SECONDS)
        os._exit(Exit.HANG)


def stacks() -> str:
    """Return the stacks of all threads of this process."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode("utf-8", "replace")


def write_prefixed(text: str) -> None:
    """Write lines to standard error at once, each with rank and host, so that ranks do not mix."""
    prefix = f"[rank {os.environ.get('RANK', '0')} on {socket.gethostname()}] "
    lines = "".join(f"{prefix}{line}\n" for line in text.splitlines())
    sys.stderr.flush()
    os.write(sys.stderr.fileno(), lines.encode("utf-8", "replace"))
