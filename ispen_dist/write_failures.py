"""Writes that failed, and what follows: the disk is full, read-only or gone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal


class StorageFailed(RuntimeError):
    """The run ended, on all ranks, because what it leaves could not be written."""


class WriteFailures:
    """Counts failed writes and knows what is still not written.

    Under `stop` a run ends at the next round: what it computes from there on could be lost. Under
    `continue` it warns and tries again with the next write of the same kind; what is still missing
    when the run is over makes it fail then. One process writes, so the others have to be told
    `must_stop`.

    Args:
        on_error: `stop` or `continue`.
        warn: takes a line for people.

    Attributes:
        num: failed writes so far.
        unwritten: why, by what is not on the disk as it should be.

    Example:
        >>> failures = WriteFailures("stop", print)
        >>> with failures.watching("summary.json"):
        ...     raise OSError(28, "No space left on device")
        warning: summary.json: expected to be written, got [Errno 28] No space left on device; \
free space or make the folder writable, the run stops
        >>> failures.must_stop
        1
    """

    def __init__(self, on_error: Literal["stop", "continue"], warn: Callable[[str], None]) -> None:
        self._stops, self._warn = on_error == "stop", warn
        self.num = 0
        self.unwritten: dict[str, str] = {}

    @property
    def must_stop(self) -> int:
        """1 if the run must end now, otherwise 0: a number, to be sent to other ranks."""
        return int(self._stops and bool(self.unwritten))

    @contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """Take note of an `OSError` in the block in place of raising it.

        Args:
            what: is written; a block without an error ends earlier failures of the same.
        """
        try:
            yield
        except OSError as error:
            self._note(what, error)
        else:
            if self.unwritten.pop(what, None) is not None:
                self._warn(f"{what}: written again")

    def _note(self, what: str, error: OSError) -> None:
        self.num += 1
        # Once: a full disk fails every round, and a log full of it hides everything else.
        if what not in self.unwritten:
            follows = "the run stops" if self._stops else "the run goes on and tries again"
            self._warn(
                f"warning: {what}: expected to be written, got {error}; free space or make the "
                f"folder writable, {follows}"
            )
        self.unwritten[what] = str(error)

    def error(self) -> StorageFailed:
        """Return the error that ends the run; on a rank that does not write it names none."""
        missing = "; ".join(f"{what}: {why}" for what, why in self.unwritten.items())
        return StorageFailed(
            f"expected everything to be written, got {missing or 'a failure on rank 0'}; free "
            "space or make the folder writable, then start again with --resume auto, which goes "
            "on from the last good checkpoint"
        )
