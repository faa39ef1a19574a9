"""Where the time of a trace goes: every moment of a round belongs to exactly one phase.

A phase is the innermost range at a moment, so a `product` inside `solve` counts as product; what no
range covers is `other`. The phases of a round therefore add up to the round.
"""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from operator_costs import input_bytes, leaves, matrix_product_flops
from trace_events import Event, Trace

from ispen_dist import ranges

OTHER = "other"


class Timeline:
    """The phase at every moment of a thread.

    Args:
        events: ranges of one thread, properly nested.
        rounds: the spans that are looked at.
    """

    def __init__(self, events: Sequence[Event], rounds: Sequence[Event]) -> None:
        self._times: list[float] = []
        self._phases: list[str] = []
        self.rounds = sorted(rounds, key=lambda e: e.begin)
        stack: list[Event] = []
        for event in sorted(events, key=lambda e: (e.begin, -e.end)):
            self._leave(stack, event.begin)
            stack.append(event)
            self._turn(event.begin, event.name)
        self._leave(stack, float("inf"))

    def _leave(self, stack: list[Event], time: float) -> None:
        """End the ranges that are over at a time, innermost first."""
        while stack and stack[-1].end <= time:
            end = stack.pop().end
            self._turn(end, stack[-1].name if stack else OTHER)

    def _turn(self, time: float, phase: str) -> None:
        self._times.append(time)
        self._phases.append(phase)

    def at(self, time: float) -> str:
        """Return the phase at a time."""
        place = bisect_right(self._times, time) - 1
        return self._phases[place] if place >= 0 else OTHER

    def pieces(self) -> list[tuple[float, float, str]]:
        """Return (begin, end, phase) of all rounds, in order and without gaps within a round."""
        pieces = []
        for span in self.rounds:
            first = bisect_right(self._times, span.begin)
            last = bisect_right(self._times, span.end)
            cuts = [span.begin, *self._times[first:last], span.end]
            names = [self.at(span.begin), *self._phases[first:last]]
            pieces += [
                (a, b, name) for (a, b), name in zip(pairwise(cuts), names, strict=True) if b > a
            ]
        return pieces


@dataclass
class Breakdown:
    """What one rank did in the rounds of a trace; seconds are sums over the rounds.

    Attributes:
        rank: that recorded it.
        num_rounds: in the trace.
        wall: seconds of the rounds by the clock of the run.
        phases: seconds by phase; they add up to the rounds in the trace.
        calls: ranges by name.
        device: seconds of kernels by the phase that launched them; empty without a GPU.
        peaks: largest number of allocated bytes by phase, above the first one seen.
        communication: seconds in which a collective was under way.
        exposed: of these, seconds in which nothing was computed meanwhile.
        idle: seconds without an operator (CPU) or a kernel (GPU) at work, and without a collective.
        flops: of matrix products, where shapes were recorded.
        read_bytes: inputs of operators, where shapes were recorded: less than what is moved.
        pieces: (begin, end, phase) from the first round on, for the picture.
    """

    rank: int
    num_rounds: int
    wall: float
    phases: dict[str, float] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    device: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    communication: float = 0.0
    exposed: float = 0.0
    idle: float = 0.0
    flops: float = 0.0
    read_bytes: float = 0.0
    pieces: list[tuple[float, float, str]] = field(default_factory=list)

    @property
    def traced(self) -> float:
        """Seconds of all phases."""
        return sum(self.phases.values())

    @property
    def products_per_outer_step(self) -> float:
        """Products with the curvature per outer step; 0 without outer steps."""
        return self.calls["product"] / max(self.calls["outer step"], 1)


def break_down(trace: Trace) -> Breakdown:
    """Attribute the time, memory and arithmetic of a trace to phases."""
    thread = trace.rounds[0].thread
    timeline = Timeline([e for e in trace.ranges if e.thread == thread], trace.rounds)
    result = Breakdown(trace.rank, len(trace.rounds), sum(trace.seconds))
    result.pieces = timeline.pieces()
    phases: defaultdict[str, float] = defaultdict(float)
    for begin, end, phase in result.pieces:
        phases[phase] += end - begin
    result.phases = dict(sorted(phases.items(), key=lambda item: -item[1]))
    spans = [(e.begin, e.end) for e in timeline.rounds]
    result.calls = Counter(e.name for e in trace.ranges if _inside(e, spans))
    result.device = _device_seconds(trace, timeline, spans)
    result.peaks = _peaks(trace, timeline)
    _overlap(trace, spans, result)
    operators = [e for e in trace.operators if _inside(e, spans)]
    result.flops = sum(map(matrix_product_flops, operators))
    result.read_bytes = sum(map(input_bytes, leaves(operators)))
    return result


