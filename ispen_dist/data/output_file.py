"""Output that is whole or not there, and output that is not read to its end."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; it takes the place of `path` when the block ends.

    If the block raises, what was written is removed and a file already at `path` stays as it was.
    Missing folders are made.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(f"{folder}/tags.txt") as partial:
        ...         _ = partial.write_text("N")
        ...     (Path(folder) / "tags.txt").read_text()
        'N'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield partial
        # Without this a power cut after the rename could leave an empty file.
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def standard_output() -> Iterator[None]:
    """Print in the block; that a pipe is not read to its end, as by `head`, is no error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # What is still buffered.
