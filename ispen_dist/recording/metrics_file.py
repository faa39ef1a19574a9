"""The metrics of a run, one JSON object a line, each step once however often the run resumed."""

import errno
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ispen_dist.data.output_file import replacing

Figure = float | int | str | bool | None | Sequence[float]


class MetricsFile:
    """Appends rows `{"step": 7, "phase": "train", ...}` and hands each to the system at once.

    The file is opened for every row: so a disk that has vanished is noticed, and one that came
    back is written to again. Rows that could not be written are kept and go before the next one.

    Args:
        path: of the file; its folder must exist.
        resume_step: the step of the checkpoint that is resumed; rows of later steps are dropped,
            because they will be written again. None starts a new file.

    Raises:
        ValueError: if a new file is wanted and one with rows is there, or if a row inside it is
            broken. A broken last row is what a kill leaves: it is dropped with a warning.
    """

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        self.path = path
        rows = read_metrics(path) if path.exists() else []
        if rows and resume_step is None:
            raise ValueError(
                f"{path}: expected no rows in a new run, got {len(rows)}; resume that run, or "
                "choose another run folder"
            )
        kept = [row for row in rows if resume_step is not None and row["step"] <= resume_step]
        _rewrite(path, kept)
        self._last_steps: dict[str, int] = {row["phase"]: row["step"] for row in kept}
        self._size, self._unwritten = path.stat().st_size, b""

    def write(self, step: int, phase: str, figures: Mapping[str, Figure]) -> None:
        """Append a row; NaN and infinity become null, since JSON has neither.

        Args:
            step: above that of the phase's previous row.
            phase: what the figures are of, such as train or dev.
            figures: values by name, written in this order.

        Raises:
            ValueError: if the step of the phase is already there, or a name is taken.
            OSError: if it cannot be written now; it will be with the next row.
        """
        last = self._last_steps.get(phase, -1)
        if step <= last:
            raise ValueError(
                f"{self.path}: expected a step above {last} for phase {phase}, got {step}; write "
                "each step of a phase once"
            )
        if taken := {"step", "phase"} & figures.keys():
            raise ValueError(f"{self.path}: figure {taken.pop()!r} has a reserved name; rename it")
        self._unwritten += _line({"step": step, "phase": phase, **figures}).encode("ascii")
        self._last_steps[phase] = step
        self._append()

    def _append(self) -> None:
        """Write what is not written yet; the end of the file is that of a row, or is made so."""
        with self.path.open("r+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            if size < self._size:
                raise OSError(errno.ESTALE, "rows that were written are gone", str(self.path))
            if size > self._size:
                # Half a row, of a write that failed.
                file.truncate(self._size)
                file.seek(self._size)
            rest = memoryview(self._unwritten)
            while rest:
                rest = rest[file.write(rest) :]
        self._size, self._unwritten = self._size + len(self._unwritten), b""

    def sync(self) -> None:
        """Write everything that `write` took through to the disk; from any thread."""
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())

    def close(self) -> None:
        """Write everything through to the disk."""
        self._append()
        self.sync()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics file, also of a run that is still going.

    Raises:
        ValueError: if a row before the last one is broken. A broken last row is left out with a
            warning.
    """
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_row(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(
                    f"{path}, line {number}: expected a metrics row, got {line[:60]!r} ({error}); "
                    "repair or delete the line"
                ) from error
            warnings.warn(f"{path}, line {number}: dropped a half-written last row", stacklevel=2)
    return rows


def _row(line: bytes) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("not an object")
    if type(row.get("step")) is not int or not isinstance(row.get("phase"), str):
        raise ValueError("no step or phase")
    return row


def _line(row: Mapping[str, Figure]) -> str:
    return json.dumps({k: _finite(v) for k, v in row.items()}, allow_nan=False) + "\n"


def _finite(value: Figure) -> Any:
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the file at once, so that a kill leaves the old one or the new one."""
    with replacing(path) as partial:
        partial.write_text("".join(map(_line, rows)), "ascii")
