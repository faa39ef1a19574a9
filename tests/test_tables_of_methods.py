"""Tables of methods: resume, equal budgets, test left alone, statistics, their records."""

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rich.console import Console
from scipy import stats
from small_table import TABLE

from ispen_dist.exits import Exit
from ispen_dist.tables.definition import TableError, read_table
from ispen_dist.tables.grid import Grid
from ispen_dist.tables.progress import TableProgress
from ispen_dist.tables.record import FinalRun, read_record
from ispen_dist.tables.runs import Interrupted, Run, RunFailed
from ispen_dist.tables.summary import csv_text, markdown_text, p_value, table_rows

ROOT = Path(__file__).parent.parent
TRIALS = ["trial-000", "trial-001", "trial-002"]


class FakeRuns:
    """Trains nothing: writes what a run leaves, and remembers what it was asked for."""

    def __init__(self, dies_before=None, fails=None, has_test=None):
        self.asked: list[Run] = []
        self.has_test = has_test or (lambda run: True)
        self.dies_before, self.fails = dies_before, fails or (lambda run: None)

    def __call__(self, run):
        if summary := run.summary():
            return summary
        if self.dies_before is not None and len(self.asked) == self.dies_before:
            raise KeyboardInterrupt
        self.asked.append(run)
        if code := self.fails(run):
            raise RunFailed(run, code, run.log)
        weight = run.settings.get("inner.energy_weight", 1.0)
        choices = {"threshold": 0.3, "temperature": 0.8, "empty_weight": 0.0}
        dev = {"f1": 0.5 - abs(weight - 2.0) / 100, **choices}
        dev = {} if run.settings.get("data.train_on_dev") else dev
        read = run.settings.get("train.read_test", True) and self.has_test(run)
        test = {"f1": 0.4 + run.settings["train.seed"] / 100, "threshold": 0.3} if read else {}
        run.folder.mkdir(parents=True)
        config = {
            "inner": {"energy_weight": weight, "steps": 10, "batch_size": 5},
            "train": {"seed": run.settings["train.seed"]},
        }
        (run.folder / "config.yaml").write_text(yaml.safe_dump(config))
        summary = {"dev": dev, "test": test, "seconds": 8.0, "rounds": 4, "train_examples": 100}
        (run.folder / "summary.json").write_text(json.dumps(summary))
        return summary

    def stop(self):
        pass


@pytest.fixture
def table(tmp_path):
    for method in TABLE["methods"]:
        (tmp_path / f"{method}.yaml").write_text("train: {method: mle}\n")
    (tmp_path / "task.yaml").write_text("data: {}\n")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TABLE))
    return read_table(tmp_path / "tiny.yaml", tmp_path)


def go(table, folder, runs, seeds=None, **changes):
    settings = {"methods": list(table.method_files), "budget": table.budget} | changes
    seeds = range(table.seeds) if seeds is None else seeds
    grid = Grid(table=table, folder=folder, runs=runs, jobs=1, seeds=seeds, **settings)
    with TableProgress(grid.num_runs, Console(file=io.StringIO())) as progress:
        grid.run(progress)
    # Trials of an earlier command are counted too.
    assert grid.failures or progress.counts["done"] == grid.num_runs
    return grid


def asked(runs, folder):
    return {str(r.folder.relative_to(folder)): dict(r.settings) for r in runs.asked}


def test_every_method_has_the_same_trials_and_tuning_leaves_test_alone(table, tmp_path):
    runs = FakeRuns()
    grid = go(table, tmp_path / "runs", runs)
    for method in table.method_files:
        own = tmp_path / "runs" / method
        trials = sorted((own / "tuning").iterdir())
        assert [t.name for t in trials] == TRIALS
        assert not any(json.loads((t / "summary.json").read_text())["test"] for t in trials)
        for seed in range(2):
            assert json.loads((own / f"seed-{seed}" / "summary.json").read_text())["test"]
    assert not grid.failures
    settings = asked(runs, tmp_path / "runs")
    own = {"train.seed": 0, "train.read_test": False}
    assert all(settings[f"{m}/tuning/trial-000"] == own for m in table.method_files)
    tried = [settings[f"nce_implicit/tuning/trial-00{i}"] for i in (1, 2)]
    weights = [1.0, *(t["inner.energy_weight"] for t in tried)]
    best = min(weights, key=lambda w: abs(w - 2.0))
    chosen = yaml.safe_load((tmp_path / "runs" / "nce_implicit" / "chosen.yaml").read_text())
    assert chosen.get("inner", {}).get("energy_weight", 1.0) == best
    assert settings["nce_implicit/seed-1"].get("inner.energy_weight", 1.0) == best


