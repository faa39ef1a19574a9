"""Jobs on a real SLURM: to the end, through the time limit and a failed node, and refused ones."""

import json
import re
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml
from launched import send
from slurm_cluster import Cluster, command_of, why_not
from slurm_jobs import NUM_ROUNDS, ROOT, slurm, write_config

from ispen_dist.tables.runs import Interrupted, Run, RunFailed, SlurmRuns

PATIENCE = 500.0
"""Seconds to wait for what takes 20 on an idle machine."""
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with Cluster(3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("data"))


def submit(cluster: Cluster, config: Path, run: Path, *flags) -> str:
    """Submit two nodes of two ranks each and return the number of the job."""
    size = ("--nodes", "2", "--processes-per-node", "2", "--time", "60")
    printed, _ = slurm(
        "--config", config, "--output", run, *size, *flags,
        environment=cluster.environment,
    )  # fmt: skip
    number = printed.split()[1].rstrip(";")
    assert str(run / "slurm" / f"job-{number}.log") in printed
    return number


def log_of(run: Path) -> str:
    return "".join(path.read_text() for path in (run / "slurm").glob("job-*.log"))


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row["step"] for row in rows if row["phase"] == "train"]


def assert_whole(run: Path) -> None:
    """Check that a run of four ranks came to its end with one curve, each step once."""
    assert steps(run) == list(range(1, NUM_ROUNDS + 1)), log_of(run)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["world_size"], summary["rounds"]) == (4, NUM_ROUNDS)


def test_two_nodes_train_to_the_end(cluster, config, tmp_path):
    run = tmp_path / "a run"  # the space is quoted everywhere
    number = submit(cluster, config, run)
    assert cluster.wait_for_job(number, PATIENCE) == "COMPLETED", log_of(run)
    assert_whole(run)
    assert "done" in log_of(run)
    reports = [json.loads(p.read_text()) for p in (run / "slurm").glob("nodes-*/*.report.json")]
    assert len(reports) == 2
    assert all(r["ispen_dist"].startswith(str(run / "slurm" / "code")) for r in reports)


def test_runs_of_a_table_are_jobs_that_a_later_command_waits_for(
    cluster, config, tmp_path, monkeypatch
):
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    size = ["--nodes", "1", "--processes-per-node", "1", "--time", "60"]
    first, second = (SlurmRuns(ROOT / "launcher" / "slurm.py", size, poll=0.2) for _ in range(2))
    runs = [Run((config,), {"train.seed": seed}, tmp_path / f"seed-{seed}") for seed in (3, 4)]
    with ThreadPoolExecutor(2) as pool:
        stopped = [pool.submit(first, run) for run in runs]
        cluster.wait_for(lambda: all(steps(run.folder) for run in runs), PATIENCE)
        numbers = [Path(f"{run.folder}.job").read_text() for run in runs]
        first.stop()
        for future in stopped:
            with pytest.raises(Interrupted):
                future.result()
        assert not any(map(cluster.is_over, numbers))
        found = list(pool.map(second, runs))
    assert [Path(f"{run.folder}.job").read_text() for run in runs] == numbers
    assert [summary["rounds"] for summary in found] == [NUM_ROUNDS] * 2
    seeds = [yaml.safe_load((r.folder / "config.yaml").read_text())["train"]["seed"] for r in runs]
    assert seeds == [3, 4]
    unsettled = Run((config,), {"inner.steps": -1}, tmp_path / "unsettled")
    with pytest.raises(RunFailed, match=r"exit code 2; log: .*unsettled\.log"):
        second(unsettled)
    assert "inner.steps: expected" in unsettled.log.read_text()


