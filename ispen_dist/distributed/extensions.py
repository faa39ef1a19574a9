"""DeepSpeed's compiled operators: a folder of their own, and locks that killed compilers left.

A process that compiles holds `NAME/lock` open until it is done. One that is killed meanwhile leaves
the file, and every later start waits for it without a word. The system tells who has a file open,
so a lock that nobody has is removed, however young it is.
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from ispen_dist.config import ConfigError

STALE_SECONDS = 600.0
"""Age at which a lock is taken for left behind where it cannot be seen who holds it; compiling
takes under a minute."""
_PAUSE_SECONDS = 0.5


def check_extensions(now: float | None = None) -> None:
    """Give DeepSpeed's compiled operators a folder of their own, and clear it of stale locks.

    In a folder given by `TORCH_EXTENSIONS_DIR`, which other machines may share, a lock that nobody
    holds here is left alone while it is young, and named when it is old.

    Raises:
        ConfigError: for such an old lock, naming it.
    """
    own = "TORCH_EXTENSIONS_DIR" not in os.environ
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_own_folder())))
    if not any(folder.glob("*/lock")):
        return
    with _alone(folder):
        for lock in folder.glob("*/lock"):
            if _is_left_behind(lock):
                _clear(lock, own, time.time() if now is None else now)


def _own_folder() -> Path:
    # One folder per installation: two would rebuild each other's operators, at the same time even.
    # And one per machine: operators are compiled for its processor, and only its own processes can
    # be asked what they hold.
    names = f"{sys.prefix} {torch.__version__} {platform.node()}"
    installation = hashlib.sha256(names.encode()).hexdigest()[:12]
    return Path.home() / ".cache" / "ispen_dist" / f"torch_extensions_{installation}"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process look at a time: none must remove a lock that another has just taken."""
    with (folder / ".check").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_left_behind(lock: Path) -> bool:
    """Whether nobody holds a lock, at two looks: a compiler closes it just before it removes it."""
    if _is_held(lock):
        return False
    time.sleep(_PAUSE_SECONDS)
    return lock.exists() and not _is_held(lock)


def _is_held(lock: Path) -> bool:
    """Whether a process of this machine has a lock open, or works in its folder.

    The second is a build that outlives the process that began it.
    """
    file, folder = str(lock.resolve()), str(lock.parent.resolve())
    for process in psutil.process_iter():
        # Processes end while one looks, and those of other users are closed.
        with contextlib.suppress(psutil.Error):
            if process.cwd() == folder or file in (f.path for f in process.open_files()):
                return True
    return False


def _clear(lock: Path, own: bool, now: float) -> None:
    age = now - lock.stat().st_mtime
    if own:
        lock.unlink(missing_ok=True)
        print(
            f"{lock}: removed, left {age:.0f} s ago by a process that was killed while it compiled",
            file=sys.stderr,
        )
    elif age > STALE_SECONDS:
        raise ConfigError(
            f"{lock}: expected no lock, found one {age / 60:.0f} minutes old, left by a process "
            "that was killed while it compiled; delete it if none is compiling now"
        )
