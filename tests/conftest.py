"""Settings and fixtures of all tests."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

# Before anything imports Triton: its kernels run in the interpreter where there is no GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

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


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes text or bytes into a temporary folder and returns the path."""

    def written(content: str | bytes, name: str = "file.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return written


@pytest.fixture
def config_file(write) -> Callable[[object], Path]:
    """A function that writes settings, or text in their place, and returns the path."""

    def written(content: object) -> Path:
        return write(content if isinstance(content, str) else yaml.safe_dump(content), "some.yaml")

    return written


@pytest.fixture
def poisoned_memory():
    """Fill every buffer of torch.empty with NaN, so that a place that no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def float64():
    """Make float64 the default type while a module's tests run."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
