"""Settings: precedence, round trips and help."""

import ast
import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
import yaml
from command_lines import MINIMAL, parsed

import ispen_dist.config as config_package
from ispen_dist.command_line import (
    config_from_dict,
    config_to_dict,
    dump_config,
    load_config,
    parse_train,
)
from ispen_dist.config import Config


def test_flags_win_over_the_file_and_the_file_over_defaults(config_file):
    path = config_file(MINIMAL | {"inner": {"steps": 7, "batch_size": 9}})
    command = parsed(
        path, "--inner.steps=3", "--inner.optimizer.learning_rate", "1e-2", "--output", "out"
    )
    config = command.config
    assert (config.inner.steps, config.inner.batch_size, config.outer.batch_size) == (3, 9, 128)
    assert config.inner.optimizer.learning_rate == 0.01
    assert config.inner.optimizer.clip_norm == 5.0
    assert (command.name, str(command.output), command.resume) == ("some", "out", "auto")
    assert not command.print_config


def test_a_bare_command_has_no_folder_and_its_own_flags_are_kept(config_file):
    path = config_file(MINIMAL)
    assert parsed(path).output is None
    command = parsed(path, "--resume", "some/checkpoint", "--print-config")
    assert (command.resume, command.print_config) == ("some/checkpoint", True)


FLAGS = {
    "list": ("--data.train=[a.conll, b.conll]", "data.train", ["a.conll", "b.conll"]),
    "mapping replaces": ('--data.extra={"x": "y"}', "data.extra", {"x": "y"}),
    "empty text": ("--data.dev=", "data.dev", ""),
    "text like a number": ("--data.dev=12", "data.dev", "12"),
    "text like a date": ("--data.dev=2020-13-45", "data.dev", "2020-13-45"),
    "text like null": ("--data.dev=null", "data.dev", "null"),
    "text like a mapping": ("--data.dev=a: b", "data.dev", "a: b"),
    "text like a tag": ("--data.dev=!!python/name:os.system", "data.dev", None),
    "choice": ("--solver.name=neumann", "solver.name", "neumann"),
    "switch": ("--data.zero_based=false", "data.zero_based", False),
    "scientific": ("--inner.energy_weight=2e-3", "inner.energy_weight", 0.002),
    "whole number for a fraction": ("--inner.energy_weight=2", "inner.energy_weight", 2.0),
}


@pytest.mark.parametrize("case", FLAGS)
def test_a_flag_is_read_by_the_type_of_its_setting(case, config_file):
    flag, name, expected = FLAGS[case]
    expected = flag.partition("=")[2] if expected is None else expected
    path = config_file({"data": {"train": ["x.conll"], "dev": "d", "extra": {"old": "o"}}})
    value = parsed(path, flag).config
    for key in name.split("."):
        value = getattr(value, key)
    assert value == expected
    assert type(value) is type(expected)


def test_the_last_of_two_equal_flags_wins(config_file):
    command = parsed(config_file(MINIMAL), "--inner.steps=3", "--inner.steps=4")
    assert command.config.inner.steps == 4


def test_of_several_files_the_later_wins_setting_by_setting(tmp_path):
    first, second = tmp_path / "task.yaml", tmp_path / "method.yaml"
    first.write_text(
        "data: {train: [x], extra: {a: b}}\ninner: {steps: 3, optimizer: {clip_norm: 1.0}}\n"
    )
    second.write_text("data: {extra: {c: d}}\ninner: {steps: 4, optimizer: {weight_decay: 0.5}}\n")
    command = parsed(first, "--config", str(second), "--inner.batch_size=9")
    assert command.name == "task-method"
    assert command.config == parsed(first, "--inner.batch_size=9", "--config", str(second)).config
    inner = command.config.inner
    assert (inner.steps, inner.batch_size) == (4, 9)
    assert (inner.optimizer.clip_norm, inner.optimizer.weight_decay) == (1.0, 0.5)
    assert command.config.data.extra == {"c": "d"}
    assert load_config(first, second).inner.steps == 4
    assert load_config(second, first).inner.steps == 3


def test_a_flag_changes_one_of_two_sections_that_share_an_anchor(config_file):
    shared = "inner: {optimizer: &o {learning_rate: 0.5}}\nouter: {optimizer: *o}\n"
    path = config_file("data: {train: [x]}\n" + shared)
    config = parsed(path, "--inner.optimizer.learning_rate=0.25").config
    assert config.inner.optimizer.learning_rate == 0.25
    assert config.outer.optimizer.learning_rate == 0.5


def test_yaml_merge_keys_work(config_file):
    path = config_file("data: {train: [x]}\ninner: {optimizer: &o {clip_norm: 1.0}}\n"
                       "outer: {optimizer: {<<: *o, weight_decay: 0.5}}\n")  # fmt: skip
    optimizer = load_config(path).outer.optimizer
    assert (optimizer.clip_norm, optimizer.weight_decay) == (1.0, 0.5)


def test_settings_survive_a_round_trip(tmp_path):
    config = config_from_dict(
        {
            "data": {
                "train": ["1e3", "null", "f\u00fcr.conll"],
                "extra": {"yes": "a: b", "1": "#"},
            },
            "outer": {"optimizer": {"learning_rate": 1e-05}},
            "inner": {"energy_weight": 0.1 + 0.2},
            "solver": {"name": "neumann"},
        }
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), "utf-8")
    assert load_config(path) == config
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_the_dump_names_every_setting():
    written = yaml.safe_load(dump_config(config_from_dict(MINIMAL)))
    for name in names_below(Config):
        section = written
        for key in name.split("."):
            section = section[key]


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "configs").glob("*.yaml")))
def test_the_shipped_configurations_load(path):
    assert load_config(path).data.train


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


def test_help_names_and_explains_every_setting(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no breaks at hyphens
    with pytest.raises(SystemExit) as end:
        parse_train(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    names = list(names_below(Config))
    assert len(names) > 60
    words = " ".join(text.split())
    entries = {e.split(" ", 1)[0]: e for e in re.split(r" --(?=[a-z_]+\.)", words)}
    for name in names:
        assert "(default: " in entries[name], name
    assert "(default: 0.0001)" in entries["outer.optimizer.learning_rate"]
    assert "lambda, the weight of the energy in the inner loss. (default: 0.1)" in words


def field_docs():
    """Yield the docstring below every field, read from the source."""
    sources = sorted(Path(config_package.__path__[0]).glob("*.py"))
    for node in (n for path in sources for n in ast.parse(path.read_text("utf-8")).body):
        for field, doc in itertools.pairwise(node.body if isinstance(node, ast.ClassDef) else []):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(doc, ast.Expr), f"a field without docstring: {ast.unparse(field)}"
                yield " ".join(ast.literal_eval(doc.value).split()).rstrip(".")


def test_help_shows_every_docstring_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        parse_train(["--help"])
    words = " ".join(capsys.readouterr().out.split())
    docs = list(field_docs())
    assert len(docs) > 60
    for doc in docs:
        assert doc in words
