"""Reads a trace of the PyTorch profiler, event by event: a trace may be larger than memory.

The format is Chrome's, as Kineto writes it: times in microseconds, one object per event.
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from ispen_dist import ranges
from ispen_dist.recording.profiler import METADATA

NAME = re.compile(r"rank_(?P<rank>\d+)\.(?P<round>\d+)\.pt\.trace\.json(\.gz)?")
_WANTED = {
    "user_annotation", "cpu_op", "kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime",
    "cuda_driver", "cpu_instant_event",
}  # fmt: skip
_TO_DO = "profile the run again with --profile.enabled=true"


class TraceError(ValueError):
    """A file that is no whole trace of a run; the message names it and says what to do."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened: `begin` and `end` in seconds, equal for an instant."""

    name: str
    category: str
    begin: float
    end: float
    thread: Any
    args: dict[str, Any]

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.begin


@dataclass
class Trace:
    """One recording of one rank.

    Attributes:
        path: of the file.
        rank: that recorded it.
        last_round: of the run that it holds.
        seconds: of every round, by the clock of the run and not by the trace.
        rounds: their events, as the profiler marked them.
        ranges: of `ispen_dist.ranges`, on the thread of the rounds.
        operators: PyTorch operators, any thread.
        collectives: as the library of the collectives saw them, from start to end.
        kernels: and copies on a GPU.
        launches: on the CPU, by the number that the kernel carries too.
        allocations: instants with `Bytes` and `Total Allocated`.
    """

    path: Path
    rank: int
    last_round: int
    seconds: list[float]
    rounds: list[Event] = field(default_factory=list)
    ranges: list[Event] = field(default_factory=list)
    operators: list[Event] = field(default_factory=list)
    collectives: list[Event] = field(default_factory=list)
    kernels: list[Event] = field(default_factory=list)
    launches: dict[int, Event] = field(default_factory=dict)
    allocations: list[Event] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Put an event where it belongs."""
        name = event.name
        if event.category == "user_annotation":
            if name.startswith("ProfilerStep#"):
                self.rounds.append(event)
            elif name in ranges.NAMES:
                self.ranges.append(event)
            elif name.startswith(("gloo:", "nccl:")):
                self.collectives.append(event)
        elif event.category == "cpu_op":
            self.operators.append(event)
        elif event.category in ("kernel", "gpu_memcpy", "gpu_memset"):
            self.kernels.append(event)
            if "nccl" in name.lower():
                self.collectives.append(event)
        elif event.category == "cpu_instant_event":
            if name == "[memory]":
                self.allocations.append(event)
        elif "correlation" in event.args:
            self.launches[event.args["correlation"]] = event


def find_traces(folder: Path) -> list[Path]:
    """Return the newest recording of a run folder, one trace per rank in order.

    Raises:
        TraceError: if there is none.
    """
    found = [(m, p) for p in (folder / "profile").glob("*") if (m := NAME.fullmatch(p.name))]
    if not found:
        raise TraceError(
            f"{folder / 'profile'}: expected traces rank_N.ROUND.pt.trace.json.gz, found none; "
            f"{_TO_DO}"
        )
    newest = max(int(m["round"]) for m, _ in found)
    return [
        p for m, p in sorted(found, key=lambda f: int(f[0]["rank"])) if int(m["round"]) == newest
    ]


def read_trace(path: Path) -> Trace:
    """Read a trace.

    Raises:
        TraceError: for a file that is empty, cut short, no trace, or of another program.
    """
    try:
        about = _about(path)
        trace = Trace(path, about["rank"], about["last_round"], about["seconds"])
        for event in _events(path):
            trace.add(event)
    except (OSError, EOFError, zlib.error, ijson.JSONError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise TraceError(f"{path}: expected a whole trace, got: {reason}; {_TO_DO}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise TraceError(
            f"{path}: expected a trace of the PyTorch profiler, got JSON of another form "
            f"({type(error).__name__}: {error}); {_TO_DO}"
        ) from error
    # A round that was interrupted is in the trace, but its time is not known.
    trace.rounds = sorted(trace.rounds, key=lambda e: e.begin)[: len(trace.seconds)]
    if not trace.rounds:
        raise TraceError(f"{path}: expected marked rounds in the trace, found none; {_TO_DO}")
    return trace


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _about(path: Path) -> dict[str, Any]:
    """Return what the run said about the trace; it stands before the events."""
    with _open(path) as file:
        for prefix, kind, _ in ijson.parse(file):
            if prefix == METADATA and kind == "start_map":
                break
            if prefix == "traceEvents":
                raise TraceError(
                    f"{path}: expected a trace that ispen_dist wrote, got one without its entry "
                    f'"{METADATA}"; {_TO_DO}'
                )
    with _open(path) as file:
        return next(ijson.items(file, METADATA, use_float=True), {})


def _events(path: Path) -> Iterator[Event]:
    with _open(path) as file:
        for event in ijson.items(file, "traceEvents.item", use_float=True):
            if event.get("cat") not in _WANTED or event["ph"] not in ("X", "i"):
                continue
            begin = event["ts"] * 1e-6
            end = begin + event.get("dur", 0.0) * 1e-6
            args = event.get("args", {})
            yield Event(event["name"], event["cat"], begin, end, event["tid"], args)
