"""Runs of a table as processes of their own: GPU, flags, log, and an end with the table's."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ispen_dist.tables.runs import LocalRuns, Run, RunFailed


def test_a_local_run_has_its_gpu_its_flags_and_its_log(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], sys.argv[1:])")
    run = Run((Path("a"), Path("b")), {"inner.steps": 2, "outer.dropout": False}, tmp_path / "run")
    with pytest.raises(RunFailed, match=r"exit code 0; log: .*run\.log"):
        LocalRuns([sys.executable, str(script)], gpus=["3"])(run)
    log = run.log.read_text()
    assert log.startswith("3 ['--config', 'a', '--config', 'b', '--output', ")
    assert "'--inner.steps=2', '--outer.dropout=false'" in log


def test_a_killed_table_leaves_no_run_behind(tmp_path):
    """Not even by SIGKILL, which it cannot pass on."""
    child = tmp_path / "child.py"
    child.write_text(
        "import pathlib, os, sys, time\n"
        "from ispen_dist.stopping import stop_with_launcher\n"
        "stop_with_launcher()\n"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    parent = (
        "import pathlib, sys\n"
        "from ispen_dist.tables.runs import LocalRuns, Run\n"
        "_, child, pid, folder = sys.argv\n"
        "LocalRuns([sys.executable, child, pid])(Run((), {}, pathlib.Path(folder)))\n"
    )
    pid = tmp_path / "pid"
    command = [sys.executable, "-c", parent, child, pid, tmp_path / "run"]
    with subprocess.Popen(list(map(str, command))) as table:
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.05)
        run = psutil.Process(int(pid.read_text()))
        table.kill()
        run.wait(20)
