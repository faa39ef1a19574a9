"""Jobs on a real SLURM: to the end, through the time limit and a failed node, and refused ones."""

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from slurm_cluster import Cluster, command_of, send, why_not
from test_training import SETTINGS, tagged_text

from ispen_dist.recording.snapshot import PARTS, save_code

ROOT = Path(__file__).parent.parent
NUM_ROUNDS = 12
PATIENCE = 500.0
"""Seconds to wait for what takes 20 on an idle machine."""
pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    with Cluster(3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, size, seed in (("train", 22, 0), ("dev", 6, 1), ("test", 6, 2)):
        (folder / f"{name}.conll").write_text(tagged_text(size, seed))
    data = {"root": str(folder), "train": ["train.conll"], "dev": "dev.conll", "test": "test.conll"}
    train = SETTINGS["train"] | {"max_outer_steps": NUM_ROUNDS - 2, "checkpoint_every": 3}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | {"data": data, "train": train}))
    return path


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The code to submit: this repository if its training obeys signals, otherwise a stand-in."""
    sources = [*(ROOT / "ispen_dist").rglob("*.py"), ROOT / "launcher" / "train.py"]
    if any("requeue.json" in path.read_text("utf-8") for path in sources):
        return ROOT
    copy = tmp_path_factory.mktemp("tree")
    for name in ("ispen_dist", "kernels", "launcher", "configs"):
        shutil.copytree(ROOT / name, copy / name)
    train = copy / "launcher" / "train.py"
    train.rename(train.with_name("plain_train.py"))
    shutil.copy(Path(__file__).with_name("signalled_train.py"), train)
    return copy


def slurm(*flags, tree: Path = ROOT, environment=os.environ, expect: int = 0):
    """Run launcher/slurm.py of a tree, in this process: to import it takes seconds."""
    module = loaded(tree / "launcher" / "slurm.py")
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            code = module.main([str(flag) for flag in flags])
        except SystemExit as end:
            code = end.code
    assert code == expect, stdout.getvalue() + stderr.getvalue()
    return stdout.getvalue(), stderr.getvalue()


def loaded(script: Path):
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def submit(cluster: Cluster, config: Path, run: Path, *flags, tree: Path = ROOT) -> str:
    """Submit two nodes of two ranks each and return the number of the job."""
    size = ("--nodes", "2", "--processes-per-node", "2", "--time", "60")
    printed, _ = slurm(
        "--config", config, "--output", run, *size, *flags,
        tree=tree, environment=cluster.environment,
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


def test_the_time_limit_is_a_pause(cluster, config, tree, tmp_path):
    run = tmp_path / "run"
    number = submit(
        cluster, config, run, "--requeue", "--signal-before", 170, "--", "--train.log_every=1",
        tree=tree,
    )  # fmt: skip
    cluster.wait_for(lambda: bool(steps(run)), PATIENCE)
    # A round that lasts until the signal is there; SLURM looks at time limits every 30 s.
    ranks = [pid for pid in cluster.processes("LOCAL_WORLD_SIZE=2") if is_rank(pid)]
    assert len(ranks) == 4
    for pid in ranks:
        send(signal.SIGSTOP, pid)
    hours, minutes, _ = map(int, cluster.job(number)["RunTime"].split(":"))
    limit = f"TimeLimit={hours * 60 + minutes + 3}"
    cluster.run("scontrol", "update", f"JobId={number}", limit)
    cluster.wait_for(lambda: "time limit is near" in log_of(run), 70)
    for pid in ranks:
        send(signal.SIGCONT, pid)
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


def is_rank(pid: int) -> bool:
    return "launcher/train.py" in command_of(pid)


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
    cluster.wait_for(lambda: len(steps(run)) >= 4, PATIENCE)
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


def test_a_bad_configuration_is_refused_before_submission(config, tmp_path):
    flags = ("--config", config, "--output", tmp_path / "run", "--nodes", 2)
    flags += ("--gpus-per-node", 8)
    _, errors = slurm(*flags, "--", "--inner.stepz=3", expect=2)
    assert errors.startswith("error: --inner.stepz: no such setting; the nearest is")
    _, errors = slurm(*flags, "--", "--output=elsewhere", expect=2)
    assert "--output=elsewhere: expected settings after --" in errors
    _, errors = slurm(*flags, "--runtime", tmp_path / "none.yaml", expect=2)
    assert "none.yaml: expected a file of configs/runtime/" in errors
    assert not (tmp_path / "run").exists()


def test_a_dry_run_writes_all_and_submits_nothing(config, tmp_path):
    run = tmp_path / "run"
    flags = ("--config", config, "--output", run, "--nodes", 4, "--gpus-per-node", 8)
    flags += ("--dry-run", "--partition", "big", "--time", "1-00:00:00")
    printed, errors = slurm(*flags, "--", "--train.seed=7")
    job = run / "slurm" / "job.sbatch"
    assert printed == job.read_text()
    assert f"sbatch {job}" in errors
    for line in (
        "#SBATCH --nodes=4", "#SBATCH --gpus-per-node=8", "#SBATCH --cpus-per-task=32",
        "#SBATCH --partition=big", "##SBATCH --account", "#SBATCH --time=1-00:00:00",
        "#SBATCH --no-requeue", "#SBATCH --signal=B:USR1@180", "max_requeues=0",
        f"run={run}", f"python={sys.executable}", f"packages={run}/slurm/code",
    ):  # fmt: skip
        assert f"\n{line}\n" in printed
    settings = yaml.safe_load((run / "slurm" / "config.yaml").read_text())
    assert settings["train"]["seed"] == 7
    ddp = ROOT / "configs" / "runtime" / "ddp.yaml"
    assert (run / "slurm" / "runtime.yaml").read_text() == ddp.read_text()
    code = run / "slurm" / "code"
    assert (code / "launcher" / "train.py").read_bytes() == (
        ROOT / "launcher" / "train.py"
    ).read_bytes()
    assert {path.name for path in code.iterdir() if path.is_dir()} == set(PARTS.values())
    assert "found one; continue it with sbatch" in slurm(*flags, expect=2)[1]


def test_without_slurm_the_job_is_written_and_the_next_step_named(config, tmp_path):
    flags = ("--config", config, "--output", tmp_path / "run", "--nodes", 1)
    flags += ("--processes-per-node", 1)
    _, errors = slurm(*flags, environment={"PATH": str(tmp_path)}, expect=2)
    assert f"run sbatch {tmp_path}/run/slurm/job.sbatch on a login node" in errors
    assert "distributed_type: 'NO'" in (tmp_path / "run" / "slurm" / "runtime.yaml").read_text()


@pytest.mark.parametrize("wrong", [("--nodes", "0"), ("--nodes", "2", "--gpus-per-node", "1.5")])
def test_impossible_sizes_are_refused(config, wrong):
    _, errors = slurm("--config", config, "--processes-per-node", 1, *wrong, expect=2)
    assert "expected a whole number of at least 1" in errors


def test_job_sbatch_is_bash():
    job = ROOT / "launcher" / "job.sbatch"
    subprocess.run(["bash", "-n", job], check=True)
    text = job.read_text()
    assert (ROOT / re.search(r"(?m)^config=(.*)", text)[1]).is_file()
    assert (ROOT / re.search(r"(?m)^runtime=(.*)", text)[1]).is_file()
    assert f"--signal=B:USR1@{re.search(r'(?m)^save_seconds=(.*)', text)[1]}\n" in text


WORKER = """
import os, signal, sys, time
from pathlib import Path

