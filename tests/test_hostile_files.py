"""Files that would run code if anything in them were executed: nothing is, and each is named."""

import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ispen_dist.checkpoint import (
    CheckpointError,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from ispen_dist.command_line import load_config
from ispen_dist.config import ConfigError
from ispen_dist.data.arff import read_arff, read_label_names
from ispen_dist.data.conll import read_conll, read_conllu
from ispen_dist.data.errors import DataError
from ispen_dist.data.npz import read_npz
from ispen_dist.data.splits import read_splits
from ispen_dist.data.svmlight import read_svmlight
from ispen_dist.predictor import ModelError, Predictor
from ispen_dist.recording.metrics_file import read_metrics


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path):
    """A path that does not exist before or after; unpickling would make it."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Evil(path)))
    assert path.exists(), "the trap works"
    path.unlink()
    yield path
    assert not path.exists(), "code from a file has run"
