"""From the data section to data sets: the embedded set, splits, hold-out, batches, metrics."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import problems
import pytest
import torch
from sklearn.metrics import f1_score

from ispen_dist.command_line import config_from_dict, load_config
from ispen_dist.config import ConfigError, DataConfig
from ispen_dist.config.inference import EMPTY_WEIGHTS, TEMPERATURES, THRESHOLDS
from ispen_dist.data.datasets import (
    DenseTokenFeatures,
    MultiLabelCodec,
    Subset,
    TaggingCodec,
    TaggingDataset,
)
from ispen_dist.data.errors import DataError
from ispen_dist.data.loading import hold_out, load_file, load_named, load_splits
from ispen_dist.data.segmentation import SegmentationCodec
from ispen_dist.data.token_features import HashedTokenFeatures
from ispen_dist.decisions import decide
from ispen_dist.evaluate import evaluate
from ispen_dist.metrics import MultiLabelMetrics, TaggingMetrics
from ispen_dist.models.output_spaces import LabelSets

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tweets():
    return load_config(ROOT / "configs" / "twitter_pos.yaml")


def test_the_embedded_data_has_the_published_counts(tweets):
    splits = load_splits(tweets)
    assert isinstance(splits.train, TaggingDataset)
    assert splits.test is not None
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (1000, 327, 500)
    assert sum(len(s.tokens) for s in splits.train.sentences) == 14619
    assert len(splits.codec.output_names) == 25
    assert len(load_named(tweets, splits.codec, "daily547")) == 547
    with pytest.raises(ConfigError, match="expected one of train, dev, test, got 'x'"):
        load_named(replace(tweets, data=replace(tweets.data, extra={})), splits.codec, "x")


def test_a_batch_is_padded_and_masked(tweets):
    dataset = load_splits(tweets).train
    batch = dataset.collate([3, 0])
    lengths = batch.inputs["mask"].sum(-1).tolist()
    assert lengths == [len(dataset.sentences[i].tokens) for i in (3, 0)]  # type: ignore[attr-defined]
    assert batch.target.shape[1] % 8 == 0
    assert (batch.inputs["features"][~batch.inputs["mask"]] == 0).all()
    assert batch.index.tolist() == [3, 0]
    filler = dataset.collate([])
    assert filler.weight.tolist() == [0.0]


def test_bibtex_is_cut_as_its_split_file_says(shared_data, monkeypatch):
    monkeypatch.setenv("ISPEN_DATA", str(shared_data))
    config = load_config(ROOT / "configs" / "bibtex.yaml")
    splits = load_splits(config)
    assert splits.test is not None
    assert [len(splits.train), len(splits.dev), len(splits.test)] == [4437, 1479, 1479]
    assert (splits.codec.num_inputs, splits.codec.num_outputs) == (1836, 159)
    batch = splits.train.collate(np.arange(2))
    assert batch.inputs["features"].shape == (2, 1836)
    assert batch.target.sum() > 0


def test_a_dev_split_is_declared_by_its_seed(tweets):
    data = replace(tweets.data, dev="", dev_fraction=0.25, dev_seed=3)
    first, again = (load_splits(replace(tweets, data=data)) for _ in range(2))
    other = load_splits(replace(tweets, data=replace(data, dev_seed=4)))
    assert isinstance(first.dev, Subset)
    assert isinstance(again.dev, Subset)
    assert isinstance(other.dev, Subset)
    assert (len(first.train), len(first.dev)) == (750, 250)
    assert first.dev.rows.tolist() == again.dev.rows.tolist() != other.dev.rows.tolist()


def test_held_out_examples_are_in_the_outer_problem_only(tweets):
    train = load_splits(tweets).train
    config = replace(tweets, outer=replace(tweets.outer, held_out_fraction=0.3))
    inner, outer = hold_out(config, train)
    assert isinstance(inner, Subset)
    assert isinstance(outer, Subset)
    assert len(outer) == 300
    assert sorted([*inner.rows, *outer.rows]) == list(range(1000))
    alone = replace(config, train=replace(config.train, method="mle"))
    assert hold_out(alone, train) == (train, train)


def test_an_unlabelled_or_unknown_dev_set_is_refused(tweets, write):
    def with_dev(path):
        return replace(tweets, data=replace(tweets.data, dev=str(path)))

    with pytest.raises(DataError, match=r"a\.conll:1: expected a tag"):
        load_splits(with_dev(write("word\n", "a.conll")))
    with pytest.raises(DataError, match=r"b\.conll:2: .*'NN'"):
        load_splits(with_dev(write("a\tN\nword\tNN\n", "b.conll")))


def test_what_is_named_twice_or_is_too_little_is_refused(tweets, write):
    one = str(write("a\tN\n", "one.conll"))
    five = str(write("a\tN\n\n" * 5, "five.conll"))
    split = str(write('{"train": [0, 1], "dev": [2], "test": [3]}', "split.json"))
    plain = {"train": [five], "dev": "", "test": "", "extra": {}}

    def load(**data):
        return load_splits(replace(tweets, data=replace(tweets.data, **plain | data)))

    with pytest.raises(ConfigError, match=r"data\.dev: expected none beside data\.split_file"):
        load(split_file=split, dev=one)
    with pytest.raises(ConfigError, match=r"data\.test: expected no file beside the test rows"):
        load(split_file=split, test=one)
    with pytest.raises(ConfigError, match=r"data\.train: expected 2 examples or more, .*, got 1"):
        load(train=[one])
    splits = load(train=[one], dev=one)
    held_out = replace(tweets, outer=replace(tweets.outer, held_out_fraction=0.3))
    with pytest.raises(ConfigError, match=r"outer\.held_out_fraction: expected 0 where"):
        hold_out(held_out, splits.train)


def arrays(**own):
    file = io.BytesIO()
    np.savez(file, **own)
    return file.getvalue()


WORDS = "".join(f"{i}\tw\t_\t{tag}" + "\t_" * 6 + "\n" for i, tag in ((1, "_"), (2, "Z")))
ATTRIBUTES = "".join(f"@attribute {name} numeric\n" for name in ("0", "1", "l0", "l1"))
TAGS = TaggingCodec(("0", "1"), HashedTokenFeatures(16, 2))
DENSE = replace(TAGS, features=DenseTokenFeatures(2))
LABELS = MultiLabelCodec(("l0", "l1"), ("0", "1"))
IMAGES = SegmentationCodec((4, 4, 1), (0.0,), (1.0,))
TABLE = {"features": np.zeros((2, 2))}
UNREAD = {
    "no tag, and an unknown one": (TAGS, {"task": "tagging"}, "a\t\nb\tZ\n"),
    "words of which one has a tag": (TAGS, {"task": "tagging", "format": "conllu"}, WORDS),
    "labels that are missing, and no label": (
        LABELS, {"format": "arff", "labels_xml": "none.xml"},
        f"@relation r\n{ATTRIBUTES}@data\n0,0,?,1\n0,0,7,?\n",
    ),
    "a label beyond the last, twice, and a fraction": (
        replace(LABELS, labels=("0", "1")),
        {"format": "svmlight", "num_features": 2, "num_labels": 2}, "5,5 0:1\n1.5 1:1\n",
    ),
    "targets of another size": (
        LABELS, {"format": "npz"}, arrays(targets=np.full((3, 5), 9), **TABLE),
    ),
    "labels that are fractions": (
        DENSE, {"task": "tagging", "format": "npz"},
        arrays(word=np.array([0, 1]), label=np.array([0.5, 7.0]), **TABLE),
    ),
    "masks of 255": (
        IMAGES, {"task": "segmentation", "format": "npz"},
        arrays(images=np.zeros((2, 4, 4, 1)), masks=np.full((2, 4, 4), 255)),
    ),
}  # fmt: skip


NETWORKS = {
    "tagging": ("bilstm", "linear_chain"),
    "multilabel": ("mlp", "label_interaction"),
    "segmentation": ("fcn", "convolutional"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_structures_are_not_looked_at_where_they_are_not_needed(case, write):
    codec, settings, content = UNREAD[case]
    data = {"task": "multilabel", "train": ["none"]} | settings
    network, energy = NETWORKS[data["task"]]
    own = {"name": network}
    networks = {"inference_net": own, "energy": {"name": energy, "features": own}}
    config, path = config_from_dict({"data": data, **networks}), write(content)
    assert len(load_file(config, codec, path, labelled=False)) in (1, 2)
    with pytest.raises(DataError):
        load_file(config, codec, path)


def test_a_relative_path_is_below_the_root(monkeypatch, tmp_path):
    monkeypatch.setenv("ISPEN_DATA", str(tmp_path))
    config = replace(problems.tagging_config(), data=DataConfig(train=["none.conll"]))
    with pytest.raises(DataError, match=r"none\.conll") as error:
        load_splits(config)
    assert str(tmp_path) in str(error.value)


def test_metrics_of_uneven_shares_add_up_and_equal_the_cost():
    draw = torch.Generator().manual_seed(0)
    ybar = torch.rand(9, 3, generator=draw)
    batch = problems.random_multilabel_batch(9)
    metrics = MultiLabelMetrics()
    whole = metrics.sums(ybar, batch)
    parts = metrics.zero()
    for rows in ([0], [1, 2, 3, 4, 5], [6, 7, 8]):
        part = replace(batch, target=batch.target[rows], weight=batch.weight[rows])
        parts += metrics.sums(ybar[rows], part)
    torch.testing.assert_close(parts, whole)
    values = metrics.finish(whole, {})
    space = LabelSets()
    f1 = 1.0 - space.cost((ybar > 0.5).double(), batch.target).mean()
    assert values["example_f1_at_0.5"] == pytest.approx(f1.item())
    curve = [1.0 - space.cost((ybar > t).double(), batch.target).mean() for t in THRESHOLDS]
    assert values["example_f1_tuned"] == pytest.approx(max(curve).item())
    choices = [
        {"temperature": temperature, "empty_weight": weight}
        for temperature in TEMPERATURES
        for weight in EMPTY_WEIGHTS
    ]
    decoded = [decide(ybar, "expected_f1", choice) for choice in choices]
    curve = [f1_score(batch.target, d, average="samples", zero_division=1.0) for d in decoded]
    assert values["example_f1_decoded"] == pytest.approx(max(curve))
    best = {name: values[name] for name in choices[0]}
    assert curve[choices.index(best)] == pytest.approx(max(curve))
    for choice, value in zip(choices, curve, strict=True):
        assert metrics.finish(whole, choice)["example_f1_decoded"] == pytest.approx(value)


def test_accuracy_counts_tokens_and_no_padding_or_fillers():
    batch = problems.random_tagging_batch(4)
    ybar = torch.nn.functional.one_hot(batch.target, 3).double()
    ybar[0, 0] = ybar[0, 0].roll(1)
    metrics = TaggingMetrics()
    tokens = batch.inputs["mask"].sum().item()
    assert metrics.sums(ybar, batch).tolist() == [tokens - 1, tokens]
    filler = replace(batch, weight=torch.zeros(4))
    assert metrics.sums(ybar, filler).tolist() == [0, 0]


def test_what_was_tuned_elsewhere_is_used_as_it_is():
    def echo(inputs):
        return inputs["features"][:, :3]

    class Rows:
        batch = problems.random_multilabel_batch(6)

        def __len__(self):
            return 6

        def collate(self, rows):
            return replace(
                self.batch,
                inputs={"features": self.batch.inputs["features"][rows]},
                target=self.batch.target[rows],
                weight=self.batch.weight[rows],
            )

    choices = {"threshold": 0.3, "temperature": 1.5, "empty_weight": 0.1}
    values = evaluate(
        echo, LabelSets(), MultiLabelMetrics(), Rows(), torch.ones(()), choices=choices
    )
    assert {name: values[name] for name in choices} == choices