rank, folder = int(os.environ["RANK"]), Path(sys.argv[1])
signal.signal(signal.SIGUSR1, lambda *_: (folder / f"got{rank}").touch())
(folder / f"ready{rank}").touch()
while rank == 1 or not (folder / "got0").exists():
    time.sleep(0.1)
time.sleep(1)
(folder / "saved").touch()
sys.exit(75)
"""


def test_the_launcher_hands_usr1_on_and_waits_as_long_as_told(tmp_path):
    """Where SLURM tracks processes by cgroups, the launcher alone gets a step's signal."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    text = (ROOT / "launcher" / "job.sbatch").read_text()
    exports = dict(re.findall(r"(?m)^export (PET_SIGNALS_TO_HANDLE|TORCH_ELASTIC\w+)=(.*)", text))
    assert exports.pop("TORCH_ELASTIC_SHUTDOWN_TIMEOUT") == "$save_seconds"
    launcher = subprocess.Popen(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes",
            "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
            "--main_process_port", "0", script, tmp_path,
        ],
        env=os.environ | exports | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    end = time.monotonic() + 200
    while len(list(tmp_path.glob("ready*"))) < 2:
        assert time.monotonic() < end
        time.sleep(0.1)
    launcher.send_signal(signal.SIGUSR1)
    begin = time.monotonic()
    output = launcher.communicate(timeout=60)[0]
    # Rank 0 saves; rank 1, which never ends, is killed after 5 s, not after the usual 30 s.
    assert 4 < time.monotonic() - begin < 25, output
    assert {"got0", "got1", "saved"} <= {path.name for path in tmp_path.iterdir()}, output
    assert launcher.returncode == 1


