"""What torch remembers of the last collectives, for the log of a process that hangs.

Since 2.8 gloo is recorded like nccl, in one ring buffer in main memory; the functions that read it
are private and were renamed once, hence the look-up. Of a gloo collective torch notes when it was
issued and not when it started, so "scheduled" stands for running as well.
"""

import json
import os
from pathlib import Path
from typing import Any

from torch._C import _distributed_c10d

NUM_SHOWN = 5
"""Newest collectives in the log; the file has all."""


def keep_collectives(number: int = 2000) -> None:
    """Have torch remember collectives, unless the environment says how many."""
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # the name before TORCH_FR_BUFFER_SIZE
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(number))


class FlightRecord:
    """The collectives of this process.

    Attributes:
        folder: where `describe` also writes the record, for torch's analyser `torchfrtrace`; None
            writes nothing.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.folder: Path | None = None

    def describe(self) -> str:
        """Return the newest collectives in lines, and write the record."""
        read = _function("json")
        if read is None:
            return "collectives: this version of torch keeps no record"
        record = json.loads(read())
        entries = record.get("entries", [])
        if not entries:
            return "collectives: none recorded"
        lines = [f"collectives, newest last, of {len(entries)} recorded:"]
        status = record.get("pg_status", {})
        lines += [_line(entry, status) for entry in entries[-NUM_SHOWN:]]
        return "\n".join([*lines, *self._write()])

    def _write(self) -> list[str]:
        dump = _function("pickle")
        if self.folder is None or dump is None:
            return []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / f"rank_{self._rank}").write_bytes(dump())
        except OSError as error:
            return [f"their record could not be written: {error}"]
        return [f"all of them: torchfrtrace --prefix rank_ {self.folder}"]


def _function(form: str) -> Any:
    suffix = "_json" if form == "json" else ""
    names = (f"_dump_{kind}_trace{suffix}" for kind in ("fr", "nccl"))
    return next(
        (getattr(_distributed_c10d, n) for n in names if hasattr(_distributed_c10d, n)), None
    )


def _line(entry: dict[str, Any], status: dict[str, dict[str, str]]) -> str:
    sizes = ", ".join("x".join(map(str, shape)) or "()" for shape in entry.get("input_sizes", []))
    number = entry.get("collective_seq_id", 0)
    # Not the entry's own "retired": some that gloo has finished lack it.
    done = int(status.get(str(entry.get("pg_id")), {}).get("last_completed_collective", -1))
    state = "done" if number <= done else f"not done ({entry.get('state', '?')})"
    return f"  {number}: {entry.get('profiling_name', '?')} of {sizes or 'nothing'}, {state}"