@pytest.mark.parametrize("log", [False, True])
def test_a_whole_number_is_searched_by_whole_numbers(table, tmp_path, log):
    values = {"low": 2, "high": 2000, "log": log}
    search = {"inner.steps": values, "inner.energy_weight": {"low": 1, "high": 3}}
    changed = TABLE | {"search": search, "search_of": {}, "budget": 6}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(changed))
    table, runs = read_table(tmp_path / "tiny.yaml", tmp_path), FakeRuns()
    assert str(table.spaces["mle"]["inner.energy_weight"]) == "Range(low=1.0, high=3.0, log=False)"
    go(table, tmp_path / "runs", runs, methods=["mle"])
    tried = [run.settings for run in runs.asked if run.folder.parent.name == "tuning"][1:]
    assert {type(settings["inner.steps"]) for settings in tried} == {int}
    assert all(2 <= settings["inner.steps"] <= 2000 for settings in tried)
    assert {type(settings["inner.energy_weight"]) for settings in tried} == {float}
    # The file's own settings are a trial of this search, from which others are drawn.
    journal = JournalFileBackend(str(tmp_path / "runs" / "mle" / "study.journal"))
    first = optuna.load_study(study_name="mle", storage=JournalStorage(journal)).trials[0]
    assert first.params == {"inner.steps": 10, "inner.energy_weight": 1.0}


@pytest.mark.parametrize("dies_before", [0, 1, 4, 9, 14])
def test_a_command_that_was_killed_goes_on_as_if_it_had_not_been(table, tmp_path, dies_before):
    whole = FakeRuns()
    go(table, tmp_path / "whole", whole)
    first, second = FakeRuns(dies_before=dies_before), FakeRuns()
    with pytest.raises(KeyboardInterrupt):
        go(table, tmp_path / "runs", first)
    go(table, tmp_path / "runs", second)
    parts = [asked(runs, tmp_path / "runs") for runs in (first, second)]
    assert not parts[0].keys() & parts[1].keys()
    assert parts[0] | parts[1] == asked(whole, tmp_path / "whole")
    third = FakeRuns()
    go(table, tmp_path / "runs", third)
    assert not third.asked


def test_settings_that_diverge_are_a_trial_and_other_failures_are_tried_again(table, tmp_path):
    def fails(run):
        if "nce_explicit/tuning/trial-001" in str(run.folder):
            return Exit.NOT_FINITE
        return Exit.DISK if "nce_implicit/tuning/trial-001" in str(run.folder) else None

    grid = go(table, tmp_path / "runs", FakeRuns(fails=fails))
    (failure,) = grid.failures
    assert "nce_implicit/tuning/trial-001" in failure
    assert "exit code 5; log:" in failure
    assert set(grid.complete()) == {"mle", "nce_explicit"}
    paths = grid.write(tmp_path / "out")
    rows = list(csv.DictReader(paths[0].open()))
    assert {row["method"] for row in rows} == {"mle", "nce_explicit"}
    assert "left out: nce_implicit" in paths[1].read_text()
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    again = FakeRuns()
    go(table, tmp_path / "runs", again)
    names = [f"nce_implicit/{name}" for name in ("tuning/trial-001", "tuning/trial-002", "seed-0")]
    assert list(asked(again, tmp_path / "runs")) == [*names, "nce_implicit/seed-1"]


