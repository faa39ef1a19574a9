"""The main job with compiled functions follows the plain one, on one rank and on two."""

import json

import numpy as np
import pytest
import yaml
from launched import LAUNCH, TRAIN
from programs import run, train
from records import rows_of
from tags import tagged_text

from ispen_dist.command_line import parse_train

BUCKETS = "--compile.buckets=[8]"
NETS = ("inference_net", "energy.features")
COMPILED = ["--compile.inner=true", "--compile.curvature=true", "--compile.backend=trace"]
NO_DROPOUT = [f"--{net}.{kind}=0" for net in NETS for kind in ("dropout", "feature_dropout")]
"""Ranks draw masks of their own."""
SETTINGS = {
    "inner": {"batch_size": 5, "steps": 5, "optimizer": {"learning_rate": 0.01}},
    "outer": {"batch_size": 7, "objective": "ssvm", "task_weight": 1.0},
    "solver": {"max_steps": 3, "damping": 1.0},
    "train": {
        "dtype": "float64", "warmup_rounds": 2, "max_outer_steps": 8, "eval_every": 5,
        "checkpoint_every": 10, "num_threads": 1,
    },
}  # fmt: skip
"""50 inner steps in 10 rounds."""


def write_config(folder, data, inference_net, energy, **more):
    settings = SETTINGS | {"data": data, "inference_net": inference_net, "energy": energy} | more
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def tagging(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tagging")
    for name, size, seed in (("train", 22, 0), ("dev", 6, 1)):
        (folder / f"{name}.conll").write_text(tagged_text(size, seed))
    net = {"name": "transformer", "embedding_size": 4, "hidden_size": 4, "num_heads": 1}
    data = {"root": str(folder), "train": ["train.conll"], "dev": "dev.conll"}
    return write_config(
        folder,
        data,
        net | {"num_layers": 1, "dropout": 0.2},
        {"features": net | {"num_layers": 1}},
        features={"num_buckets": 32, "max_affix": 1},
    )


@pytest.fixture(scope="module")
def multilabel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multilabel")
    draw = np.random.default_rng(0)
    features = draw.normal(size=(40, 6)).astype(np.float32)
    targets = (features[:, :3] + 0.3 * draw.normal(size=(40, 3)) > 0).astype(np.uint8)
    np.savez(folder / "all.npz", features=features, targets=targets)
    data = {"task": "multilabel", "format": "npz", "root": str(folder), "train": ["all.npz"]}
    net = {"name": "mlp", "hidden_size": 4, "activation": "softplus"}
    energy = {"name": "label_interaction", "features": net}
    return write_config(folder, data, net | {"dropout": 0.2}, energy)


@pytest.fixture(scope="module")
def compiled_multilabel(multilabel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "compiled"
    return folder, train(multilabel, folder, BUCKETS, *COMPILED)


def assert_same_figures(found, expected, rel=1e-8):
    """Roundings of 50 steps of AdamW and 8 solves of 3 products; they grow, but not to 1e-8."""
    first, second = rows_of(found), rows_of(expected)
    assert [row["step"] for row in first] == [row["step"] for row in second]
    for ours, theirs in zip(first, second, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"phase"} - PROBES:
            assert ours[key] == pytest.approx(theirs[key], rel=rel, abs=1e-12), key
    assert any(row.get("implicit_norm", 0.0) > 0.0 for row in first)


PROBES = {"symmetry_defect", "precision_error"}
"""Figures that are themselves nothing but rounding."""


def assert_compiled(folder, printed):
    summary = json.loads((folder / "summary.json").read_text())
    number = summary["compiled"]["functions"]
    lines = [line for line in printed.splitlines() if "compiled " in line]
    assert number == len([line for line in lines if "functions," in line]) > 0
    assert summary["compiled"]["seconds"] > 0.0
    assert any("output of inner_loss" in line for line in lines)
    assert any("hessian" in line for line in lines)


def test_a_compiled_run_on_label_sets_follows_the_plain_one(
    multilabel, compiled_multilabel, tmp_path
):
    folder, printed = compiled_multilabel
    assert_compiled(folder, printed)
    train(multilabel, tmp_path / "plain", BUCKETS)
    assert_same_figures(folder, tmp_path / "plain")
    assert "compiled" not in json.loads((tmp_path / "plain" / "summary.json").read_text())


@pytest.mark.thorough
def test_a_compiled_run_of_a_transformer_follows_the_plain_one(tagging, tmp_path):
    printed = train(tagging, tmp_path / "compiled", BUCKETS, *COMPILED)
    assert_compiled(tmp_path / "compiled", printed)
    train(tagging, tmp_path / "plain", BUCKETS)
    assert_same_figures(tmp_path / "compiled", tmp_path / "plain")


@pytest.mark.thorough
def test_two_ranks_with_a_compiled_inner_step_follow_one(multilabel, tmp_path):
    exact = [BUCKETS, "--compile.inner=true", "--compile.backend=trace", *NO_DROPOUT]
    train(multilabel, tmp_path / "one", *exact)
    output = ["--config", multilabel, "--output", tmp_path / "two"]
    run(*LAUNCH, "--num_processes", "2", TRAIN, *output, *exact)
    assert_same_figures(tmp_path / "two", tmp_path / "one")
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["compiled"]["functions"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*COMPILED, "--inference_net.name=bilstm"], "inference_net.name: expected a network"),
        (["--compile.buckets=[8,4]"], "compile.buckets: expected increasing positive numbers"),
        (["--compile.buckets=[0,8]"], "compile.buckets: expected increasing positive numbers"),
    ],
)
def test_settings_that_cannot_be_compiled_end_with_code_2(tagging, flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_train(["--config", str(tagging), *flags])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
