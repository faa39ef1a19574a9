"""Programs of launcher/ that run to their end: started, forked, or in this process."""

import io
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from forks import Job

ROOT = Path(__file__).parent.parent
LAUNCHER = ROOT / "launcher"


def run(*command, expect: int = 0) -> subprocess.CompletedProcess:
    """Run a command, as a user does."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=240, check=False,
        env=environment, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def train(config: Path, output: Path, *flags: str, expect: int = 0) -> str:
    """Train in a forked process, which starts in a moment, and return what it prints."""
    log = output.with_name(f"{output.name}-log")
    job = Job(log, "--config", config, "--output", output, *flags, num_ranks=1)
    assert job.codes(timeout=240.0) == [expect], job.text()
    return job.text()


def called(name: str, *arguments, expect: int = 0) -> tuple[str, str]:
    """Run a program in this process, and return what it prints and its errors."""
    script = str(LAUNCHER / name)
    stdout, stderr = io.StringIO(), io.StringIO()
    with redirect_stdout(stdout), redirect_stderr(stderr), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(script, run_name="__main__")
    assert end.value.code == expect, stdout.getvalue() + stderr.getvalue()
    return stdout.getvalue(), stderr.getvalue()
