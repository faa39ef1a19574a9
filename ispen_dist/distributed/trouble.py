"""What ranks do when one of them fails: say it once, end together, leave nobody waiting."""

import contextlib
import hashlib
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ispen_dist.distributed.session import Session
from ispen_dist.watchdog import write_prefixed

Result = TypeVar("Result")

PARTING_SECONDS = 5.0
"""How long rank 0, which may hold the store of the processes, waits for the others to report."""


class FailedElsewhere(RuntimeError):
    """Another rank failed where all had to succeed; its message is in the log."""


def together(
    session: Session, action: Callable[[], Result], expected: tuple[type[Exception], ...]
) -> Result:
    """Run something without collectives on every rank, and fail on all where it fails on one.

    Args:
        session: the processes.
        action: what to run, such as reading files.
        expected: errors that all ranks shall end with.

    Returns:
        What the action returned.

    Raises:
        FailedElsewhere: on the ranks where it succeeded.
    """
    error: Exception | None = None
    try:
        result = action()
    except expected as caught:
        error = caught
    (failed,) = session.largest([error is not None])
    if error is not None:
        raise error
    if failed:
        raise FailedElsewhere
    return result


def report(session: Session, error: Exception) -> None:
    """Print an error once, however many ranks have it, whichever they are.

    No collective: the other ranks may be in one, or gone. The first to count the message in the
    store of the processes prints it.
    """
    store: Any = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
    text = f"error: {error}"
    if store is None:
        print(text, file=sys.stderr)
        return
    try:
        is_first = store.add(f"ispen_dist/said/{hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
    except RuntimeError:  # The process with the store is gone.
        is_first = True
    if is_first:
        write_prefixed(text)
    with contextlib.suppress(RuntimeError):  # As above: then there is nobody to wait for.
        _part(session, store)


def _part(session: Session, store: Any) -> None:
    num_left = store.add("ispen_dist/left", 1)
    end = time.monotonic() + PARTING_SECONDS
    while session.is_main and num_left < session.num_ranks and time.monotonic() < end:
        time.sleep(0.05)
        num_left = store.add("ispen_dist/left", 0)
