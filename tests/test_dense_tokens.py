"""Sequences of vectors: reader, folds, batches, networks that read them, predictions."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import problems
import pytest
import torch
from malformed import check_error

from ispen_dist.command_line import load_config
from ispen_dist.config import ConfigError, DataConfig
from ispen_dist.data.datasets import DenseTokenFeatures, TaggingCodec
from ispen_dist.data.dense_tokens import DenseTaggingDataset, read_dense_tokens
from ispen_dist.data.errors import DataError
from ispen_dist.data.loading import load_splits
from ispen_dist.players import build_players
from ispen_dist.prediction_files import predict_file
from ispen_dist.predictor import Predictor

ROOT = Path(__file__).parent.parent
PIXELS = np.random.default_rng(0).integers(0, 2, (6, 2, 3), dtype=np.uint8)
WORD = np.array([4, 4, 4, 7, 2, 2])
LABEL = np.array([5, 1, 1, 5, 9, 1], dtype=np.uint8)
FOLD = np.array([0, 0, 0, 0, 1, 1])
ARRAYS = {"pixels": PIXELS, "word": WORD, "label": LABEL, "fold": FOLD}


def archive(**changed) -> bytes:
    file = io.BytesIO()
    np.savez(file, **{k: v for k, v in (ARRAYS | changed).items() if v is not None})
    return file.getvalue()


NAN = np.where(np.arange(36).reshape(6, 2, 3) == 8, np.nan, 1.0)
MALFORMED = {
    "other name": (archive(pixels=None, x=PIXELS), "an array 'pixels'", "word, label, fold, x"),
    "flat": (archive(pixels=WORD), "one row for each token", "shape (6,)"),
    "NaN": (archive(pixels=NAN), "pixels token 1, number 2", "nan"),
    "no words": (archive(word=None), "an array 'word'", "pixels, label, fold"),
    "torn word": (archive(word=np.array([4, 4, 7, 4, 2, 2])), "one after another", "4 in two"),
    "fewer labels": (archive(label=LABEL[:5]), "label: expected 6 whole", "uint8 of shape (5,)"),
    "real labels": (archive(label=LABEL / 2), "label: expected 6 whole numbers", "float64"),
    "negative": (archive(label=LABEL.astype(int) - 2), "label[1]: expected a number from 0", "-1"),
    "objects": (archive(label=np.array([None] * 6)), "numbers under 'label'", "pickled objects"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_sequences(case, write):
    content, expected, got = MALFORMED[case]
    path = write(content, "letters.npz")
    check_error(lambda: read_dense_tokens(path, "pixels"), path, None, expected, got)


def config_of(path, **data):
    settings = {"format": "npz", "features_key": "pixels", "train": [str(path)], **data}
    return replace(problems.tagging_config("token_mlp"), data=DataConfig(**settings))


def test_a_batch_holds_the_tokens_of_its_sequences_and_zeros(write):
    table = read_dense_tokens(write(archive()), "pixels")
    codec = TaggingCodec(("1", "5", "9"), DenseTokenFeatures(6))
    batch = DenseTaggingDataset(table, codec).collate([2, 0])
    assert batch.inputs["mask"].sum(-1).tolist() == [2, 3]
    assert batch.inputs["features"].shape == (2, 8, 6)
    flat = torch.from_numpy(PIXELS.reshape(6, 6)).float()
    assert torch.equal(batch.inputs["features"][0, :2], flat[4:])
    assert torch.equal(batch.inputs["features"][1, :3], flat[:3])
    assert batch.inputs["features"][~batch.inputs["mask"]].abs().sum() == 0.0
    assert batch.target[:, :3].tolist() == [[2, 0, 0], [1, 0, 0]]


def test_folds_are_cut_and_their_labels_must_be_known(write):
    path = write(archive(label=np.array([5, 1, 1, 5, 5, 1])))
    splits = load_splits(config_of(path, train_folds=[0], test_folds=[1], dev_fraction=0.5))
    assert splits.test is not None
    assert [len(splits.train), len(splits.dev), len(splits.test)] == [1, 1, 1]
    assert splits.codec.output_names == ("1", "5")
    assert splits.test.collate([0]).target[0, :2].tolist() == [1, 0]
    path = write(archive())
    with pytest.raises(DataError, match=r"label: expected one of the 2 labels .* got 9"):
        load_splits(config_of(path, train_folds=[0], test_folds=[1], dev_fraction=0.5))
    with pytest.raises(DataError, match=r"fold: expected 3 among the folds"):
        load_splits(config_of(path, train_folds=[3]))
    with pytest.raises(ConfigError, match=r"data\.test_folds: expected none of"):
        config_of(path, train_folds=[0], test_folds=[0])


@pytest.mark.parametrize("network", ["bilstm", "transformer", "token_mlp"])
def test_networks_read_vectors_and_padding_changes_nothing(network):
    codec = TaggingCodec(("a", "b"), DenseTokenFeatures(6))
    net = build_players(problems.tagging_config(network), codec, problems.CPU).inference_net.eval()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    short = {"features": x * mask.unsqueeze(-1), "mask": mask}
    long = {
        "features": torch.nn.functional.pad(short["features"], (0, 0, 0, 2)),
        "mask": torch.nn.functional.pad(mask, (0, 2)),
    }
    logits = net(short)
    assert logits.shape == (2, 3, 2)
    torch.testing.assert_close(net(long)[:, :3][mask], logits[mask])
    assert not torch.equal(net(short | {"features": 2 * short["features"]}), logits)


def test_a_model_labels_a_file(tmp_path, write):
    codec = TaggingCodec(("1", "5", "9"), DenseTokenFeatures(6))
    players = build_players(config_of("x.npz"), codec, problems.CPU)
    Predictor(players, codec).save_pretrained(tmp_path / "model")
    predictor = Predictor.from_pretrained(tmp_path / "model")
    assert predictor.codec == codec
    source = write(archive(label=None), "new.npz")
    predict_file(predictor, source, tmp_path / "out.npz", probabilities=True)
    written = read_dense_tokens(tmp_path / "out.npz", "pixels")
    assert np.isin(written.require_labels(), [1, 5, 9]).all()
    assert np.diff(written.bounds).tolist() == [3, 1, 2]


def test_the_letters_are_cut_by_fold(shared_data, monkeypatch):
    if not (shared_data / "ocr_letters").is_dir():
        pytest.skip(f"no ocr_letters in {shared_data}")
    monkeypatch.setenv("ISPEN_DATA", str(shared_data))
    splits = load_splits(load_config(ROOT / "configs" / "ocr_letters.yaml"))
    assert splits.test is not None
    assert len(splits.train) + len(splits.dev) == 626
    assert len(splits.test) == 6251
    assert (splits.codec.num_inputs, splits.codec.num_outputs) == (128, 26)
