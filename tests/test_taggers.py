"""Token features, encoders and tagging networks: padding, derivatives, stability, randomness."""

import os
import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ispen_dist.data.token_features import HashedTokenFeatures, collapsed, kind, shape
from ispen_dist.models.encoders import SelfAttention, TokenEmbedding
from ispen_dist.models.taggers import BiLSTMTagger, TransformerTagger

NUM_BUCKETS, NUM_TAGS, NUM_FEATURES = 11, 3, 4

BUILDERS: dict[str, Callable[[float], nn.Module]] = {
    "bilstm": lambda dropout: BiLSTMTagger(
        NUM_BUCKETS, NUM_TAGS, embedding_size=4, hidden_size=3, num_layers=2,
        dropout=dropout, feature_dropout=dropout,
    ),
    "transformer": lambda dropout: TransformerTagger(
        NUM_BUCKETS, NUM_TAGS, embedding_size=4, hidden_size=4, num_layers=2, num_heads=2,
        dropout=dropout, feature_dropout=dropout,
    ),
}  # fmt: skip


@pytest.fixture(params=sorted(BUILDERS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def build(name: str, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    return BUILDERS[name](dropout).to(dtype)


def example_inputs(lengths: list[int], num_tokens: int) -> dict[str, Tensor]:
    """Random ids with absent features among them, zeros after the length."""
    generator = torch.Generator().manual_seed(5)
    shape = (len(lengths), max(lengths), NUM_FEATURES)
    ids = torch.zeros(len(lengths), num_tokens, NUM_FEATURES, dtype=torch.int64)
    ids[:, : max(lengths)] = torch.randint(NUM_BUCKETS, shape, generator=generator)
    mask = torch.arange(num_tokens) < torch.tensor(lengths)[:, None]
    return {"features": ids * mask.unsqueeze(-1), "mask": mask}


def test_padding_never_changes_a_result(name: str) -> None:
    network, lengths = build(name), [5, 2, 1]
    short, long = (network(example_inputs(lengths, num_tokens)) for num_tokens in (5, 9))
    for row, length in enumerate(lengths):
        torch.testing.assert_close(long[row, :length], short[row, :length], rtol=1e-12, atol=1e-12)


def test_a_sequence_does_not_see_its_batch(name: str) -> None:
    network, inputs = build(name), example_inputs([5, 2], 5)
    alone = network({"features": inputs["features"][1:, :2], "mask": inputs["mask"][1:, :2]})
    torch.testing.assert_close(network(inputs)[1, :2], alone[0], rtol=1e-12, atol=1e-12)


def test_filler_rows_are_finite_and_give_no_gradient(name: str) -> None:
    network = build(name)
    logits = network(example_inputs([3, 0], 3))
    assert logits.shape == (2, 3, NUM_TAGS)
    assert bool(logits.isfinite().all())
    logits[0].sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.parameters())


def test_context_and_order_matter(name: str) -> None:
    network, inputs = build(name), example_inputs([4], 4)
    reordered = {**inputs, "features": inputs["features"][:, [0, 2, 1, 3]]}
    assert (network(inputs)[0, 3] - network(reordered)[0, 3]).abs().max() > 1e-6


def masked_loss(network: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return a curved function of the logits of real tokens, the dropout masks fixed."""
    torch.manual_seed(7)
    log_p = torch.log_softmax(network(inputs), dim=-1)
    return -(log_p * torch.tensor([0.2, 0.5, 0.3]) * inputs["mask"].unsqueeze(-1)).sum()


def gradient(
    network: nn.Module, inputs: dict[str, Tensor], create_graph: bool = False
) -> list[Tensor]:
    loss = masked_loss(network, inputs)
    return list(torch.autograd.grad(loss, list(network.parameters()), create_graph=create_graph))


def moved_gradient(
    network: nn.Module, inputs: dict[str, Tensor], direction: list[Tensor], step: float
) -> Tensor:
    """Return the flat gradient at theta + step * direction; theta is put back exactly."""
    before = [p.detach().clone() for p in network.parameters()]
    with torch.no_grad():
        for p, v in zip(network.parameters(), direction, strict=True):
            p.add_(v, alpha=step)
    result = flat(gradient(network, inputs))
    with torch.no_grad():
        for p, saved in zip(network.parameters(), before, strict=True):
            p.copy_(saved)
    return result


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def product(network: nn.Module, inputs: dict[str, Tensor], direction: list[Tensor]) -> Tensor:
    g = gradient(network, inputs, create_graph=True)
    return flat(list(torch.autograd.grad(g, list(network.parameters()), direction)))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_second_derivative_equals_finite_difference(name: str, dropout: float) -> None:
    network, inputs, step = build(name, dropout), example_inputs([5, 3, 1], 6), 1e-5
    direction = [torch.randn_like(p) for p in network.parameters()]
    exact = product(network, inputs, direction)
    ahead, behind = (moved_gradient(network, inputs, direction, s) for s in (step, -step))
    difference = (ahead - behind) / (2.0 * step)
    assert exact.norm() > 1e-2
    # Truncation is O(step^2) and rounding O(1e-16 / step), each times the scale of the problem.
    assert (exact - difference).norm() / exact.norm() < 1e-7


def test_second_derivative_in_float32_equals_float64(name: str) -> None:
    # In float32 PyTorch may choose other LSTM kernels (oneDNN), whose derivatives are others too.
    inputs = example_inputs([5, 3, 1], 6)
    single, double = build(name, dtype=torch.float32), build(name, dtype=torch.float32).double()
    direction = [torch.randn_like(p) for p in single.parameters()]
    exact = product(double, inputs, [v.double() for v in direction])
    assert (product(single, inputs, direction).double() - exact).norm() / exact.norm() < 1e-5


def test_second_derivative_is_symmetric(name: str) -> None:
    network, inputs = build(name, 0.3), example_inputs([4, 2], 4)
    u, v = ([torch.randn_like(p) for p in network.parameters()] for _ in range(2))
    uHv = flat(u) @ product(network, inputs, v)
    vHu = flat(v) @ product(network, inputs, u)
    torch.testing.assert_close(uHv, vHu, rtol=1e-9, atol=1e-12)


def test_dropout_is_frozen_by_the_seed(name: str) -> None:
    network, inputs = build(name, 0.5), example_inputs([5, 2], 5)
    torch.testing.assert_close(
        masked_loss(network, inputs), masked_loss(network, inputs), rtol=0.0, atol=0.0
    )
    fresh = [network(inputs) for _ in range(2)]
    assert (fresh[0] - fresh[1]).abs().max() > 1e-3
    network.eval()
    torch.testing.assert_close(network(inputs), network(inputs), rtol=0.0, atol=0.0)


def test_embedding_sums_present_features_only() -> None:
    embedding = TokenEmbedding(NUM_BUCKETS, 4).double()
    ids = torch.tensor([[[3, 0, 5], [0, 0, 0]]])
    table = embedding.weight
    expected = torch.stack([table[3] + table[5], torch.zeros_like(table[3])])[None]
    torch.testing.assert_close(embedding(ids), expected)
    with torch.no_grad():
        table[0] = 1e6
    assert embedding(ids)[0, 1].abs().max() == 0.0
    embedding(ids).sum().backward()
    assert table.grad is not None
    assert table.grad[0].abs().max() == 0.0


def test_feature_dropout_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    embedding = TokenEmbedding(2, 1, feature_dropout=0.25).double()
    ids = torch.ones(1, 1, 40000, dtype=torch.int64)
    mean = embedding(ids) / 40000 / embedding.weight[1]
    # Standard deviation of the mean: sqrt(0.25 / 0.75 / 40000) = 0.0029.
    assert abs(mean.item() - 1.0) < 0.015


def test_attention_matches_pytorch() -> None:
    torch.manual_seed(1)
    own = SelfAttention(6, 2).double()
    theirs = nn.MultiheadAttention(6, 2, batch_first=True).double()
    theirs.load_state_dict(
        {
            "in_proj_weight": own.qkv.weight,
            "in_proj_bias": own.qkv.bias,
            "out_proj.weight": own.out.weight,
            "out_proj.bias": own.out.bias,
        }
    )
    x, mask = torch.randn(2, 5, 6, dtype=torch.float64), torch.arange(5) < torch.tensor([[5], [3]])
    bias = (~mask).double() * -1e4
    expected, _ = theirs(x, x, x, key_padding_mask=~mask)
    torch.testing.assert_close(own(x, bias), expected)


def test_attention_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="num_heads: expected a divisor of the width 6, got 4"):
        SelfAttention(6, 4)


def test_feature_ids_are_pinned() -> None:
    # A changed hash or feature string silently breaks every saved model.
    features = HashedTokenFeatures(num_buckets=16384, max_affix=4)
    assert features.bucket("lower=win") == 241
    assert features.ids(["win"])[0, 1] == 241
    assert features.bucket("suffix=ing") == 7519
    assert features.bucket("suffix=ing") in features.ids(["Wearing"])


def test_feature_ids_do_not_depend_on_the_process() -> None:
    program = (
        "from ispen_dist.data.token_features import HashedTokenFeatures as H;"
        "print(H(4096, 3).ids(['Got', '@e_one', ':)', '']).tolist())"
    )
    own = HashedTokenFeatures(4096, 3).ids(["Got", "@e_one", ":)", ""]).tolist()
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(own)


def test_feature_ids_have_fixed_shape_and_range() -> None:
    features = HashedTokenFeatures(num_buckets=50, max_affix=5)
    ids = features.ids(["RT", "a", "supercalifragilistic", "http://tl.gd/6", "\u00e9t\u00e9", ""])
    assert ids.shape == (6, features.num_features)
    assert ids.dtype == np.int64
    assert ids.min() == 0
    assert ids.max() < 50
    assert features.ids([]).shape == (0, features.num_features)


def test_urls_and_mentions_share_a_spelling() -> None:
    features = HashedTokenFeatures()
    first = features.ids(["@alice", "@bob_99"])
    second = features.ids(["http://a.com/b", "www.c.de"])
    word_column = 0
    assert first[0, word_column] == first[1, word_column]
    assert second[0, word_column] == second[1, word_column]
    assert first[0, word_column] != second[0, word_column]


def test_neighbours_are_features_and_edges_are_their_own() -> None:
    features = HashedTokenFeatures()
    first, last = features.ids(["GOT", "it"])
    assert first[-2:].tolist() == [features.bucket("previous=<edge>"), features.bucket("next=it")]
    assert last[-2:].tolist() == [features.bucket("previous=got"), features.bucket("next=<edge>")]
    alone = features.ids(["it"])[0]
    assert last[:-2].tolist() == alone[:-2].tolist()


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        ("http://tl.gd/6meogh", "url"), ("@DjBlack_Pearl", "mention"), ("#ff", "hashtag"),
        ("4", "number"), ("$9.99", "number"), ("11:30pm", "number"), (":-)", "emoticon"),
        ("<3", "emoticon"), ("...", "punctuation"), ("Florida", "word"), ("won't", "mixed"),
    ],
)  # fmt: skip
def test_kinds(token: str, expected: str) -> None:
    assert kind(token) == expected


def test_shape_and_collapsed_runs() -> None:
    assert shape("Got4U-x") == "Xxx0X-x"
    assert collapsed("sooooo") == "so"
    assert collapsed(shape("Daaammmn")) == "Xx"


@pytest.mark.parametrize("settings", [{"num_buckets": 1}, {"max_affix": 0}])
def test_impossible_feature_settings_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{next(iter(settings))}: expected at least")):
        HashedTokenFeatures(**settings)
