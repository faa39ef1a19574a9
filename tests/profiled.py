"""A profiled run of two ranks under accelerate launch, made once for all test processes."""

import os
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock
from labels import write_labels
from launched import LAUNCH

FIRST, STEPS = 3, 2
FLAGS = [f"--profile.first_round={FIRST}", f"--profile.steps={STEPS}"]


@pytest.fixture(scope="session")
def profiled(tmp_path_factory) -> Path:
    """The run folder; its traces hold rounds 5 and 6, two ranks."""
    # Shared by the processes of pytest-xdist, whose own folders lie beside each other.
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "profiled"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            config = write_labels(folder)
            _launch(
                "--config", config, "--output", folder / "run", "--profile.enabled=true", *FLAGS
            )
    return folder / "run"


def _launch(*arguments: object) -> None:
    done = subprocess.run(
        [*LAUNCH, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
