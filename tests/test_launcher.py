"""Under accelerate launch: what its elastic agent passes on, and that no process is left behind."""

import json
import signal

import pytest
from labels import labels  # noqa: F401
from launched import Launched

from ispen_dist.exits import Exit

LONG = ("--train.max_outer_steps=100000", "--train.eval_every=100000")


@pytest.fixture
def launch(labels, tmp_path):  # noqa: F811
    """A function that starts two ranks of a run in the folder `run`."""
    jobs = []

    def launched(*flags, **environment):
        output = ["--config", labels, "--output", tmp_path / "run"]
        jobs.append(Launched(tmp_path, *output, *flags, **environment))
        return jobs[-1]

    yield launched
    for job in jobs:
        job.kill()


@pytest.fixture
def running(launch):
    """A function that starts a run without end and returns when it is under way."""

    def started(*flags, **environment):
        job = launch(*LONG, *flags, **environment)
        job.wait_for("step 10/")
        return job

    return started


def assert_saved(run, reason):
    marker = json.loads((run / "requeue.json").read_text())
    assert marker["reason"] == reason
    assert (run / "checkpoints" / f"step_{marker['round']:08d}").is_dir()


def test_a_launcher_that_dies_of_a_signal_leaves_saved_workers_and_no_process(running, tmp_path):
    job = running()
    job.launcher.send_signal(signal.SIGUSR1)
    assert job.code(60.0) == -signal.SIGUSR1
    assert_saved(tmp_path / "run", "SIGTERM")


@pytest.mark.thorough
def test_sigterm_to_the_launcher_saves_and_leaves_no_process(running, tmp_path):
    job = running()
    job.launcher.send_signal(signal.SIGTERM)
    assert job.code(60.0) != 0
    assert_saved(tmp_path / "run", "SIGTERM")


@pytest.mark.thorough
def test_a_rank_that_stands_still_ends_the_job(running):
    job = running("--train.hang_timeout=4", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3")
    job.send(signal.SIGSTOP, 1)
    assert job.code(60.0) == 1
    log = job.text()
    assert "[rank 0 on " in log
    assert "no progress for" in log
    assert f"exitcode  : {Exit.HANG.value}" in log, log


def test_a_killed_rank_takes_the_others_with_it(running, tmp_path):
    job = running()
    job.send(signal.SIGKILL, 1)
    assert job.code(60.0) == 1
    assert "exitcode  : -9" in job.text(), job.text()
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        pytest.param(
            ("--data.dev=absent.npz",), Exit.CONFIGURATION, "absent.npz",
            marks=pytest.mark.thorough,
        ),
        # Steps of this size overflow.
        (
            ("--inner.optimizer.learning_rate=1e30", "--train.on_not_finite=stop"),
            Exit.NOT_FINITE, "train.on_not_finite=stop",
        ),
    ],
)  # fmt: skip
def test_an_error_of_all_ranks_leaves_no_process(flags, code, words, launch, tmp_path):
    job = launch(*flags)
    assert job.code(180.0) == 1, job.text()
    assert f"exitcode  : {code.value}" in job.text(), job.text()
    assert job.text().count(words) == 1, job.text()
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.thorough
def test_a_normal_end_leaves_no_process(launch, tmp_path):
    job = launch()
    assert job.code(180.0) == Exit.DONE, job.text()
    assert (tmp_path / "run" / "summary.json").exists()