def test_another_budget_or_search_in_the_same_folder_is_refused(table, tmp_path):
    go(table, tmp_path / "runs", FakeRuns())
    grid = go(table, tmp_path / "runs", FakeRuns(), budget=5)
    assert len(grid.failures) == 3
    assert "expected runs of budget 5, found 3" in grid.failures[0]
    table.configs[-1].write_text("data: {task: tagging}\n")
    runs = FakeRuns()
    assert "expected runs of settings" in go(table, tmp_path / "runs", runs).failures[0]
    assert not runs.asked


def test_statistics_are_those_of_scipy_and_numpy(table):
    draw = np.random.default_rng(0)
    values = {m: draw.normal(0.4, 0.01, 6) for m in table.method_files}
    seconds = {"mle": 1.0, "nce_explicit": 1.5, "nce_implicit": 3.0}
    runs = {
        method: [
            FinalRun(seed, {"f1": v}, {"f1": v + 0.1}, seconds[method], 3, "")
            for seed, v in enumerate(own.tolist())
        ]
        for method, own in values.items()
    }
    rows = {row.method: row for row in table_rows(table, runs)}
    for method, own in values.items():
        assert rows[method].mean == pytest.approx(np.mean(own))
        assert rows[method].std == pytest.approx(np.std(own, ddof=1))
        assert rows[method].dev_mean == pytest.approx(np.mean(own) + 0.1)
    assert rows["mle"].p_value is None
    expected = stats.ttest_rel(values["nce_implicit"], values["mle"]).pvalue
    assert rows["nce_implicit"].p_value == pytest.approx(expected)
    difference = values["nce_implicit"] - values["mle"]
    ranked = p_value(values["nce_implicit"], values["mle"], "wilcoxon")
    assert ranked == pytest.approx(stats.wilcoxon(difference).pvalue)
    assert p_value([0.4, 0.5], [0.4, 0.5], "paired_t") == 1.0
    one = {method: own[: 1 if method == "mle" else 6] for method, own in runs.items()}
    assert [row.p_value for row in table_rows(table, one)] == [None, None, None]
    fewer = {method: own[2:] if method == "mle" else own for method, own in runs.items()}
    expected_of_four = stats.ttest_rel(values["nce_implicit"][2:], values["mle"][2:]).pvalue
    assert table_rows(table, fewer)[2].p_value == pytest.approx(expected_of_four)
    more = [replace(run, test=run.test | {"new": 0.5}, dev=run.dev | {"new": 0.6})
            for run in runs["mle"][4:]]  # fmt: skip
    both = {row.metric: row for row in table_rows(table, {"mle": runs["mle"][:4] + more})}
    assert (both["f1"].test, both["new"].test) == (values["mle"].tolist(), [0.5, 0.5])
    assert both["new"].dev_mean == pytest.approx(0.6)
    assert (rows["nce_implicit"].overhead, rows["nce_implicit"].implicit_overhead) == (3.0, 2.0)
    assert (rows["nce_explicit"].overhead, rows["nce_explicit"].implicit_overhead) == (1.5, None)
    text = csv_text(table, list(rows.values())).splitlines()
    assert text[0].endswith("test_mean,test_std,dev_mean,seeds,seconds_per_epoch,overhead")
    assert text[3].endswith(",6,3.000,3.00")
    assert f"{expected:.4f}" in markdown_text(table, list(rows.values()), [])


def test_an_epoch_is_as_many_inner_steps_as_read_all_examples_once(table, tmp_path):
    grid = go(table, tmp_path / "runs", FakeRuns())
    # 8 seconds for 4 rounds of 10 x 5 of 100 examples.
    assert grid.complete()["mle"][0].seconds_per_epoch == pytest.approx(4.0)


