"""Two runs never write into one folder, and a lock never outlives its process."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forks import Job
from programs import train
from tags import config  # noqa: F401

from ispen_dist.config import ConfigError
from ispen_dist.recording.run_lock import RunLock, _holder

HOLD = (
    "import sys, time; from pathlib import Path\n"
    "from ispen_dist.recording.run_lock import RunLock\n"
    "RunLock(Path(sys.argv[1])).take(); print('held', flush=True); time.sleep(300)"
)


def holder_of(folder: Path) -> subprocess.Popen:
    environment = os.environ | {"SLURM_JOB_ID": "4711"}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def refusal_of(lock: RunLock) -> str:
    with pytest.raises(ConfigError) as refused:
        lock.take()
    return str(refused.value)


def test_a_second_process_learns_who_holds_the_folder_until_that_is_killed(tmp_path):
    process = holder_of(tmp_path / "run")
    lock = RunLock(tmp_path / "run")
    refusal = refusal_of(lock)
    held = json.loads((tmp_path / "run" / ".lock").read_text())
    assert held["pid"] == process.pid
    for words in (
        f"--output {tmp_path / 'run'}: expected a folder that no other run writes to",
        f"process {process.pid} on {held['host']}, job 4711, since {held['since']}",
        "choose another folder",
    ):
        assert words in refusal
    process.send_signal(signal.SIGKILL)
    process.wait()
    lock.take()
    assert "held by" in refusal_of(RunLock(tmp_path / "run")), "also within one process"
    lock.release()
    RunLock(tmp_path / "run").take()


def test_a_holder_that_has_not_said_who_it_is(tmp_path):
    lock = RunLock(tmp_path)
    lock.take()
    (tmp_path / ".lock").write_text('{"pid')
    assert "a process that has not said which it is" in refusal_of(RunLock(tmp_path))


def test_the_job_is_that_of_the_scheduler():
    assert _holder({})["job"] == "none"
    assert _holder({"PBS_JOBID": "12.server"})["job"] == "12.server"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    refusal = refusal_of(RunLock(tmp_path / "file" / "run"))
    assert "expected a folder that can be written, got Not a directory" in refusal


def test_a_second_job_is_refused_on_all_its_ranks(config, tmp_path):  # noqa: F811
    """Reading needs no lock: --print-config works beside the holder."""
    output = tmp_path / "run"
    holder = holder_of(output)
    job = Job(tmp_path / "job", "--config", config, "--output", output)
    assert job.codes(timeout=240.0) == [2, 2], job.text()
    printed = [log.read_text() for log in job.logs]
    assert f"held by process {holder.pid}" in printed[0]
    assert "error" not in printed[1]
    assert sorted(os.listdir(output)) == [".lock"]
    train(config, output, "--print-config")
    holder.kill()
    holder.wait()
