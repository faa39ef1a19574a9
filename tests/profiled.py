"""A profiled run of two ranks under accelerate launch, made once for all test processes."""

import os
from pathlib import Path

import pytest
from filelock import FileLock
from labels import write_labels
from launched import Launched

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
            config, run = write_labels(folder), folder / "run"
            flags = ["--profile.enabled=true", *FLAGS]
            job = Launched(folder, "--config", config, "--output", run, *flags)
            assert job.code(240.0) == 0, job.text()
    return folder / "run"