def test_methods_of_earlier_commands_stay_while_their_settings_do(table, tmp_path):
    def methods_after(runs, **changes):
        grid = go(table, tmp_path / runs, FakeRuns(), **changes)
        paths = grid.write(tmp_path / "out")
        rows = csv.DictReader(paths[0].open())
        return [row["method"] for row in rows], read_record(paths[3]), paths[1].read_text()

    first = ["nce_implicit", "mle"]
    assert methods_after("first", methods=first, budget=0)[0] == ["mle", "nce_implicit"]
    everything = list(table.method_files)
    # On another machine, whose folder of runs is empty.
    only = {"methods": ["nce_explicit"], "budget": 0, "seeds": range(1)}
    shown, record, text = methods_after("second", **only)
    assert shown == everything
    assert {m: [run.seed for run in record[m]] for m in everything} == {
        "mle": [0, 1], "nce_explicit": [0], "nce_implicit": [0, 1],
    }  # fmt: skip
    assert "| mle | f1 | 2 | 0 | 0.4050 +- 0.0071 | 0.4900 | - |" in text
    # Fewer seeds take none away, and what is made of the file alone is the same.
    before = (tmp_path / "out" / "tiny.csv").read_text()
    shown, record, _ = methods_after("third", methods=["mle"], budget=0, seeds=range(1))
    assert [run.seed for run in record["mle"]] == [0, 1]
    assert (tmp_path / "out" / "tiny.csv").read_text() == before
    # Later seeds alone, on a machine without the runs of the first.
    later = {"methods": ["mle"], "budget": 0, "seeds": range(2, 4)}
    shown, record, text = methods_after("later", **later)
    assert shown == everything
    assert [run.seed for run in record["mle"]] == [0, 1, 2, 3]
    assert "| mle | f1 | 4 |" in text
    # A comment changes nothing, a setting does: that method leaves the table, and keeps its runs.
    (tmp_path / "mle.yaml").write_text("# the same\ntrain: {method: mle}\n")
    (tmp_path / "nce_implicit.yaml").write_text("train: {method: implicit}\n")
    shown, record, _ = methods_after("fourth", methods=["nce_explicit"], budget=0)
    assert shown == ["mle", "nce_explicit"]
    assert len(record["nce_implicit"]) == 2
    # What is searched counts only for those that are tuned.
    assert methods_after("fifth", methods=["mle"])[0] == ["mle", "nce_explicit"]
    changed = TABLE | {"search": {"inner.steps": [1, 2]}, "search_of": {}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(changed))
    table = read_table(tmp_path / "tiny.yaml", tmp_path)
    shown, _, text = methods_after("sixth", methods=["nce_implicit"], budget=0)
    assert shown == ["nce_explicit", "nce_implicit"]


def test_a_refit_follows_each_seed_with_what_was_chosen_on_dev(table, tmp_path):
    table = replace(table, refit=("nce_implicit",))
    first, runs = FakeRuns(dies_before=14), FakeRuns()
    with pytest.raises(KeyboardInterrupt):
        go(table, tmp_path / "runs", first)
    grid = go(table, tmp_path / "runs", runs)
    assert grid.num_runs == 3 * 3 + 4 * 2
    assert [run.folder.name for run in first.asked[:5]] == [*TRIALS, "seed-0", "seed-1"]
    chosen = yaml.safe_load((tmp_path / "runs" / "nce_implicit" / "chosen.yaml").read_text())
    weight = {f"{s}.{k}": v for s, keys in (chosen or {}).items() for k, v in keys.items()}
    choices = {"threshold": 0.3, "temperature": 0.8, "empty_weight": 0.0}
    chosen = {f"inference.{name}": value for name, value in choices.items()}
    fitted = weight | chosen | {"data.train_on_dev": True}
    # Seed 0 was done when the first command died.
    assert list(asked(runs, tmp_path / "runs").items()) == [
        ("nce_implicit/refit-0", fitted | {"train.seed": 0}),
        ("nce_implicit/seed-1", weight | {"train.seed": 1}),
        ("nce_implicit/refit-1", fitted | {"train.seed": 1}),
    ]
    paths = grid.write(tmp_path / "out")
    rows = list(csv.DictReader(paths[0].open()))
    assert [row["method"] for row in rows] == [*table.method_files, "nce_implicit_refit"]
    assert (rows[3]["test_mean"], rows[3]["dev_mean"]) == ("0.4050", "")
    assert "| nce_implicit_refit | f1 | 2 | 3 | 0.4050 +- 0.0071 | - |" in paths[1].read_text()
    # The record is read again, and a table without the refit leaves it there.
    go(table, tmp_path / "again", FakeRuns(), methods=["mle"]).write(tmp_path / "out")
    assert [run.seed for run in read_record(paths[3])["nce_implicit_refit"]] == [0, 1]
    without = replace(table, refit=())
    go(without, tmp_path / "runs", FakeRuns()).write(tmp_path / "out")
    assert "nce_implicit_refit" not in paths[0].read_text()
    assert "nce_implicit_refit" in read_record(paths[3])


