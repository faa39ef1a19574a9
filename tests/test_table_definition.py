"""Files of tables: what they inherit, malformed ones, and those of the project."""

from pathlib import Path

import pytest
import yaml
from small_table import TABLE

from ispen_dist.command_line import load_config
from ispen_dist.tables.definition import TableError, read_table, table_paths

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": None}, "config: expected a file or a list of files, found None"),
        ({"config": []}, "config: expected a file or a list of files, found []"),
        ({"config": ["task.yaml", 1]}, "config: expected a file or a list of files, found ['task"),
        ({"methods": "mle"}, "methods: expected a list of names, found 'mle'"),
        ({"methods": ["mle", "mle"]}, "methods: expected every name once"),
        ({"reference": "crf"}, "reference: expected one of mle, nce_explicit"),
        ({"seeds": 0}, "seeds: expected a whole number of at least 1, found 0"),
        ({"budget": True}, "budget: expected a whole number of at least 0, found True"),
        ({"significance": "z"}, "significance: expected paired_t or wilcoxon, found 'z'"),
        ({"colour": 1}, "colour: expected one of the keys config"),
        ({"search": {}}, "search: expected a mapping of at least one setting"),
        ({"search": {"inner.stepz": [1]}}, "inner.stepz: no such setting; the nearest is inner.s"),
        ({"search": {"inner.steps": []}}, "search.inner.steps: expected a list of plain values"),
        ({"search": {"inner.steps": {"low": 1}}}, "search.inner.steps: expected a list of values"),
        ({"search": {"inner.steps": {"low": 2, "high": 1}}}, "high: expected a number above low=2"),
        (
            {"search": {"inner.steps": {"low": 0, "high": 1, "log": True}}},
            "low: expected a number above 0",
        ),
        (
            {"search": {"inner.steps": {"low": 1.0, "high": 5}}},
            "search.inner.steps.low: expected a whole number, found 1.0",
        ),
        (
            {"search": {"inner.steps": {"low": 1, "high": 2.5}}},
            "search.inner.steps.high: expected a whole number, found 2.5",
        ),
        (
            {"search": {"solver.name": {"low": 1, "high": 5}}},
            "search.solver.name: expected a list of values, as it is no number, found {",
        ),
        ({"search": {"inner.steps": [1, 2.5]}}, "search: inner.steps: expected int, got 2.5"),
        (
            {"search": {"inner.energy_weight": ["abc"]}},
            "search: inner.energy_weight: expected float, got 'abc'",
        ),
        ({"search": {"solver.name": ["cg", "gc"]}}, "solver.name: expected {cg,"),
        ({"search": {"train.read_test": [0]}}, "search: train.read_test: expected bool, got 0"),
        ({"search_of": []}, "search_of: expected a mapping of methods, found []"),
        ({"search_of": {"crf": ["inner.steps"]}}, "search_of.crf: expected one of mle"),
        ({"search_of": {"mle": [["a"]]}}, "search_of.mle: expected some of the settings of searc"),
        ({"search_of": {"mle": []}}, "search_of.mle: expected some of the settings of search, in"),
        ({"search_of": {"mle": ["inner.stepz"]}}, "search, inner.energy_weight, inner.steps, foun"),
        ({"refit": "mle"}, "refit: expected some of mle, nce_explicit, nce_implicit, found 'mle'"),
        ({"refit": ["crf"]}, "refit: expected some of mle, nce_explicit, nce_implicit, found ["),
        (
            {"methods": ["mle", "mle_refit"], "search_of": {}, "refit": ["mle"]},
            "methods: expected no method with the name of a refit, ['mle_refit'], found",
        ),
        ({"base": "no.yaml"}, "base: expected a file, found"),
        ({"more_methods": ["crf"]}, "more_methods: expected a base, found 'none'"),
    ],
)
def test_a_malformed_table_is_named_with_its_key(write, tmp_path, change, message):
    path = write(yaml.safe_dump(TABLE | change), "bad.yaml")
    with pytest.raises(TableError) as error:
        read_table(path, tmp_path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_a_table_has_the_keys_of_its_base_where_it_has_none(write, tmp_path):
    shared = {"base": "first.yaml", "seeds": 4, "search_of": {"nce_explicit": ["inner.steps"]}}
    write(yaml.safe_dump(TABLE), "first.yaml")
    write(yaml.safe_dump(shared), "second.yaml")
    own = {"base": "second.yaml", "budget": 0, "methods": ["nce_explicit", "mle"]}
    table = read_table(write(yaml.safe_dump(own), "third.yaml"), tmp_path)
    assert (table.name, table.metric, table.seeds, table.budget) == ("third", "f1", 4, 0)
    # Settings are searched by method: the first file's for one, the second's for the other.
    assert {m: list(space) for m, space in table.spaces.items()} == {
        "nce_explicit": ["inner.steps"],
        "mle": ["inner.steps"],
    }
    more = {"base": "second.yaml", "more_methods": ["crf"]}
    table = read_table(write(yaml.safe_dump(more), "fourth.yaml"), tmp_path)
    assert list(table.method_files) == [*TABLE["methods"], "crf"]
    twice = write(yaml.safe_dump(more | {"more_methods": ["mle"]}), "fourth.yaml")
    with pytest.raises(TableError, match=r"fourth\.yaml: methods: expected every name once"):
        read_table(twice, tmp_path)
    # A mistake is named in the file that has it.
    for methods in (3, "mle"):
        write(yaml.safe_dump(shared | {"methods": methods}), "second.yaml")
        write(yaml.safe_dump(more), "fourth.yaml")
        with pytest.raises(TableError, match=r"second\.yaml: methods: expected a list of names"):
            read_table(tmp_path / "fourth.yaml", tmp_path)
    write(yaml.safe_dump(shared | {"colour": 1}), "second.yaml")
    with pytest.raises(TableError, match=r"second\.yaml: colour: expected one of the keys"):
        read_table(tmp_path / "third.yaml", tmp_path)
    write(yaml.safe_dump({"base": "second.yaml"}), "first.yaml")
    write(yaml.safe_dump(shared), "second.yaml")
    with pytest.raises(TableError, match=r"first\.yaml: base: expected another file"):
        read_table(tmp_path / "third.yaml", tmp_path)


def test_of_several_files_of_a_task_each_wins_over_those_before(write, tmp_path):
    write("inner: {steps: 3, batch_size: 8}\nsolver: {max_steps: 5}\n", "task.yaml")
    write("inner: {batch_size: 4}\n", "over.yaml")
    write("solver: {max_steps: 5}\ninner: {batch_size: 4, steps: 3}\n", "joined.yaml")
    write("inner: {fixed: mle}\n", "mle.yaml")

    def settings_sum(*names):
        path = write(yaml.safe_dump(TABLE | {"config": list(names)}), "table.yaml")
        table = read_table(path, tmp_path)
        assert table.configs == tuple(tmp_path / name for name in names)
        return table.settings_sum("mle", 0)

    # What the files say together counts, not which file says it.
    assert settings_sum("task.yaml", "over.yaml") == settings_sum("joined.yaml")
    assert settings_sum("over.yaml", "task.yaml") != settings_sum("joined.yaml")
    assert settings_sum("task.yaml") != settings_sum("joined.yaml")


def test_a_key_that_is_missing_or_there_twice_is_refused(write, tmp_path):
    incomplete = {k: v for k, v in TABLE.items() if k != "metric"}
    path = write(yaml.safe_dump(incomplete))
    with pytest.raises(TableError, match="metric: expected a value, found 'nothing'"):
        read_table(path, tmp_path)
    path = write(yaml.safe_dump(TABLE) + "seeds: 3\n")
    with pytest.raises(TableError, match="key seeds twice"):
        read_table(path, tmp_path)


@pytest.mark.parametrize(
    "path", list(table_paths(ROOT / "configs" / "tables")), ids=lambda p: p.stem
)
def test_the_tables_of_the_project_are_well_formed(path):
    table = read_table(path, ROOT / "configs" / "methods")
    assert all(file.is_file() for file in table.method_files.values())  # read by test_methods
    load_config(*table.configs)
    implicit = [m for m in table.method_files if m.endswith("_implicit")]
    assert {f"{m.removesuffix('_implicit')}_explicit" for m in implicit} <= set(table.method_files)
