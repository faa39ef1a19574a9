"""What the tests of SLURM jobs share: settings that train in seconds, and launcher/slurm.py."""

import importlib.util
import os
from pathlib import Path

import pytest
import yaml
from programs import called
from tags import SETTINGS, tagged_text

ROOT = Path(__file__).parent.parent
NUM_ROUNDS = 12


def write_config(folder: Path) -> Path:
    """Write data and settings of a run of `NUM_ROUNDS` into a folder; return the settings."""
    for name, size, seed in (("train", 22, 0), ("dev", 6, 1), ("test", 6, 2)):
        (folder / f"{name}.conll").write_text(tagged_text(size, seed))
    data = {"root": str(folder), "train": ["train.conll"], "dev": "dev.conll", "test": "test.conll"}
    train = SETTINGS["train"] | {"max_outer_steps": NUM_ROUNDS - 2, "checkpoint_every": 3}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | {"data": data, "train": train}))
    return path


def slurm(*flags, environment=os.environ, expect: int = 0) -> tuple[str, str]:
    """Run launcher/slurm.py in this process, and return what it prints and its errors."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return called("slurm.py", *flags, expect=expect)


def loaded(script: Path):
    spec = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
