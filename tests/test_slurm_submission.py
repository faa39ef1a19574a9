"""What is written and checked before a SLURM job trains; needs no SLURM."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from launched import LAUNCH
from slurm_jobs import ROOT, loaded, slurm, write_config

from ispen_dist.recording.snapshot import PARTS, save_code


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("data"))


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


SRUN = """#!/bin/bash
[[ "$*" == *accelerate* && -n "$FINISHES" ]] && sleep 0.1 && echo {} > "$FINISHES/summary.json"
exit 0
"""


@pytest.mark.parametrize("finishes", [True, False])
def test_a_job_is_done_by_a_summary_of_its_own(finishes, tmp_path):
    """SLURM's srun returns 0 when it lost its tasks; the folder has an earlier job's summary."""
    run, programs = tmp_path / "run", tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho localhost\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    run.mkdir()
    (run / "summary.json").write_text("{}")
    os.utime(run / "summary.json", (time.time() - 60.0,) * 2)
    job = (ROOT / "launcher" / "job.sbatch").read_text()
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_NNODES": "1", "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "localhost", "FINISHES": str(run) if finishes else "",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", re.sub(r"(?m)^run=.*", f"run={run}", job)],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode == 0) == finishes, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith(": done" if finishes else ": failed; see above")


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
        [*LAUNCH, "--num_processes", "2", script, tmp_path],
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
