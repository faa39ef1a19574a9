"""The record of collectives: what a process that hangs says of what it waits for."""

import json
import threading

from torch._C import _distributed_c10d

from ispen_dist import watchdog
from ispen_dist.distributed.flight_record import FlightRecord
from ispen_dist.watchdog import Watchdog

RECORD = {
    "entries": [
        {"collective_seq_id": n, "input_sizes": [[5, 2]], "pg_id": 0,
         "profiling_name": "gloo:all_reduce", "state": "scheduled"} for n in (1, 2)
    ],
    "pg_status": {"0": {"last_completed_collective": "1"}},
}  # fmt: skip


def test_the_record_names_the_collective_that_is_under_way(tmp_path, monkeypatch):
    monkeypatch.setattr(
        _distributed_c10d, "_dump_fr_trace_json", lambda: json.dumps(RECORD), raising=False
    )
    monkeypatch.setattr(_distributed_c10d, "_dump_fr_trace", lambda: b"pickled", raising=False)
    record = FlightRecord(1)
    record.folder = tmp_path / "flight_record"
    lines = record.describe().splitlines()
    assert lines[1:3] == [
        "  1: gloo:all_reduce of 5x2, done",
        "  2: gloo:all_reduce of 5x2, not done (scheduled)",
    ]
    assert (tmp_path / "flight_record" / "rank_1").read_bytes() == b"pickled"


def test_a_torch_without_a_record_says_so(monkeypatch):
    for kind in ("fr", "nccl"):
        monkeypatch.delattr(_distributed_c10d, f"_dump_{kind}_trace_json", raising=False)
    assert "keeps no record" in FlightRecord(0).describe()


def test_details_that_never_come_do_not_keep_a_hanging_process(monkeypatch, capfd):
    monkeypatch.setattr(watchdog, "DETAILS_SECONDS", 0.05)
    watching = Watchdog(1.0)
    never = threading.Event()
    watching.details = lambda: str(never.wait(20.0))
    watching.report()
    never.set()
    assert "no progress for" in capfd.readouterr().err
