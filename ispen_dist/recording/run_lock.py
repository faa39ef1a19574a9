"""One writer at a time in a run folder, by a lock that vanishes with its process."""

import contextlib
import fcntl
import json
import os
import socket
import warnings
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from ispen_dist.config import ConfigError

_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID")


class RunLock:
    """Holds a run folder for this process until it ends, even by SIGKILL.

    The system holds the lock on the open file `.lock`, whose content says who: it outlives the
    holder and means nothing without the lock.

    Args:
        output: the run folder; made if missing.
        flag: of the command that names it, for messages.
    """

    def __init__(self, output: Path, flag: str = "--output") -> None:
        self._output, self._flag = output, flag
        self._descriptor: int | None = None

    def take(self) -> None:
        """Take the lock.

        Raises:
            ConfigError: where another process has it, or the folder cannot be written.
        """
        try:
            self._output.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._output / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{self._flag} {self._output}: expected a folder that can be written, got "
                f"{error.strerror}; choose another folder or make it writable"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = _read(descriptor)
            os.close(descriptor)
            raise ConfigError(
                f"{self._flag} {self._output}: expected a folder that no other run writes to, "
                f"found one held by {held}; wait for it to end, stop it, or choose another folder"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{self._output}: this file system has no locks ({error.strerror}): see that no "
                "other run writes there",
                stacklevel=2,
            )
        # A bare descriptor, which stays open however this object is dropped.
        self._descriptor = descriptor
        with contextlib.suppress(OSError):
            _write(descriptor, _holder())

    def release(self) -> None:
        """Give the folder free before the process ends."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _holder(environment: Mapping[str, str] = os.environ) -> dict[str, str | int]:
    jobs = (environment[name] for name in _JOB_VARIABLES if environment.get(name))
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": next(jobs, "none"),
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
    }


def _write(descriptor: int, holder: Mapping[str, str | int]) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(holder) + "\n").encode("ascii"), 0)


def _read(descriptor: int) -> str:
    """Return who holds the lock in words; there is a moment between taking it and saying so."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return "process {pid} on {host}, job {job}, since {since}".format(**holder)
    except (ValueError, KeyError, TypeError):
        return "a process that has not said which it is"
