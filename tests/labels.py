"""The smallest run that has everything: label sets, a multilayer perceptron, eight rounds."""

import numpy as np
import pytest
import yaml

NETWORK = {"name": "mlp", "hidden_size": 5, "dropout": 0.2}
SETTINGS = {
    "inference_net": NETWORK,
    "energy": {"name": "label_interaction", "features": NETWORK},
    "inner": {"batch_size": 8, "steps": 3},
    "outer": {"batch_size": 8, "objective": "dvn", "task_weight": 1.0},
    "solver": {"max_steps": 3, "damping": 1.0},
    "train": {
        "warmup_rounds": 2, "max_outer_steps": 4, "eval_every": 4, "checkpoint_every": 100,
        "keep_checkpoints": 99, "num_threads": 1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """The configuration file of such a run, beside its data."""
    return write_labels(tmp_path_factory.mktemp("labels"))


def write_labels(folder):
    """Write data and configuration into a folder, and return the path of the latter."""
    draw = np.random.default_rng(0)
    features = draw.normal(size=(40, 6)).astype(np.float32)
    np.savez(folder / "all.npz", features=features, targets=(features[:, :3] > 0).astype(np.uint8))
    data = {"task": "multilabel", "format": "npz", "root": str(folder), "train": ["all.npz"]}
    path = folder / "labels.yaml"
    path.write_text(yaml.safe_dump({"data": data, **SETTINGS}))
    return path