def test_the_snapshot_is_what_git_knows_or_would_add(tmp_path):
    root, target = tmp_path / "root", tmp_path / "code"
    for part in PARTS:
        (root / part).mkdir(parents=True)
        (root / part / "kept.py").write_text("kept = 1\n")
    git = ("git", "-C", root, "-c", "user.name=n", "-c", "user.email=e")
    (root / ".gitignore").write_text("*.log\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    (root / "ispen_dist" / "kept.py").write_text("kept = 2\n")
    (root / "kernels" / "new.py").write_text("")
    (root / "kernels" / "a.log").write_text("")
    (root / "launcher" / "kept.py").unlink()
    save_code(root, target)
    files = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert files == {
        "commit.txt", "changes.diff", "ispen_dist/kept.py", "ispen_kernels/kept.py",
        "ispen_kernels/new.py",
    }  # fmt: skip
    assert (target / "ispen_dist" / "kept.py").read_text() == "kept = 2\n"
    assert re.match(r"[0-9a-f]{40}\n M ispen_dist/kept.py\n", (target / "commit.txt").read_text())
    assert "+kept = 2" in (target / "changes.diff").read_text()


def test_the_snapshot_without_git_is_the_whole_tree(tmp_path):
    (tmp_path / "root" / "kernels" / "__pycache__").mkdir(parents=True)
    (tmp_path / "root" / "kernels" / "a.py").write_text("")
    (tmp_path / "root" / "kernels" / "__pycache__" / "a.pyc").write_text("")
    save_code(tmp_path / "root", tmp_path / "code")
    files = [path for path in (tmp_path / "code").rglob("*") if path.is_file()]
    assert files == [tmp_path / "code" / "ispen_kernels" / "a.py"]


@pytest.fixture
def packages(tmp_path) -> Path:
    """Packages that are imported at once, in place of the installed ones."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "ispen_dist.py").write_text("")
    (folder / "torch.py").write_text("")
    return folder


def check(folder: Path, node: str, packages: Path, nodes=("a", "b")) -> subprocess.Popen:
    """Start the check of one node."""
    script = ROOT / "launcher" / "check_nodes.py"
    environment = os.environ | {"SLURMD_NODENAME": node, "PYTHONPATH": str(packages)}
    return subprocess.Popen(
        [sys.executable, script, folder, "--nodes", *nodes],
        env=environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def errors_of(process: subprocess.Popen) -> str:
    """Wait for a check and return its errors, which agree with its exit code."""
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == (2 if errors else 0)
    assert "Traceback" not in errors
    return errors


def test_alike_nodes_pass(packages, tmp_path):
    both = [check(tmp_path, node, packages) for node in ("a", "b")]
    assert [errors_of(one) for one in both] == ["", ""]


def test_a_node_with_other_versions_is_named(packages, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(packages, other)
    (other / "torch-0.1.dist-info").mkdir()
    (other / "torch-0.1.dist-info" / "METADATA").write_text("Name: torch\nVersion: 0.1\n")
    first, second = check(tmp_path, "a", packages), check(tmp_path, "b", other)
    assert errors_of(first) == ""
    errors = errors_of(second)
    assert f"b: expected torch {version('torch')} as on a, got 0.1; use one environment" in errors
    assert f"b: expected ispen_dist {packages}/ispen_dist.py as on a, got {other}" in errors


def test_a_node_without_a_package_is_named(packages, tmp_path):
    (packages / "torch.py").write_text("raise ImportError('no libcudart')")
    errors = errors_of(check(tmp_path, "a", packages, nodes=("a",)))
    assert "error: a: expected to import torch with" in errors
    assert "got ImportError: no libcudart; install the project" in errors


def test_a_folder_that_is_not_shared_is_named(tmp_path, monkeypatch):
    """Imported, so that the test need not wait as long as a cluster does."""
    module = loaded(ROOT / "launcher" / "check_nodes.py")
    monkeypatch.setattr(module, "SHARED_SECONDS", 0.5)
    (error,) = module.check_node(tmp_path, "a", ["a", "b"], 0)
    assert "expected files of b in" in error
    assert "choose an --output that all nodes share" in error
    (error,) = module.check_node(tmp_path / "absent", "a", ["a"], 0)
    assert "expected to write into" in error
