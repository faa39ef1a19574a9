"""Every way in which a run ends: its exit code, on all ranks, with one message and in time."""

import json
import os
import re
import signal
import time

import pytest
import torch
from forks import Job
from labels import labels  # noqa: F401
from safetensors.torch import load_file

from ispen_dist.exits import Exit, table
from ispen_dist.stopping import Boundary, StopRequest
from ispen_dist.watchdog import FIRST_TIME, Watchdog


@pytest.fixture
def start(labels, tmp_path):  # noqa: F811
    """A function that starts ranks of a run in the folder `run`."""
    jobs = []

    def started(*flags, **settings):
        output = ["--config", labels, "--output", tmp_path / "run"]
        jobs.append(Job(tmp_path / f"job{len(jobs)}", *output, *flags, **settings))
        return jobs[-1]

    yield started
    for job in jobs:
        job.codes(timeout=0.0)


@pytest.mark.parametrize(
    ("flag", "plant", "message"),
    [
        ("--inner.stepz=3", "", "--inner.stepz: no such setting"),
        ("--data.dev=absent.npz", "", "absent.npz"),
        ("--train.seed=0", "no_file", "planted.npz: expected a file, found none"),
    ],
)
def test_settings_and_data_end_all_ranks_with_2_and_one_message(flag, plant, message, start):
    job = start(flag, plant=plant)
    assert job.codes(timeout=60.0) == [Exit.CONFIGURATION] * 2, job.text()
    assert "Traceback" not in job.text()
    assert job.text().count("error: ") == job.text().count(message) == 1, job.text()
    if plant:
        assert "[rank 1 on " in job.text()


def test_an_error_on_one_rank_ends_all_and_is_in_the_log(start):
    job = start(plant="error_in_round")
    codes = job.codes(timeout=60.0)
    assert codes[1] == 1, job.text()
    assert codes[0] not in (0, -signal.SIGKILL), job.text()
    assert "RuntimeError: planted: out of memory" in job.logs[1].read_text()


def test_a_hang_ends_all_ranks_with_4_and_the_stacks_of_all_threads(start, tmp_path):
    job = start("--train.hang_timeout=4", plant="sleeping_reader")
    job.wait_for("step 1/6")
    begin = time.monotonic()
    assert job.codes(timeout=60.0) == [Exit.HANG] * 2, job.text()
    assert time.monotonic() - begin < 30.0
    for rank, function in enumerate(("all_reduce", "plants.py")):
        log = job.logs[rank].read_text()
        assert f"[rank {rank} on " in log
        assert "no progress for" in log
        assert "raise train.hang_timeout" in log
        # The watchdog itself, and the thread that hangs.
        assert log.count("most recent call first") >= 2, log
        assert function in log, log
    # What torch knows of the collective that rank 0 waits in.
    assert re.search(r"gloo:all_reduce of \S+, not done", job.logs[0].read_text()), job.text()
    assert (tmp_path / "run" / "flight_record" / "rank_0").stat().st_size > 0


@pytest.mark.parametrize(
    ("number", "rank"),
    [
        (signal.SIGUSR1, 1),
        pytest.param(signal.SIGTERM, 0, marks=pytest.mark.thorough),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.thorough),
    ],
)
def test_a_signal_to_any_rank_saves_and_the_run_goes_on_as_undisturbed(
    number, rank, undisturbed, start, tmp_path
):
    job = start(*LONG)
    job.wait_for("step 10/")
    for _ in range(2):  # The second changes nothing.
        os.kill(job.processes[rank].pid, number)
        time.sleep(0.01)
    assert job.codes(timeout=60.0) == [Exit.REQUEUE] * 2, job.text()
    output = tmp_path / "run"
    marker = json.loads((output / "requeue.json").read_text())
    assert marker["reason"] == number.name
    assert 10 <= marker["round"] < NUM_ROUNDS
    assert f"stopped by {number.name} after round {marker['round']}" in job.text()
    assert ("press Ctrl-C again" in job.text()) == (number == signal.SIGINT)
    again = start(*LONG)
    assert again.codes() == [Exit.DONE] * 2, again.text()
    assert f"at round {marker['round']}" in again.text()
    assert not (output / "requeue.json").exists()
    state = final_state(output)
    assert state.keys() == undisturbed.keys()
    assert all(torch.equal(state[name], undisturbed[name]) for name in state)


NUM_ROUNDS = 40
LONG = [f"--train.max_outer_steps={NUM_ROUNDS - 2}", "--train.eval_every=50"]


@pytest.fixture(scope="module")
def undisturbed(labels, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("undisturbed")
    job = Job(folder, "--config", labels, "--output", folder / "run", *LONG)
    assert job.codes() == [Exit.DONE] * 2, job.text()
    return final_state(folder / "run")


def final_state(folder):
    files = (folder / "checkpoints" / f"step_{NUM_ROUNDS:08d}").glob("*.safetensors")
    return {f"{f.stem}/{k}": v for f in files for k, v in load_file(f).items()}


def test_a_second_interrupt_ends_at_once_and_its_echo_does_not(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = StopRequest()
    for seconds, expected in ((0.0, []), (0.5, []), (5.0, [130])):
        now[0] = 100.0 + seconds
        stop._handle(signal.SIGINT, None)
        assert ended == expected
    stop._handle(signal.SIGTERM, None)
    assert stop.signal == signal.SIGINT


def test_the_boundary_reduces_all_flags_in_one_collective():
    calls = []

    def largest(numbers):
        calls.append(list(numbers))
        return [max(n, 1) for n in numbers]

    boundary = Boundary(largest)
    boundary.add("stop", lambda: 15)
    boundary.add("other", lambda: False)
    assert boundary() == {"stop": 15, "other": 1}
    assert calls == [[15, 0]]


def test_the_first_of_a_kind_of_work_has_more_time(monkeypatch):
    watchdog = Watchdog(5.0)
    limits = []
    for work in ("step", "step", "save", "step", "save"):
        watchdog.beat(work)
        limits.append(watchdog._limit)
    assert limits == [FIRST_TIME, 5.0, FIRST_TIME, 5.0, 5.0]


def test_a_suspended_process_does_not_look_like_a_hang(monkeypatch):
    """An hour passes in one tick of the thread, as after SIGSTOP and SIGCONT."""
    watchdog, ended = Watchdog(10.0, poll=0.01), []
    watchdog.beat("step")
    watchdog.beat("step")
    monkeypatch.setattr(watchdog, "_end", lambda: ended.append(1))
    times = iter([0.0, 0.01, 3600.0, 3600.01])

    def monotonic():
        try:
            return next(times)
        except StopIteration:
            watchdog.stop()
            return 3600.02

    monkeypatch.setattr(time, "monotonic", monotonic)
    watchdog._watch()
    assert not ended


def test_the_table_has_every_code():
    lines = table().splitlines()
    assert [int(line.split()[0]) for line in lines] == [0, 2, 3, 4, 5, 75]
