"""Under accelerate launch: what its elastic agent passes on, and that no process is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from forks import TRAIN
from labels import labels  # noqa: F401

from ispen_dist.exits import Exit

LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    "--main_process_port", "0", str(TRAIN),
]  # fmt: skip


class Launched:
    """A job with its launcher; workers have sessions of their own, so a variable marks them."""

    def __init__(self, log, *arguments, **environment):
        self.log, self._mark = log, f"PROCESSES_OF={uuid.uuid4()}".encode()
        name, _, value = self._mark.decode().partition("=")
        own = os.environ | {"OMP_NUM_THREADS": "1", name: value} | environment
        with log.open("wb") as file:
            self.launcher = subprocess.Popen(
                [*LAUNCH, *map(str, arguments)], stdout=file, stderr=file, env=own
            )

    def pids(self):
        """Return the processes that are alive, the launcher's first."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                marked = self._mark in (folder / "environ").read_bytes()
                if marked and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append(int(folder.name))
            except OSError:
                continue
        return sorted(found)

    def workers(self):
        """Return the processes that run train.py, by rank."""
        ranks = {}
        for pid in self.pids():
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            ranks |= {int(v[5:]): pid for v in variables if v.startswith(b"RANK=")}
        return [ranks[rank] for rank in sorted(ranks)]

    def wait_for(self, words, seconds=120.0):
        end = time.monotonic() + seconds
        while words not in self.log.read_text():
            assert time.monotonic() < end, self.log.read_text()
            assert self.launcher.poll() is None, self.log.read_text()
            time.sleep(0.05)

    def gone_within(self, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.launcher.poll()
            if not self.pids():
                return True
            time.sleep(0.1)
        return False


@pytest.fixture
def launch(labels, tmp_path):  # noqa: F811
    jobs = []

    def launched(*flags, **environment):
        long = ["--train.max_outer_steps=100000", "--train.eval_every=100000"]
        output = ["--config", labels, "--output", tmp_path / "run"]
        jobs.append(Launched(tmp_path / "log", *output, *long, *flags, **environment))
        jobs[-1].wait_for("step 10/")
        return jobs[-1]

    yield launched
    for job in jobs:
        for pid in job.pids():
            os.kill(pid, signal.SIGKILL)
        job.launcher.wait()


def test_a_launcher_that_dies_of_a_signal_leaves_saved_workers_and_no_process(launch, tmp_path):
    job = launch()
    job.launcher.send_signal(signal.SIGUSR1)
    assert job.gone_within(60.0), job.log.read_text()
    assert job.launcher.returncode == -signal.SIGUSR1
    marker = json.loads((tmp_path / "run" / "requeue.json").read_text())
    assert marker["reason"] == "SIGTERM"
    assert (tmp_path / "run" / "checkpoints" / f"step_{marker['round']:08d}").is_dir()


def test_a_rank_that_stands_still_ends_the_job(launch):
    job = launch("--train.hang_timeout=4", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="3")
    os.kill(job.workers()[1], signal.SIGSTOP)
    assert job.gone_within(60.0), job.log.read_text()
    log = job.log.read_text()
    assert "[rank 0 on " in log
    assert "no progress for" in log
    assert f"exitcode  : {Exit.HANG.value}" in log, log
