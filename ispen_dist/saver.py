"""Saving in the background: training waits for a copy of the state, a thread writes it.

The thread belongs to the one process that writes; all others only take part in bringing whole
tensors to it. One save is under way at a time: the next waits for the one before, so there is never
more than one copy of the state in main memory.
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from ispen_dist.checkpoint import save_checkpoint
from ispen_dist.write_failures import WriteFailures

Trees = Mapping[str, dict[str, Tensor]]
_WHAT = "checkpoint"


class Saver:
    """Writes the checkpoints of a run; a context manager that waits for the last one.

    Args:
        folder: where the checkpoints lie.
        failures: what follows a save that failed.
        is_main: whether this process writes.
        keep: newest checkpoints that are kept.
        sync: called before a checkpoint gets its name, from the thread: brings to the disk what
            must not be older than the checkpoint.

    Attributes:
        num_saved: checkpoints written by this process.
        waited_seconds: that training waited, for copies and for the save before.
        write_seconds: that the thread was busy.
    """

    def __init__(
        self,
        folder: Path,
        failures: WriteFailures,
        *,
        is_main: bool,
        keep: int,
        sync: Callable[[], None],
    ) -> None:
        self._folder, self._failures, self._is_main = folder, failures, is_main
        self._keep, self._sync = keep, sync
        # Its thread is joined when the interpreter ends, whatever ends it.
        self._pool = ThreadPoolExecutor(1, "saver")
        self._pending: Future[float] | None = None
        self._last_write: float | None = None
        self.num_saved, self.waited_seconds, self.write_seconds = 0, 0.0, 0.0

    def save(
        self,
        step: int,
        collect: Callable[[], Trees],
        state: Mapping[str, Any],
        record: Callable[[Mapping[str, float | None]], None],
        best: float | None,
    ) -> None:
        """Copy the state and have it written; every rank calls it.

        Args:
            step: when this is.
            collect: returns copies of the tensors that share no memory with what training goes on
                to change; every rank calls it, one keeps the result.
            state: what is no tensor.
            record: takes the seconds that training waited for the save before and for the copy,
                and what the writing of the save before took. Called before the write begins, so
                that records are never behind a checkpoint.
            best: see `save_checkpoint`.
        """
        begin = time.perf_counter()
        self.wait()
        waited = time.perf_counter()
        trees = collect()
        copied = time.perf_counter()
        if self._is_main:
            record(
                {
                    "wait_seconds": waited - begin,
                    "copy_seconds": copied - waited,
                    "previous_write_seconds": self._last_write,
                }
            )
            self._pending = self._pool.submit(self._write, step, trees, deepcopy(state), best)
        self.waited_seconds += time.perf_counter() - begin

    def _write(
        self, step: int, trees: Trees, state: Mapping[str, Any], best: float | None
    ) -> float:
        begin = time.perf_counter()
        self._sync()
        save_checkpoint(self._folder, step, trees, state, self._keep, best)
        return time.perf_counter() - begin

    def wait(self) -> None:
        """Wait for the save under way, and take note if it failed."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        self._last_write = None
        with self._failures.watching(_WHAT):
            self._last_write = pending.result()
            self.num_saved += 1
            self.write_seconds += self._last_write

    def look(self) -> None:
        """Take note of a save that has failed meanwhile, without waiting for one that goes on."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def finish(self) -> None:
        """Wait for the save under way, as part of what training waits for."""
        begin = time.perf_counter()
        self.wait()
        self.waited_seconds += time.perf_counter() - begin

    def summary(self, seconds: float) -> dict[str, float]:
        """Return figures of this process for people.

        Args:
            seconds: wall time of training, for the share.
        """
        return {
            "saved": self.num_saved,
            "failed_writes": self._failures.num,
            "waited_seconds": round(self.waited_seconds, 4),
            "write_seconds": round(self.write_seconds, 4),
            "waited_share": round(self.waited_seconds / max(seconds, 1e-9), 6),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.wait()
        self._pool.shutdown()
