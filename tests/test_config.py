"""Settings: precedence, round trips, help, and the message of everything that can be wrong."""

import ast
import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest
import yaml

import ispen_dist.config as config_package
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


def parsed(path, *flags):
    return parse_train(["--config", str(path), *flags])


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


def error_of(capsys, *arguments):
    """Return the one line on stderr that a refused command line leaves."""
    with pytest.raises(SystemExit) as end:
        parse_train(arguments)
    assert end.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error.removeprefix("error: ")


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