@pytest.mark.thorough
def test_the_time_limit_is_a_pause(cluster, config, tmp_path):
    run = tmp_path / "run"
    number = submit(
        cluster, config, run, "--requeue", "--signal-before", 170, "--", "--train.log_every=1",
    )  # fmt: skip
    cluster.wait_for(lambda: bool(steps(run)) or cluster.is_over(number), PATIENCE)
    assert not cluster.is_over(number), log_of(run)
    # A round that lasts until the signal is there; SLURM looks at time limits every 30 s.
    ranks = [one for one in cluster.processes(LOCAL_WORLD_SIZE="2") if is_rank(one)]
    assert len(ranks) == 4
    for rank in ranks:
        send(signal.SIGSTOP, rank)
    hours, minutes, _ = map(int, cluster.job(number)["RunTime"].split(":"))
    limit = f"TimeLimit={hours * 60 + minutes + 3}"
    cluster.run("scontrol", "update", f"JobId={number}", limit)
    cluster.wait_for(lambda: "time limit is near" in log_of(run), 70)
    for rank in ranks:
        send(signal.SIGCONT, rank)
    cluster.wait_for(lambda: cluster.job(number)["JobState"] == "PENDING", 150)
    before = steps(run)
    assert 0 < len(before) < NUM_ROUNDS
    assert "saved before the end; requeued" in log_of(run)
    assert not (run / "requeue.json").exists()
    cluster.run("scontrol", "update", f"JobId={number}", "TimeLimit=60")
    assert cluster.wait_for_job(number, PATIENCE) == "COMPLETED", log_of(run)
    assert_whole(run)
    assert cluster.job(number)["Restarts"] == "1"
    assert f"at round {len(before)}" in log_of(run)


def is_rank(process: psutil.Process) -> bool:
    return "launcher/train.py" in command_of(process)


@pytest.mark.thorough
def test_a_failed_node_is_replaced(cluster, config, tmp_path):
    """With launcher/job.sbatch as edited by hand, on the installed packages."""
    run = tmp_path / "run"
    job = by_hand(
        tmp_path, run, cluster, nodes=2, requeues=3, config=config,
        runtime=ROOT / "configs" / "runtime" / "ddp.yaml", launcher=ROOT / "launcher",
        python=sys.executable,
    )  # fmt: skip
    number = cluster.run("sbatch", "--parsable", str(job)).strip()
    log = tmp_path / "job.log"
    cluster.wait_for(lambda: len(steps(run)) >= 4 or cluster.is_over(number), PATIENCE)
    assert not cluster.is_over(number), log.read_text()
    lost = cluster.job(number)["BatchHost"]
    other = next(name for name in cluster.nodes[:2] if name != lost)
    cluster.kill_node(other)
    assert len(steps(run)) < NUM_ROUNDS
    cluster.wait_for(lambda: cluster.job(number)["Restarts"] == "1", 150)
    assert cluster.wait_for_job(number, PATIENCE) == "COMPLETED", log.read_text()
    assert_whole(run)
    assert re.search(r"resumed from \S+ at round (3|6|9)", log.read_text())
    assert "127.0.0.[2,4]" in log.read_text()
    cluster.start_node(other)
    cluster.wait_for(lambda: cluster.states() == ["idle"] * 3, 60)


def by_hand(
    folder: Path, run: Path, cluster: Cluster, *, nodes: int, requeues: int, **variables
) -> Path:
    """Edit launcher/job.sbatch for CPU nodes and return the edited file."""
    options = {"nodes": nodes, "cpus-per-task": 2, "time": 60, "output": folder / "job.log"}
    settings = {"run": run, "processes_per_node": 2, "gpus_per_node": 0, "max_requeues": requeues}
    text = (ROOT / "launcher" / "job.sbatch").read_text()
    text = text.replace("#SBATCH --gpus-per-node=8\n", "")
    for name, value in options.items():
        text = re.sub(rf"(?m)^#SBATCH --{name}=.*", f"#SBATCH --{name}={value}", text)
    for name, value in (settings | variables).items():
        text = re.sub(rf"(?m)^{name}=.*", f"{name}={value}", text)
    path = folder / "job.sbatch"
    path.write_text(text)
    return path