@pytest.mark.parametrize("without", ["seed-1", "refit-1"])
def test_a_final_run_without_figures_on_test_is_a_failure_that_is_named(table, tmp_path, without):
    table = replace(table, refit=("mle",))
    runs = FakeRuns(has_test=lambda run: run.folder.name != without)
    grid = go(table, tmp_path / "runs", runs, methods=["mle"], budget=0)
    (failure,) = grid.failures
    folder = tmp_path / "runs" / "mle" / without
    assert failure.startswith(f"{folder}: expected figures on test, found none")
    complete = ["mle"] if without == "refit-1" else []
    assert list(grid.complete()) == complete
    paths = grid.write(tmp_path / "out")
    left_out = [row for row in ("mle", "mle_refit") if row not in complete]
    assert f"left out: {', '.join(left_out)}." in paths[1].read_text()


def test_progress_names_the_best_of_the_runs_that_have_a_dev_metric():
    shown = io.StringIO()
    with TableProgress(3, Console(file=shown, width=200)) as progress:
        for name, dev in (("a_refit", math.nan), ("b", 0.5), ("c", None)):
            progress.begin()
            progress.end(name, dev)
    assert shown.getvalue().splitlines() == [
        "a_refit: done; done 1 of 3, running 0",
        "b: dev 0.5000; done 2 of 3, running 0; best dev 0.5000 by b",
        "c: failed; done 2 of 3, running 0, failed 1; best dev 0.5000 by b",
    ]


def test_a_run_that_was_told_to_stop_is_not_counted_as_failed(table, tmp_path):
    class Stopped(FakeRuns):
        def __call__(self, run):
            raise Interrupted

    shown = io.StringIO()
    grid = Grid(table, ["mle"], 0, range(1), tmp_path / "runs", Stopped(), jobs=1)
    with TableProgress(grid.num_runs, Console(file=shown, width=200)) as progress:
        grid.run(progress)
    assert shown.getvalue() == "mle/seed-0: stopped; done 0 of 1, running 0\n"
    assert not grid.failures


def test_runs_of_other_settings_do_not_enter_under_the_present_ones(table, tmp_path):
    methods = {"methods": ["mle", "nce_explicit"], "budget": 0}
    earlier = go(table, tmp_path / "runs", FakeRuns(), **methods)
    before = read_record(earlier.write(tmp_path / "out")[3])
    (tmp_path / "mle.yaml").write_text("train: {method: mle, average_decay: 0.9}\n")
    runs = FakeRuns()
    grid = go(table, tmp_path / "runs", runs, **methods)
    (failure,) = grid.failures
    assert "mle: expected runs of settings" in failure
    assert not runs.asked
    csv_path, _, _, seeds = grid.write(tmp_path / "out")
    assert read_record(seeds) == before
    assert [row["method"] for row in csv.DictReader(csv_path.open())] == ["nce_explicit"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("dataset,", "data,"), "line 1: expected the columns dataset,method"),
        (("0.4,", "high,"), "line 2: expected numbers for seed"),
        ((",0.4,", ","), "line 2: expected numbers for seed"),
        (("tiny,mle,1,", "t\u00efny,mle,1,"), ":3: expected text in UTF-8, got byte 0xef"),
        (("tiny,mle,1,", 'tiny,"mle"x,1,'), ", line 3: expected CSV, found an error"),
    ],
)
def test_a_malformed_record_is_named_and_left_alone(table, tmp_path, change, message):
    grid = go(table, tmp_path / "runs", FakeRuns(), budget=0)
    path = grid.write(tmp_path / "out")[3]
    damaged = path.read_text().replace(*change)
    path.write_text(damaged, "latin-1")
    with pytest.raises(TableError) as error:
        grid.write(tmp_path / "out")
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert path.read_text("latin-1") == damaged
