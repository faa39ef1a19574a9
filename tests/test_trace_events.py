"""Reading a trace piece by piece, and arithmetic of intervals against a slow rule."""

import gc
import gzip
import json
import random
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from torch.profiler import profile, record_function

sys.path.append(str(Path(__file__).parent.parent / "profiling"))

import phases
import trace_events
from profiler_overhead import without_batches
from trace_events import Event, TraceError, no_search_for_cycles, read_trace

ABOUT = {"rank": 3, "last_round": 9, "seconds": [0.5]}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A trace as the recorder of PyTorch writes it, and the same as JSON."""
    path = tmp_path_factory.mktemp("trace") / "rank_3.9.pt.trace.json"
    with profile(record_shapes=True, profile_memory=True) as recorder:
        recorder.add_metadata_json("ispen_dist", json.dumps(ABOUT))
        with record_function("ProfilerStep#9"):
            for _ in range(20):
                with record_function("product"):
                    sum(range(100))
    recorder.export_chrome_trace(str(path))
    return path, json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize("size", [1, 50, 777, 10**9])
def test_a_trace_is_the_same_in_pieces_of_any_size(size, written, monkeypatch):
    monkeypatch.setattr(trace_events, "PIECE_BYTES", size)
    path, whole = written
    trace = read_trace(path)
    assert (trace.rank, trace.last_round, trace.seconds) == (3, 9, [0.5])
    expected = [e for e in whole["traceEvents"] if e["name"] == "product"]
    assert len(expected) == 20
    assert [(e.begin, e.thread) for e in trace.ranges] == [
        (e["ts"] * 1e-6, e["tid"]) for e in expected
    ]
    assert all(e.end - e.begin == pytest.approx(e.seconds) for e in trace.ranges)


def test_a_piece_holds_whole_events_only(written, monkeypatch):
    monkeypatch.setattr(trace_events, "PIECE_BYTES", 777)
    path, whole = written
    with path.open("rb") as file:
        pieces = [json.loads(text)["traceEvents"] for text in trace_events._pieces(file)]
    assert len(pieces) > 5
    assert [event for piece in pieces for event in piece] == whole["traceEvents"]


@pytest.mark.parametrize("indent", [None, 1, 2, 4])
def test_a_trace_with_other_spaces_is_read_too(indent, written, tmp_path, monkeypatch):
    monkeypatch.setattr(trace_events, "PIECE_BYTES", 1000)
    path, whole = written
    other = tmp_path / f"{path.name}.gz"
    other.write_bytes(gzip.compress(json.dumps(whole, indent=indent).encode()))
    assert read_trace(other).ranges == read_trace(path).ranges


def test_a_trace_of_another_program_says_so(written, tmp_path):
    path, whole = written
    other = tmp_path / path.name
    other.write_text(json.dumps({k: v for k, v in whole.items() if k != "ispen_dist"}))
    with pytest.raises(TraceError, match="without its entry"):
        read_trace(other)


def test_the_search_for_cycles_goes_on_afterwards():
    seen = []

    def fail():
        seen.append(gc.isenabled())
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"), no_search_for_cycles():
        fail()
    assert [*seen, gc.isenabled()] == [False, True]


@pytest.mark.parametrize("seed", range(5))
def test_intervals_hold_the_moments_that_they_should(seed):
    """Whole numbers as bounds, so that moments between them can be counted."""
    draw = random.Random(seed)
    events = []
    for _ in range(30):
        begin = draw.randrange(60)
        events.append(Event("e", "cpu_op", begin, begin + draw.randrange(4), 1, {}))
    spans = [(3.0, 20.0), (25.0, 50.0)]
    found = phases.union(phases._clipped(events, spans))
    covered = {
        t for e in events for t in range(e.begin, e.end) if any(a <= t < b for a, b in spans)
    }
    assert {t for a, b in found for t in range(int(a), int(b))} == covered
    assert phases.length(found) == len(covered)
    assert all(a[1] < b[0] for a, b in pairwise(found))
    assert phases._clipped([], spans) == phases.union([]) == []


def test_the_cost_of_recording_is_free_of_the_batches():
    """The third round of a cycle is 5 times the first by its batch, and recording doubles it."""
    plain = [1.0, 9.0, 5.0, 2.0, 9.0, 10.0]
    run = [1.5, 9.0, 15.0, 3.0, 9.0, 30.0]  # on a slower machine
    assert without_batches(run, plain) == [2.0, 2.0]