def _inside(event: Event, spans: Sequence[tuple[float, float]]) -> bool:
    place = bisect_right(spans, (event.begin, float("inf"))) - 1
    return place >= 0 and event.begin < spans[place][1]


def _device_seconds(
    trace: Trace, timeline: Timeline, spans: Sequence[tuple[float, float]]
) -> dict[str, float]:
    seconds: defaultdict[str, float] = defaultdict(float)
    for kernel in trace.kernels:
        launch = trace.launches.get(kernel.args.get("correlation", -1))
        if launch is not None and _inside(launch, spans):
            seconds[timeline.at(launch.begin)] += kernel.seconds
    return dict(seconds)


def _peaks(trace: Trace, timeline: Timeline) -> dict[str, int]:
    """Return peaks of the device that holds most: torch counts what it saw from the first on."""
    by_device: defaultdict[tuple[int, int], list[Event]] = defaultdict(list)
    for event in trace.allocations:
        by_device[event.args.get("Device Type", 0), event.args.get("Device Id", -1)].append(event)
    if not by_device:
        return {}
    # On a GPU (type 1) its memory is what is scarce.
    events = by_device[max(by_device, key=lambda d: (d[0] == 1, len(by_device[d])))]
    peaks: dict[str, int] = {}
    for event in events:
        phase = timeline.at(event.begin)
        peaks[phase] = max(peaks.get(phase, 0), int(event.args.get("Total Allocated", 0)))
    return peaks


def _overlap(trace: Trace, spans: Sequence[tuple[float, float]], result: Breakdown) -> None:
    """Enter communication, how much of it is exposed, and idle time."""
    device = {id(e) for e in trace.kernels}
    on_gpu = bool(trace.kernels)
    moving = [e for e in trace.collectives if (id(e) in device) == on_gpu]
    collective = union(_clipped(moving, spans))
    if on_gpu:
        moved = {id(e) for e in moving}
        working = union(_clipped([e for e in trace.kernels if id(e) not in moved], spans))
    else:
        # Inside these ranges the thread waits, although an operator is open.
        waits = union(_clipped([e for e in trace.ranges if e.name in ranges.COLLECTIVES], spans))
        working = without(union(_clipped(trace.operators, spans)), waits)
        collective = union([*collective, *waits])
    result.communication = length(collective)
    result.exposed = length(without(collective, working))
    result.idle = sum(b - a for a, b in spans) - length(union([*collective, *working]))


# -- sets of intervals ---------------------------------------------------------------------------

Interval = tuple[float, float]


def _clipped(events: Sequence[Event], spans: Sequence[Interval]) -> list[Interval]:
    """Return the parts of events inside the spans, span by span."""
    begins = np.array([e.begin for e in events])
    ends = np.array([e.end for e in events])
    result: list[Interval] = []
    for begin, end in spans:
        inside = (np.maximum(begins, begin), np.minimum(ends, end))
        kept = inside[0] < inside[1]
        result += zip(*(side[kept].tolist() for side in inside), strict=True)
    return result


def union(intervals: Sequence[Interval]) -> list[Interval]:
    """Return the same moments as disjoint intervals in order."""
    if not intervals:
        return []
    ordered = np.array(intervals)
    begins, ends = ordered[np.argsort(ordered[:, 0])].T
    # An interval stands alone if it begins after the end of all before it.
    reached = np.maximum.accumulate(ends)
    alone = begins[1:] > reached[:-1]
    firsts, lasts = np.append(True, alone), np.append(alone, True)
    return list(zip(begins[firsts].tolist(), reached[lasts].tolist(), strict=True))


def without(intervals: Sequence[Interval], taken: Sequence[Interval]) -> list[Interval]:
    """Return the moments of disjoint intervals that others, disjoint too, do not cover."""
    result: list[Interval] = []
    place = 0
    for begin, end in intervals:
        while place < len(taken) and taken[place][1] <= begin:
            place += 1
        at = begin
        for a, b in taken[place:]:
            if a >= end:
                break
            if a > at:
                result.append((at, a))
            at = max(at, b)
        if at < end:
            result.append((at, end))
    return result


def length(intervals: Sequence[Interval]) -> float:
    """Return the measure of disjoint intervals."""
    return sum(b - a for a, b in intervals)
