"""The message of everything that can be wrong in settings, files and flags."""

import pytest
from command_lines import MINIMAL, error_of

from ispen_dist.command_line import config_from_dict, load_config
from ispen_dist.config import ConfigError


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("inner: {stepz: 1}", "{method}: inner.stepz: no such setting"),
        ("inner: {steps: x}", "{method}: inner.steps: expected int"),
        ("inner: {batch_size: 3}", "{task}: inner.steps: expected at least 1, got 0"),
        (
            "train: {method: mle, order: energy_first}\ninner: {steps: 1}",
            "{method}: train.order",
        ),
        (
            "inference: {name: viterbi}\ninner: {steps: 1}",
            "{task}, {method}: train.method",
        ),
    ],
)
def test_of_several_files_the_one_at_fault_is_named(method, message, tmp_path, capsys):
    first, second = tmp_path / "task.yaml", tmp_path / "method.yaml"
    first.write_text("data: {train: [x]}\ninner: {steps: 0}\n")
    second.write_text(method)
    error = error_of(capsys, "--config", str(first), "--config", str(second))
    assert error.startswith(message.format(task=first, method=second)), error


TAGGING = {
    "unknown section": ({"iner": {}}, "iner: no such setting; the nearest is inner"),
    "setting without its section": (
        {"weight_decay": 0.1}, "nearest is outer.optimizer.weight_decay",
    ),
    "dotted name": ({"inner.steps": 3}, "inner.steps: expected one name, got a dotted one"),
    "unknown key": ({"inner": {"stepz": 1}}, "no such setting; the nearest is inner.steps"),
    "unknown deep key": (
        {"outer": {"optimizer": {"rate": 1}}},
        "outer.optimizer.rate: no such setting; the nearest is outer.optimizer.learning_rate",
    ),
    "section that is a number": ({"inner": 3}, "inner: expected a mapping of settings, got 3"),
    "text for a number": ({"inner": {"steps": "many"}}, "inner.steps: expected int, got 'many'"),
    "fraction for a count": ({"inner": {"steps": 1.5}}, "inner.steps: expected int, got 1.5"),
    "unknown choice": (
        {"solver": {"name": "gmres"}},
        "solver.name: expected {cg,cg_single_reduction,pcg,neumann,nystrom,identity,sama}, got",
    ),
    "section that is empty": ({"inner": None}, "inner: expected a mapping of settings, got"),
    "nothing for a number": ({"inner": {"steps": None}}, "inner.steps: expected int, got nothing"),
    "nothing for text": ({"data": {"dev": None}}, "data.dev: expected str, got nothing; leave it"),
    "switch for a count": ({"inner": {"steps": True}}, "inner.steps: expected int, got True"),
    "count for a switch": ({"data": {"zero_based": 1}}, "data.zero_based: expected bool, got 1"),
    "section for a number": ({"inner": {"steps": {"a": 1}}}, "steps: expected int, got {'a': 1}"),
    "text for a list": ({"data": {"train": "x"}}, "data.train: expected list[str], got 'x'"),
    "number in a list": ({"data": {"train": ["x", 2]}}, "expected list[str], got ['x', 2]"),
    "list for a mapping": ({"data": {"extra": ["x"]}}, "data.extra: expected dict[str, str], got"),
    "number in a mapping": ({"data": {"extra": {"a": 1}}}, "expected dict[str, str], got {'a': 1}"),
    "lines in text": ({"inner": {"steps": "a\nb"}}, "inner.steps: expected int, got 'a\\nb'"),
    "long text": ({"inner": {"steps": "x" * 999}}, "inner.steps: expected int, got 'xxx"),
    "a series and damping": (
        {"solver": {"name": "neumann", "on_failure": "damp"}},
        "solver.on_failure: expected skip or stop for solver.name=neumann, got 'damp'; it diverges",
    ),
    "dev beside a split file": (
        {"data": {"train": ["t"], "dev": "d", "split_file": "s"}},
        "data.dev: expected none beside data.split_file, which has a part of that name, got 'd'",
    ),
    "below its range": ({"inner": {"steps": 0}}, "inner.steps: expected at least 1, got 0"),
    "above its range": (
        {"inference_net": {"dropout": 1.5}},
        "inference_net.dropout: expected a number in [0, 0.99], got 1.5",
    ),
    "nested range": (
        {"inner": {"optimizer": {"learning_rate": -1.0}}},
        "inner.optimizer.learning_rate: expected at least 0, got -1.0",
    ),
    "not a number": (
        {"inner": {"energy_weight": float("nan")}},
        "inner.energy_weight: expected a finite number, got nan",
    ),
    "infinite": (
        {"outer": {"optimizer": {"learning_rate": float("inf")}}},
        "outer.optimizer.learning_rate: expected a finite number, got inf",
    ),
    "heads that do not divide": (
        {"inference_net": {"name": "transformer", "num_heads": 3}},
        "inference_net.num_heads: expected a divisor of inference_net.hidden_size=128, got 3",
    ),
    "scores that read nothing": (
        {"outer": {"score_scale": 0.0}}, "outer.score_scale: expected at least 1e-30, got 0.0",
    ),
    "nested network": (
        {"energy": {"features": {"dropout": -0.5}}},
        "energy.features.dropout: expected a number in [0, 0.99], got -0.5",
    ),
    "no training file": ({"data": {"train": []}}, "data.train: expected at least one file"),
    "no dev set": ({"data": {"train": ["x"], "dev_fraction": 0.0}}, "data.dev_fraction: expected"),
    "format of another task": (
        {"data": {"train": ["x"], "format": "arff"}},
        "data.format: expected one of conll, conllu, npz for data.task=tagging, got 'arff'",
    ),
    "network of another task": (
        {"inference_net": {"name": "mlp"}},
        "inference_net.name: expected one of bilstm, transformer",
    ),
    "energy of another task": (
        {"energy": {"name": "label_interaction"}}, "energy.name: expected one of linear_chain, ",
    ),
    "nce without a task cost": (
        {"outer": {"objective": "nce"}}, "outer.task_weight: expected a number above 0",
    ),
    "entities in tags that spell none": (
        {"outer": {"entity_weight": 3.0}}, "outer.entity_weight: expected 1 for data.spans=none",
    ),
    "implicit without energy": (
        {"inner": {"energy_weight": 0.0}}, "inner.energy_weight: expected a number above 0",
    ),
    "nystrom without damping": (
        {"solver": {"name": "nystrom", "damping": 0.0}},
        "solver.damping: expected a number above 0 for solver.name=nystrom",
    ),
    "ranking without a task cost": (
        {"outer": {"objective": "ranking"}}, "outer.task_weight: expected a number above 0",
    ),
    "inference that does without theta": (
        {"inference": {"name": "gradient_descent"}},
        "train.method: expected explicit for inference.name=gradient_descent, got 'implicit'; the",
    ),
    "an energy that is not learned": (
        {"inference": {"name": "mean_field"}, "train": {"method": "mle"}},
        "inference.name: expected network for train.method=mle, got 'mean_field'; no energy",
    ),
    "rounds for a by-stander": (
        {
            "inference": {"name": "gradient_descent"},
            "train": {"method": "explicit", "fine_tune": 1.0},
        },
        "train.fine_tune: expected 0.0 for inference.name=gradient_descent, got 1.0",
    ),
    "a network that is frozen and solved for": (
        {"train": {"order": "energy_first"}}, "train.order: expected alternate",
    ),
    "unrolled network": (
        {"inference": {"unrolled": True}}, "inference.unrolled: expected false",
    ),
    "cost that nothing reads": (
        {"inference": {"cost_augmented": True}}, "outer.objective: expected ssvm or ssvm_plus for",
    ),
    "task cost of a cost-augmented structure": (
        {
            "inference": {"name": "gradient_descent", "cost_augmented": True},
            "outer": {"objective": "ssvm", "task_weight": 1.0},
            "train": {"method": "explicit"},
        },
        "outer.task_weight: expected 0 for inference.name=gradient_descent with",
    ),
    "one structure for two": (
        {"outer": {"objective": "ssvm_plus"}}, "inference.cost_augmented: expected true",
    ),
    "threshold of tags": (
        {"inference": {"threshold": 0.5}},
        "inference.threshold: expected 0.0 for data.task=tagging",
    ),
    "decoder of tags": (
        {"inference": {"decoder": "expected_f1"}},
        "inference.decoder: expected threshold for data.task=tagging",
    ),
    "patience without a dev set": (
        {"data": {"train": ["x"], "train_on_dev": True}, "train": {"patience": 3}},
        "train.patience: expected 0 with data.train_on_dev, got 3",
    ),
    "damping that cannot grow": (
        {"solver": {"on_failure": "damp", "damping": 0.0}},
        "solver.damping: expected a number above 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TAGGING)
def test_settings_that_cannot_work_are_named(case):
    values, message = TAGGING[case]
    with pytest.raises(ConfigError) as error:
        config_from_dict(MINIMAL | values)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("values", [None, [], "data", 3])
def test_settings_that_are_no_mapping_are_refused(values):
    with pytest.raises(ConfigError, match=r"^expected a mapping of settings, got "):
        config_from_dict(values)


FILES = {
    "empty": ("", "expected a mapping of settings, got nothing"),
    "only a comment": ("# data:\n", "expected a mapping of settings, got nothing"),
    "a list": ("- 1\n- 2\n", "expected a mapping of settings, got [1, 2]"),
    "prose": ("just some words\n", "expected a mapping of settings, got 'just some words'"),
    "not YAML": ("data: {train: [a\n", "line 2: expected readable YAML, got"),
    "a tab": ("data:\n\ttrain: [a]\n", "line 2: expected readable YAML, got"),
    "two documents": ("data: {train: [a]}\n---\ninner: {}\n", "line 2: expected readable YAML"),
    "a key twice": ("data: {train: [a]}\ninner: {steps: 1, steps: 2}\n", "line 2: expected"),
    "a section twice": ("inner: {}\ndata: {train: [a]}\ninner: {}\n", "got: key inner twice"),
    "a number as key": ("data: {train: [a], extra: {1: x}}\n", "got: a key that is no name"),
    "a list as key": ("[a]: 1\n", "got: a key that is no name"),
    "an impossible date": ("data: {train: [a], dev: 2020-13-45}\n", "expected readable YAML, got"),
    "a tagged number": ("data: {train: [a]}\ninner: {steps: !!int x}\n", "expected readable YAML"),
    "endless depth": ("[" * 1000, "expected readable YAML, got: maximum recursion depth"),
    "a number beyond floats": ("inner: {energy_weight: 1" + "0" * 400 + "}\n", "too large"),
    "a mapping inside itself": ("data: {train: [a], extra: &a {x: *a}}\n", "data.extra: expected"),
    "binary": ("data: \x00\n", "expected readable YAML, got: special characters"),
    "an unknown key": ("inner: {stepz: 1}\n", "inner.stepz: no such setting; the nearest is inner"),
    "a wrong type": ("inner: {steps: x}\ndata: {train: [a]}\n", "inner.steps: expected int"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_read_is_one_line_and_exit_code_2(case, config_file, capsys):
    content, message = FILES[case]
    path = config_file(content)
    error = error_of(capsys, "--config", str(path))
    assert error.startswith(f"{path}: ")
    assert message in error
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_absent_a_folder_or_not_text(tmp_path, capsys):
    assert "No such file" in error_of(capsys, "--config", str(tmp_path / "absent.yaml"))
    assert "Is a directory" in error_of(capsys, "--config", str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes(b"data: {train: [\xe4]}\n")
    assert "expected readable YAML" in error_of(capsys, "--config", str(tmp_path / "latin.yaml"))


NO_SUCH = "--{}: no such setting; the nearest is --{}"
BAD_FLAGS = {
    "unknown field": (["--inner.stepz=3"], NO_SUCH.format("inner.stepz", "inner.steps")),
    "unknown section": (["--iner.steps", "3"], NO_SUCH.format("iner.steps", "inner.steps")),
    "unknown flag": (["--ouput=x"], NO_SUCH.format("ouput", "output")),
    "shortened flag": (["--out=x"], NO_SUCH.format("out", "output")),
    "whole section": (["--inner={steps: 3}"], NO_SUCH.format("inner", "inner.")),
    "stray word": (["word"], "unrecognized arguments: word"),
    "no value": (["--inner.steps"], "--inner.steps: expected one argument"),
    "a flag for a value": (["--inner.steps", "--outer.task_weight=3"], "--inner.steps: expected"),
    "no folder": (["--output"], "--output: expected one argument"),
    "wrong type": (["--inner.steps=many"], "--inner.steps: expected int, got 'many'"),
    "fraction": (["--inner.steps=1.5"], "--inner.steps: expected int, got 1.5"),
    "nothing": (["--inner.steps="], "--inner.steps: expected int, got nothing"),
    "choice": (["--solver.name=gmres"], "--solver.name: expected {cg,cg_single_reduction"),
    "range": (["--inner.steps", "-1"], "--inner.steps: expected at least 1, got -1"),
    "no list": (["--data.train=x"], "--data.train: expected list[str], got 'x'"),
    "open list": (["--data.train=[x"], "--data.train: expected list[str], got '[x'"),
    "object": (["--inner.steps=!!python/name:os.system"], "--inner.steps: expected int, got '!!py"),
    "combination": (["--inner.energy_weight=0"], "--inner.energy_weight: expected a number"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_wrong_flag_is_named_as_a_flag(case, config_file, capsys):
    flags, message = BAD_FLAGS[case]
    assert error_of(capsys, "--config", str(config_file(MINIMAL)), *flags).startswith(message)


def test_without_a_file_the_flag_is_named(capsys):
    assert "--config" in error_of(capsys)
    assert "--config" in error_of(capsys, "--inner.steps=3")


def test_an_error_in_the_file_is_not_blamed_on_another_flag(config_file, capsys):
    path = config_file(MINIMAL | {"inner": {"steps": 0}})
    error = error_of(capsys, "--config", str(path), "--inner.batch_size=3")
    assert error.startswith(f"{path}: inner.steps: expected at least 1")


CODE = {
    "tag": "data: !!python/object/apply:os.system ['touch X']\n",
    "tag in a value": "data: {train: [!!python/object/apply:os.system ['touch X']]}\n",
    "name": "data: {train: [!!python/name:os.system ]}\n",
    "class of a section": "data: {class_path: os.system, init_args: {command: 'touch X'}}\n",
    "class of a value": "data: {train: [a]}\n"
    "inner: {steps: {class_path: os.system, init_args: {command: 'touch X'}}}\n",
}


@pytest.mark.parametrize("case", CODE)
def test_a_configuration_cannot_run_code(case, config_file, tmp_path):
    canary = tmp_path / "canary"
    with pytest.raises(ConfigError):
        load_config(config_file(CODE[case].replace("X", str(canary))))
    assert not canary.exists()
