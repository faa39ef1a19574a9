"""Label sets of largest expected F1: against all sets, and against sums over counts."""

from itertools import product

import numpy as np
import pytest
import torch

from ispen_dist import decisions
from ispen_dist.decisions import best_sizes, decide, tempered


def f1(predicted, gold):
    """Example-F1 of label sets, 1 for two empty ones."""
    together = predicted.sum(-1) + gold.sum(-1)
    return torch.where(together > 0, 2 * (predicted * gold).sum(-1) / together.clamp(min=1), 1.0)


def best_expected_f1(probability, empty_weight=1.0):
    """The sets of the decoder at a temperature of 1."""
    return decide(probability, "expected_f1", {"empty_weight": empty_weight})


@pytest.mark.parametrize("empty_weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("power", [0.2, 1.0, 4.0, 12.0])
def test_no_set_of_labels_is_better(power, empty_weight):
    draw = torch.Generator().manual_seed(0)
    sets = torch.tensor(list(product([0.0, 1.0], repeat=7)), dtype=torch.float64)
    probability = torch.rand(40, 7, generator=draw, dtype=torch.float64) ** power
    for row, got in zip(probability, best_expected_f1(probability, empty_weight), strict=True):
        weight = torch.where(sets > 0, row, 1 - row).prod(-1)
        weight[0] *= empty_weight  # The first set is the empty one.
        expected = f1(sets.unsqueeze(1), sets.unsqueeze(0)) @ weight
        assert f1(got.double(), sets) @ weight >= expected.max() - 1e-12


def expected_f1_of_first(chance, num_first):
    """F(1) to F(num_first), from the distribution of the number of other labels."""
    sizes = np.arange(1, num_first + 1)[:, None]
    terms = np.zeros(num_first)
    for i in range(num_first):
        others = np.ones(1)
        for p in np.delete(chance, i):
            others = np.convolve(others, [1 - p, p])
        value = 2 * chance[i] * (others / (sizes + 1 + np.arange(len(others)))).sum(-1)
        terms[i:] += value[i:]
    return terms


def test_an_empty_set_is_predicted_where_its_weight_allows_it():
    probability = torch.tensor([[0.2, 0.15, 0.1], [0.02, 0.01, 0.0], [0.6, 0.5, 0.1]])
    sizes = best_sizes(probability, [1.0, 0.3, 0.1, 0.0])
    assert sizes.T.tolist() == [[0, 2, 2, 2], [0, 0, 0, 2], [2, 2, 2, 2]]


def test_many_labels_have_the_size_of_the_sums_over_counts():
    # Together more labels than the integration is exact for; the sizes of one chunk lie far apart.
    draw = np.random.default_rng(0)
    powers = np.array([[4.0], [12.0], [60.0]])
    chance = -np.sort(-(draw.random((3, 200)) ** powers))
    best = [expected_f1_of_first(row, 100).argmax() + 1 for row in chance]
    assert best_sizes(torch.from_numpy(chance), [0.0])[0].tolist() == best
    assert 2 < best[2] < best[1] < best[0] < 100


def test_examples_are_looked_at_in_chunks(monkeypatch):
    probability = torch.rand(7, 9, generator=torch.Generator().manual_seed(0))
    whole = best_expected_f1(probability)
    monkeypatch.setattr(decisions, "_TOGETHER", 20)
    assert torch.equal(best_expected_f1(probability), whole)
    assert best_expected_f1(probability[:0]).shape == (0, 9)


def test_certain_labels_and_none_at_all():
    probability = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.1, 0.1, 0.1]])
    expected = torch.tensor([[True, False, True], [False] * 3, [False] * 3])
    assert torch.equal(best_expected_f1(probability), expected)
    expected = torch.tensor([[True, False, True], [True] * 3, [True] * 3])
    assert torch.equal(best_expected_f1(probability, 0.0), expected)


def test_a_temperature_divides_logits():
    logits = torch.linspace(-8, 8, 9, dtype=torch.float64)
    got = tempered(torch.sigmoid(logits).float(), 2.0)
    torch.testing.assert_close(got, torch.sigmoid(logits / 2.0), rtol=1e-4, atol=0.0)
    assert tempered(torch.tensor([0.0, 1.0]), 0.5).isfinite().all()


def test_a_decoder_reads_what_was_chosen():
    probability = torch.tensor([[0.45, 0.3, 0.2]])
    assert decide(probability, "threshold", {}).tolist() == [[False] * 3]
    assert decide(probability, "threshold", {"threshold": 0.25}).tolist() == [[True, True, False]]
    cold, hot = (decide(probability, "expected_f1", {"temperature": t}) for t in (0.3, 2.0))
    assert cold.sum() < hot.sum()
