"""Reads a trace of the PyTorch profiler, piece by piece: its text may be larger than memory.

The format is Chrome's, as Kineto writes it: times in microseconds, one object per event. What the
report does not use is passed over while reading and never becomes an object of Python.
"""

import gc
import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import msgspec

from ispen_dist import ranges
from ispen_dist.recording.profiler import METADATA

NAME = re.compile(r"rank_(?P<rank>\d+)\.(?P<round>\d+)\.pt\.trace\.json(\.gz)?")
_WANTED = {
    "user_annotation", "cpu_op", "kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime",
    "cuda_driver", "cpu_instant_event",
}  # fmt: skip
PIECE_BYTES = 2**22
"""Of text that are read at a time."""

_TO_DO = "profile the run again with --profile.enabled=true"


class TraceError(ValueError):
    """A file that is no whole trace of a run; the message names it and says what to do."""


Args = TypedDict(
    "Args",
    {
        "Input Dims": list[Any],
        "Input type": list[Any],
        "correlation": int,
        "Device Type": int,
        "Device Id": int,
        "Total Allocated": int,
    },
    total=False,
)
"""Details of an event that are kept."""


class Event(msgspec.Struct, frozen=True, gc=False):
    """Something that happened: `begin` and `end` in seconds, equal for an instant."""

    name: str
    category: str
    begin: float
    end: float
    thread: int | str
    args: Args

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
        allocations: instants with `Total Allocated`.
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


@contextmanager
def no_search_for_cycles() -> Iterator[None]:
    """Pause Python's search for cycles of garbage.

    Events have none, and with a million of them in memory it takes longer than to read them.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_trace(path: Path) -> Trace:
    """Read a trace.

    Raises:
        TraceError: for a file that is empty, cut short, no trace, or of another program.
    """
    try:
        with _open(path) as file:
            trace = _read(path, file)
    except msgspec.ValidationError as error:
        raise TraceError(
            f"{path}: expected a trace of the PyTorch profiler, got JSON of another form: {error}; "
            f"{_TO_DO}"
        ) from error
    except (OSError, EOFError, zlib.error, msgspec.DecodeError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise TraceError(f"{path}: expected a whole trace, got: {reason}; {_TO_DO}") from error
    # A round that was interrupted is in the trace, but its time is not known.
    trace.rounds = sorted(trace.rounds, key=lambda e: e.begin)[: len(trace.seconds)]
    if not trace.rounds:
        raise TraceError(f"{path}: expected marked rounds in the trace, found none; {_TO_DO}")
    return trace


def _open(path: Path) -> BinaryIO:
    return gzip.open(path) if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _read(path: Path, file: BinaryIO) -> Trace:
    pieces = map(_decoder.decode, _pieces(file))
    first = next(pieces)
    trace = _begun(path, first)
    for piece in chain([first], pieces):
        for event in _wanted(piece):
            trace.add(event)
    return trace


# -- pieces of the text --------------------------------------------------------------------------


class _RawEvent(msgspec.Struct, gc=False):
    ph: str
    name: str
    ts: float
    cat: str = ""
    dur: float = 0.0
    tid: int | str = ""
    args: Args = {}


class _About(msgspec.Struct):
    rank: int
    last_round: int
    seconds: list[float]


class _Piece(msgspec.Struct):
    events: list[_RawEvent] = msgspec.field(name="traceEvents")
    about: _About | None = msgspec.field(name=METADATA, default=None)


_decoder = msgspec.json.Decoder(_Piece)
_BEGIN, _END = b'"traceEvents": [', b"\n  }"
"""Of all events and of one; a string has no line breaks, and what is inside an event stands deeper.
A file with other spaces is right too, but is one piece."""


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """Cut a trace after whole events into JSON objects of its own form."""
    text = b""
    while more := file.read(PIECE_BYTES):
        text += more
        begin, cut = text.find(_BEGIN), text.rfind(_END + b",")
        if 0 <= begin < cut:
            cut += len(_END)
            yield text[:cut] + b"]}"
            text = b"{" + _BEGIN + text[cut + 1 :]
    yield text


def _begun(path: Path, piece: _Piece) -> Trace:
    """Begin a trace by what the run said about it, which stands before the events."""
    about = piece.about
    if about is None:
        raise TraceError(
            f"{path}: expected a trace that ispen_dist wrote, got one without its entry "
            f'"{METADATA}"; {_TO_DO}'
        )
    return Trace(path, about.rank, about.last_round, about.seconds)


def _wanted(piece: _Piece) -> Iterator[Event]:
    for raw in piece.events:
        if raw.cat in _WANTED and raw.ph in ("X", "i"):
            begin = raw.ts * 1e-6
            yield Event(raw.name, raw.cat, begin, begin + raw.dur * 1e-6, raw.tid, raw.args)
