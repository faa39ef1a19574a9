"""Settings: precedence, round trips, help, and the message of everything that can be wrong."""

import dataclasses

import pytest
import yaml

from ispen_dist.command_line import (
    config_from_dict,
    config_to_dict,
    dump_config,
    load_config,
    parse_train,
)
from ispen_dist.config import Config, ConfigError

MINIMAL = {"data": {"train": ["x.conll"]}}


@pytest.fixture
def config_file(tmp_path):
    def written(content):
        path = tmp_path / "some.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return written


def test_flags_win_over_the_file_and_the_file_over_defaults(config_file):
    path = config_file(MINIMAL | {"inner": {"steps": 7, "batch_size": 9}})
    command = parse_train(
        ["--config", str(path), "--inner.steps=3", "--inner.optimizer.learning_rate", "1e-2",
         "--data.train=[a.conll, b.conll]", "--data.extra={more: c.conll}", "--output", "out"]
    )  # fmt: skip
    config = command.config
    assert (config.inner.steps, config.inner.batch_size, config.outer.batch_size) == (3, 9, 128)
    assert config.inner.optimizer.learning_rate == 0.01
    assert config.data.train == ["a.conll", "b.conll"]
    assert config.data.extra == {"more": "c.conll"}
    assert (command.name, str(command.output), command.resume) == ("some", "out", "auto")


def test_settings_survive_a_round_trip(tmp_path):
    config = config_from_dict(
        MINIMAL | {"outer": {"optimizer": {"learning_rate": 1e-05}}, "solver": {"name": "neumann"}}
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert config_from_dict(config_to_dict(config)) == config


def test_the_outer_optimizer_keeps_its_own_default():
    assert config_from_dict(MINIMAL).outer.optimizer.learning_rate == 1e-4
    partly = config_from_dict(MINIMAL | {"outer": {"optimizer": {"clip_norm": 1.0}}})
    assert partly.outer.optimizer.learning_rate == 1e-4


def names_below(kind, prefix=""):
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from names_below(field.type, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


def test_help_names_and_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as end:
        parse_train(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    names = list(names_below(Config))
    assert len(names) > 60
    for name in names:
        assert f"--{name}" in text, name
    assert "lambda, the weight of the energy" in " ".join(text.split())


TAGGING = {
    "unknown section": ({"iner": {}}, "iner: no such setting; the nearest is inner"),
    "unknown key": ({"inner": {"stepz": 1}}, "no such setting; the nearest is inner.steps"),
    "unknown deep key": (
        {"outer": {"optimizer": {"rate": 1}}},
        "outer.optimizer.rate: no such setting; the nearest is outer.optimizer.learning_rate",
    ),
    "section that is a number": ({"inner": 3}, "inner: expected a section with settings, got 3"),
    "text for a number": ({"inner": {"steps": "many"}}, "inner.steps: expected int, got many"),
    "fraction for a count": ({"inner": {"steps": 1.5}}, "inner.steps: expected int, got 1.5"),
    "unknown choice": (
        {"solver": {"name": "gmres"}},
        "solver.name: expected Literal['cg', 'neumann', 'identity'], got gmres",
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
        "inner.energy_weight: expected at least 0, got nan",
    ),
    "no training file": ({"data": {"train": []}}, "data.train: expected at least one file"),
    "no dev set": ({"data": {"train": ["x"], "dev_fraction": 0.0}}, "data.dev_fraction: expected"),
    "format of another task": (
        {"data": {"train": ["x"], "format": "arff"}},
        "data.format: expected one of conll, conllu for data.task=tagging, got 'arff'",
    ),
    "network of another task": (
        {"inference_net": {"name": "mlp"}},
        "inference_net.name: expected one of bilstm, transformer",
    ),
    "energy of another task": (
        {"energy": {"name": "label_interaction"}}, "energy.name: expected linear_chain",
    ),
    "nce without a task cost": (
        {"outer": {"objective": "nce"}}, "outer.task_weight: expected a number above 0",
    ),
    "implicit without energy": (
        {"inner": {"energy_weight": 0.0}}, "inner.energy_weight: expected a number above 0",
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


FILES = {
    "empty": ("", "expected a mapping of sections, got an empty file"),
    "a list": ("- 1\n- 2\n", "expected a mapping of sections, got list"),
    "not YAML": ("data: {train: [a\n", "line 2: expected YAML, got"),
    "a tab": ("data:\n\ttrain: [a]\n", "line 2: expected YAML, got"),
    "a key twice": ("data: {train: [a]}\ninner: {steps: 1, steps: 2}\n", "steps: expected once"),
    "a Python object": ("data: !!python/object/apply:os.getcwd []\n", "expected YAML, got"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_read_is_one_line_and_exit_code_2(case, config_file, capsys):
    content, message = FILES[case]
    path = config_file(content)
    with pytest.raises(SystemExit) as end:
        parse_train(["--config", str(path)])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_file_and_a_flag_without_value(tmp_path, config_file, capsys):
    with pytest.raises(SystemExit):
        parse_train(["--config", str(tmp_path / "absent.yaml")])
    assert "absent.yaml: expected a readable YAML file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_train(["--config", str(config_file(MINIMAL)), "--inner.steps"])
    assert "--inner.steps: expected a value, got none" in capsys.readouterr().err


def test_a_configuration_cannot_name_code():
    with pytest.raises(ConfigError):
        config_from_dict({"data": {"class_path": "os.system", "init_args": {"command": "true"}}})
