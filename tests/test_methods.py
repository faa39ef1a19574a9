"""Every method file on tiny data, and what sets the methods apart from each other."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from labels import SETTINGS as LABELS
from launched import TRAIN
from ranks import start_ranks
from records import rows_of
from tags import SETTINGS as TAGS
from tags import tagged_text

from ispen_dist.checkpoint import Checkpoint
from ispen_dist.command_line import config_from_dict, config_to_dict, load_config
from ispen_dist.config import ConfigError
from ispen_dist.config.problems import WITHOUT_THETA
from ispen_dist.data.loading import load_splits
from ispen_dist.distributed import Session
from ispen_dist.inference import predict
from ispen_dist.linalg import trees
from ispen_dist.objectives import OUTER_OBJECTIVES
from ispen_dist.outer import OuterStep
from ispen_dist.recording.console import Console
from ispen_dist.recording.run_folder import RunFolder
from ispen_dist.trainer import Trainer

METHODS = Path(__file__).parent.parent / "configs" / "methods"
NAMES = sorted(path.stem for path in METHODS.glob("*.yaml"))
TASKS = ("labels", "tags")
LEARNS_NOTHING = {"mle", "mle_task", "task_explicit"}
"""Methods whose energy stays as the warm-up leaves it; the file says why."""
SHORT = {"warmup_rounds": 1, "max_outer_steps": 2, "num_threads": 1, "dtype": "float64"}


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    """The configuration files of both tasks, beside their data."""
    folder = tmp_path_factory.mktemp("tasks")
    features = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    np.savez(folder / "all.npz", features=features, targets=(features[:, :3] > 0).astype(np.uint8))
    for name, size, seed in (("train", 22, 0), ("dev", 6, 1)):
        (folder / f"{name}.conll").write_text(tagged_text(size, seed))
    data = {
        "labels": {"task": "multilabel", "format": "npz", "train": ["all.npz"]},
        "tags": {"train": ["train.conll"], "dev": "dev.conll"},
    }
    files = {}
    for task, settings in (("labels", LABELS), ("tags", TAGS)):
        own = {"data": data[task] | {"root": str(folder)}, "train": SHORT}
        own["solver"] = {"max_steps": 3, "damping": 30.0}  # no solve of so raw a network fails
        files[task] = folder / f"{task}.yaml"
        files[task].write_text(yaml.safe_dump(settings | own))
    return files


@pytest.fixture(scope="module")
def session():
    session = Session()
    yield session
    session.close()


def trainer_of(session, task_file, method):
    config = load_config(task_file, METHODS / f"{method}.yaml")
    folder = RunFolder(Path("unused"), config, Console(is_main=False), is_main=False)
    return Trainer(config, load_splits(config), session, folder)


def take_rounds(trainer, until=None):
    """Train without records up to a round, and return the figures of every round."""
    rows = []
    while trainer.round < (until or trainer.num_rounds):
        rows.append(trainer.rounds.take(trainer.round))
        trainer.round += 1
    return rows


def parameters(trainer):
    """Return copies of both networks by name."""
    return {name: trees.copied(engine.parameters()) for name, engine in trainer.engines.items()}


def same(first, second):
    assert first.keys() == second.keys()
    return all(torch.equal(first[k], second[k]) for k in first)


def test_the_method_files_are_those_that_the_readme_names():
    table = (METHODS.parent.parent / "README.md").read_text("utf-8")
    section = table.partition("### Methods")[2].partition("\n### ")[0]
    pairs = {f"{o}_{m}" for o in ("ssvm", "dvn", "cd", "nce", "task", "nce_task")
             for m in ("explicit", "implicit")}  # fmt: skip
    assert pairs < set(NAMES)
    for name in set(NAMES) - pairs:
        assert f"`{name}`" in section, name


@pytest.mark.parametrize(
    ("name", "task"),
    [
        # The losses of the pairs are trained on tags by other tests.
        pytest.param(name, task, marks=[pytest.mark.thorough] if task == "tags" and pair else [])
        for name in NAMES
        for task in TASKS
        for pair in [name.endswith(("_explicit", "_implicit"))]
    ],
)
def test_every_method_trains(name, task, task_files, session):
    if name.startswith("crf") and task == "labels":
        with pytest.raises(ConfigError, match=r"energy\.name: expected linear_chain for outer"):
            load_config(task_files[task], METHODS / f"{name}.yaml")
        return
    trainer = trainer_of(session, task_files[task], name)
    rows = take_rounds(trainer, 1)
    before = parameters(trainer)
    rows += take_rounds(trainer)
    for row in rows:
        assert all(math.isfinite(v) for k, v in row.items() if k != "residual"), row
    assert all(math.isfinite(v) for v in trainer._evaluate(trainer.splits.dev, {}).values())
    after = parameters(trainer)
    assert same(before["energy"], after["energy"]) == (name in LEARNS_NOTHING)
    by_stander = not trainer.config.inference.by_network
    assert same(before["inference_net"], after["inference_net"]) == by_stander
    assert sum("outer_loss" in row for row in rows) == (0 if name in ("mle", "mle_task") else 2)


def test_the_registry_and_the_settings_agree_on_what_holds_theta_constant():
    constant = {name for name, row in OUTER_OBJECTIVES.items() if not row.depends_on_theta}
    assert constant == set(WITHOUT_THETA)


def test_mean_field_trains_as_the_network_alone_and_predicts_something_else(task_files, session):
    pair = ["nce_task_identity", "nce_task_identity_mean_field"]
    trainers = [trainer_of(session, task_files["labels"], name) for name in pair]
    for trainer in trainers:
        take_rounds(trainer)
    first, second = (parameters(trainer) for trainer in trainers)
    for name, tree in first.items():
        assert same(tree, second[name])
    sample = trainers[0].splits.dev.collate([0, 1, 2])
    inputs = sample.to(sample.weight.device, torch.float64).inputs
    alone, corrected = (predict(t.players, t.engines, inputs) for t in trainers)
    b = trainers[0].players.energy.potentials(inputs).detach()
    head = trainers[0].players.energy.label_bias
    assert (alone - corrected).abs().min() > 1e-3
    assert (corrected - alone - b - head).abs().max() < 1.0  # what the small global term adds


# -- orders --------------------------------------------------------------------------------------


def test_energy_first_learns_one_network_at_a_time(task_files, session):
    trainer = trainer_of(session, task_files["labels"], "seal_static_nce")
    assert trainer.num_rounds == 1 + 2 + 2
    take_rounds(trainer, 1)
    warm = parameters(trainer)
    rows = take_rounds(trainer, 3)
    assert all("outer_loss" in row and "inner_loss" not in row for row in rows)
    learned = parameters(trainer)
    assert same(learned["inference_net"], warm["inference_net"])
    assert not same(learned["energy"], warm["energy"])
    rows = take_rounds(trainer)
    assert all("outer_loss" not in row and row["energy"] != 0.0 for row in rows)
    assert same(parameters(trainer)["energy"], learned["energy"])
    assert not same(parameters(trainer)["inference_net"], learned["inference_net"])
    assert trainer.engines.inference_net.num_taken == 3 * trainer.config.inner.steps


@pytest.mark.parametrize(("method", "stop"), [("seal_static_nce", 2), ("seal_static_nce", 4),
                                              ("dvn", 2), ("infnet", 3)])  # fmt: skip
def test_a_run_goes_on_bit_for_bit_in_the_middle_of_every_order(method, stop, task_files, session):
    whole = trainer_of(session, task_files["tags"], method)
    take_rounds(whole, stop)
    trees, state = copy.deepcopy((whole._trees(), whole._state()))
    expected = take_rounds(whole)
    resumed = trainer_of(session, task_files["tags"], method)
    resumed.restore(Checkpoint(stop, trees, state))
    assert take_rounds(resumed) == expected
    for name, tree in parameters(whole).items():
        assert same(parameters(resumed)[name], tree), name


def test_outer_steps_of_a_round_count_through(task_files, session, monkeypatch):
    trainer = trainer_of(session, task_files["labels"], "seal_nce")
    values = config_to_dict(trainer.config)
    values["outer"]["steps"] = 3
    config = config_from_dict(values)
    several = Trainer(config, trainer.splits, session, trainer.folder)
    seen = []
    take = OuterStep.__call__
    monkeypatch.setattr(OuterStep, "__call__", lambda *at: seen.append(at[-1]) or take(*at))
    take_rounds(several)
    assert seen == list(range(6))
    assert several.engines.energy.num_taken == several.rounds.learning.num_steps == 6


@pytest.mark.thorough
@pytest.mark.parametrize("runtime", ["replicas", "zero3", "fsdp2"])
@pytest.mark.parametrize(
    ("method", "inference", "fixed"),
    [
        ("dvn", "gradient_descent", "mle"),
        ("spen_unrolled", "gradient_descent", "mle"),
        ("infnet_plus", "network", "mle"),
        ("ssvm_explicit", "mean_field", "mle"),
        ("task_implicit", "network", "mle_task"),
    ],
)
def test_two_ranks_learn_what_one_does(method, inference, fixed, runtime, task_files, tmp_path):
    """Also where the energy that descent and mean field read is sharded."""
    arguments = [
        "--config", str(task_files["labels"]), "--config", str(METHODS / f"{method}.yaml"),
        "--inference_net.dropout=0", "--energy.features.dropout=0", "--train.dtype=float32",
        "--energy.freeze_local=false", f"--inference.name={inference}",
        f"--inner.fixed={fixed}",
    ]  # fmt: skip
    for name, num_ranks in (("replicas", 1), (runtime, 2)):
        output = str(tmp_path / str(num_ranks))
        start_ranks(TRAIN, num_ranks, *arguments, "--output", output, runtime=name)
    one, two = rows_of(tmp_path / "1"), rows_of(tmp_path / "2")
    assert len(one) == len(two) > 3
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for key in first.keys() - {"phase"}:
            assert second[key] == pytest.approx(first[key], rel=1e-3, abs=1e-5), key
