"""Settings and fixtures of all tests."""

import os
from pathlib import Path

import pytest
import torch

# Two test processes share two cores.
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real data sets; a test that needs it is skipped where it is not there."""
    folder = Path(os.environ.get("ISPEN_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data sets in {folder}; set ISPEN_DATA to the folder that has them")
    return folder