FAKE = """#!/bin/bash
# Passes the checks; as the launcher does what a test wants.
[[ $* == *accelerate* ]] || exit 0
{body}
"""


def fake(tmp_path: Path, cluster: Cluster, requeues: int, body: str) -> tuple[str, Path]:
    """Submit the batch script with a launcher of a few shell lines; return number and log."""
    python = tmp_path / "python"
    python.write_text(FAKE.format(body=body))
    python.chmod(0o755)
    run = tmp_path / "run"
    job = by_hand(tmp_path, run, cluster, nodes=1, requeues=requeues, python=python)
    return cluster.run("sbatch", "--parsable", str(job)).strip(), tmp_path / "job.log"


def test_requeues_are_counted(cluster, tmp_path):
    number, log = fake(tmp_path, cluster, 1, 'echo "{}" > "$run/requeue.json"; exit 1')
    assert cluster.wait_for_job(number, 60) == "FAILED"
    assert cluster.job(number)["ExitCode"] == "75:0"
    assert cluster.job(number)["Restarts"] == "1"
    assert "attempt 1" in log.read_text()
    assert "not requeued (max_requeues=1)" in log.read_text()


def test_a_cancelled_job_stays_cancelled(cluster, tmp_path):
    body = """trap 'echo "{}" > "$run/requeue.json"; exit 1' TERM
    echo training; sleep 60 & wait"""
    number, log = fake(tmp_path, cluster, 9, body)
    cluster.wait_for(lambda: log.exists() and "training\n" in log.read_text(), 30)
    cluster.run("scancel", number)
    assert cluster.wait_for_job(number, 30) == "CANCELLED"
    assert "requeued" not in log.read_text()
    assert cluster.job(number)["Restarts"] == "0"


def test_lost_tasks_are_no_success(cluster, tmp_path):
    """srun returns 0 when its tasks vanish; only a summary shows that the run came to its end."""
    number, log = fake(tmp_path, cluster, 9, "exit 0")
    assert cluster.wait_for_job(number, 60) == "FAILED"
    assert "failed; see above" in log.read_text()


def test_a_failure_without_a_marker_is_final(cluster, tmp_path):
    number, log = fake(tmp_path, cluster, 9, "exit 3")
    assert cluster.wait_for_job(number, 60) == "FAILED"
    assert cluster.job(number)["ExitCode"] == "3:0"
    assert "failed; see above" in log.read_text()


def test_bad_settings_in_the_job_end_it_at_once(cluster, config, tmp_path):
    run = tmp_path / "run"
    slurm(
        "--config", config, "--output", run, "--nodes", 2, "--processes-per-node", 2,
        "--time", 10, "--requeue", "--dry-run",
    )  # fmt: skip
    written = run / "slurm" / "config.yaml"
    written.write_text(written.read_text().replace("batch_size: 5", "batch_size: many"))
    number = cluster.run("sbatch", "--parsable", str(run / "slurm" / "job.sbatch")).strip()
    assert cluster.wait_for_job(number, PATIENCE) == "FAILED"
    log = log_of(run)
    assert "inner.batch_size: expected int, got 'many'" in log
    assert "settings or data refused; see above" in log
    assert "Traceback" not in log
    assert cluster.job(number)["ExitCode"] == "2:0"
    assert not (run / "metrics.jsonl").exists()


def test_nodes_that_differ_end_the_job_at_once(cluster, config, tmp_path):
    run = tmp_path / "run"
    job = by_hand(
        tmp_path, run, cluster, nodes=2, requeues=0, gpus_per_node=1, config=config,
        launcher=ROOT / "launcher", python=sys.executable,
    )  # fmt: skip
    number = cluster.run("sbatch", "--parsable", str(job)).strip()
    assert cluster.wait_for_job(number, PATIENCE) == "FAILED"
    log = (tmp_path / "job.log").read_text()
    assert re.search(r"error: 127.0.0.\d: expected 1 GPUs, torch sees 0; look at nvidia-smi", log)
    assert "a node is not fit to train; see above" in log
