"""The F1 of entities: counts over uneven shares against seqeval on the whole."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import problems
import pytest
import seqeval.metrics
import torch

from ispen_dist.command_line import load_config
from ispen_dist.config import ConfigError
from ispen_dist.data.batch import Batch
from ispen_dist.data.loading import load_splits
from ispen_dist.metrics import SpanMetrics, build_metrics

ROOT = Path(__file__).parent.parent
TAGS = ("B-loc", "B-per", "I-loc", "I-per", "O")


def random_batch(size=40, length=9):
    """Tags at random: entities that begin with I-, change type in the middle, touch each other."""
    draw = np.random.default_rng(2)
    mask = np.arange(length) < draw.integers(1, length + 1, (size, 1))
    target = draw.integers(0, len(TAGS), (size, length)) * mask
    predicted = np.where(draw.random((size, length)) < 0.7, target, draw.integers(0, 5, mask.shape))
    batch = Batch(
        {"mask": torch.from_numpy(mask)},
        torch.from_numpy(target),
        torch.ones(size),
        torch.arange(size),
    )
    return batch, torch.nn.functional.one_hot(torch.from_numpy(predicted), len(TAGS)).double()


def names(numbers, mask):
    rows = zip(numbers, mask, strict=True)
    return [[TAGS[i] for i in row[real].tolist()] for row, real in rows]


def test_sums_over_uneven_shares_equal_seqeval_on_the_whole():
    batch, ybar = random_batch()
    metrics = SpanMetrics(TAGS)
    sums = metrics.zero()
    for rows in np.split(np.arange(40), [3, 4, 30]):
        part = Batch(
            {"mask": batch.inputs["mask"][rows]},
            batch.target[rows],
            batch.weight[rows],
            batch.index[rows],
        )
        sums += metrics.sums(ybar[rows], part)
    values = metrics.finish(sums, {})
    mask = batch.inputs["mask"]
    gold, predicted = names(batch.target, mask), names(ybar.argmax(-1), mask)
    for name, library in (
        ("span_f1", seqeval.metrics.f1_score),
        ("precision", seqeval.metrics.precision_score),
        ("recall", seqeval.metrics.recall_score),
        ("accuracy", seqeval.metrics.accuracy_score),
    ):
        assert values[name] == pytest.approx(library(gold, predicted), abs=1e-12), name
    assert 0.1 < values["span_f1"] < 0.9
    assert metrics.sums(ybar, replace(batch, weight=torch.zeros(40))).tolist() == [0.0] * 5


def test_nothing_found_is_zero_and_no_division():
    values = SpanMetrics(TAGS).finish(torch.tensor([0.0, 0.0, 0.0, 3.0, 3.0]), {})
    assert values == {"span_f1": 0.0, "precision": 0.0, "recall": 0.0, "accuracy": 1.0}


def test_the_setting_wants_tags_that_spell_entities(write):
    config = problems.tagging_config()
    path = write("in\tO\nNew\tB-loc\nYork\tI-loc\n\nall\tO\n", "a.conll")
    data = replace(config.data, train=[str(path)], spans="bio")
    codec = load_splits(replace(config, data=data)).codec
    assert build_metrics(codec).main == "span_f1"
    path.write_text("in\tP\n\nall\tN\n")
    with pytest.raises(ConfigError, match=r"data\.spans: expected tags O, B-TYPE .* got 'N'"):
        load_splits(replace(config, data=data))


@pytest.mark.parametrize(
    ("name", "sizes", "num_outputs", "metric"),
    [
        ("wnut17", [3394, 1009, 1287], 13, "span_f1"),
        ("yeast", [1275, 225, 917], 14, "example_f1_at_0.5"),
        ("scene", [1029, 182, 1196], 6, "example_f1_at_0.5"),
    ],
)
def test_the_configurations_read_their_data(
    name, sizes, num_outputs, metric, shared_data, monkeypatch
):
    if not (shared_data / name).is_dir():
        pytest.skip(f"no {name} in {shared_data}")
    monkeypatch.setenv("ISPEN_DATA", str(shared_data))
    splits = load_splits(load_config(ROOT / "configs" / f"{name}.yaml"))
    assert splits.test is not None
    assert [len(splits.train), len(splits.dev), len(splits.test)] == sizes
    assert splits.codec.num_outputs == num_outputs
    assert build_metrics(splits.codec).main == metric
