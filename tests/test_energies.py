"""Energies of tag sequences: loops, padding, samples, derivatives, every way of computing them."""

import itertools
import math
from dataclasses import replace

import problems
import pytest
import torch
from staged import (
    assert_the_same_mixed_product,
    assert_the_same_operator,
    compiled_operator,
    losses_of,
    random_like,
    relative,
    whole_operator,
)
from torch.autograd import gradcheck, gradgradcheck

from ispen_dist.linalg.staged_operators import build_staged_operator
from ispen_dist.models.registry import build_energy
from ispen_kernels.energies import skip_chain_reference

pytestmark = pytest.mark.usefixtures("float64")
EVERY = pytest.mark.parametrize("name", problems.TAGGING_ENERGIES)

NUM_TAGS, NUM_TOKENS, NUM_SAMPLES = 3, 6, 4


def energy_of(name, seed=0, away_from_zero=True):
    """A tiny energy; its parameters as they start, or all away from the zeros among those."""
    torch.manual_seed(seed)
    config = problems.tagging_config(energy=name)
    energy = build_energy(config.energy, problems.tagging_codec()).double()
    if away_from_zero:
        with torch.no_grad():
            for parameter in energy.parameters():
                parameter.add_(0.4 * torch.randn(parameter.shape))
    return energy


def head_of(energy):
    return {n: p for n, p in energy.named_parameters() if not n.startswith("feature_network")}


def relaxed(*shape, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.softmax(2.0 * torch.randn(*shape, NUM_TAGS, generator=draw), -1)


# -- formulas as loops, one sequence y (T, K) ----------------------------------------------------


def chain(W, y, distance):
    total = 0.0
    for t in range(distance, len(y)):
        for i, j in itertools.product(range(NUM_TAGS), repeat=2):
            total -= y[t - distance, i] * W[i, j] * y[t, j]
    return total


def linear_chain(energy, y):
    return chain(energy.W, y, 1)


def skip_chain(energy, y):
    return sum(chain(W, y, d) for d, W in enumerate(energy.W, start=1))


def high_order(energy, y):
    order, total = energy.order, 0.0
    for t in range(order, len(y)):
        h = energy.L.T @ y[t - order]
        for j, S in enumerate(energy.S, start=1):
            h = torch.tanh(S.T @ torch.kron(h, energy.L.T @ y[t - order + j]))
        total -= h @ energy.V @ (energy.L.T @ y[t])
    return total


def tag_language_model(energy, y):
    zero = torch.zeros_like(energy.a)
    layer = [energy.a + (energy.L.T @ y[t - 1] if t else zero) for t in range(len(y))]
    for i in range(len(energy.A)):
        past = [layer[t - 2**i] if t >= 2**i else zero for t in range(len(y))]
        parts = zip(layer, past, strict=True)
        layer = [h + torch.tanh(h @ energy.A[i] + g @ energy.B[i] + energy.c[i]) for h, g in parts]
    total = 0.0
    for h, y_t in zip(layer, y, strict=True):
        scores = h @ energy.U + energy.u
        p = scores.exp() / scores.exp().sum()
        total -= sum(y_t[k] * (p[k].log() + math.log(NUM_TAGS)) for k in range(NUM_TAGS))
    return total


LOOPS = {f.__name__: f for f in (linear_chain, skip_chain, high_order, tag_language_model)}


@EVERY
@pytest.mark.parametrize("num_tokens", [1, 2, NUM_TOKENS])
@torch.no_grad()
def test_an_energy_is_its_formula_at_every_sample(name, num_tokens):
    energy, y = energy_of(name), relaxed(NUM_SAMPLES, 2, num_tokens)
    b = torch.randn(2, num_tokens, NUM_TAGS, generator=torch.Generator().manual_seed(3))
    local = (y * (b + energy.label_bias)).sum((-1, -2))
    interaction = [[LOOPS[name](energy, y[s, i]) for i in range(2)] for s in range(NUM_SAMPLES)]
    expected = torch.tensor(interaction) - local
    scores = energy.score(b, y)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(energy.score(b, y[0]), scores[0], rtol=1e-13, atol=1e-13)
    assert energy.float().score(b.float(), y.float()).dtype is torch.float32


@torch.no_grad()
def test_with_one_tag_before_the_last_a_high_order_energy_is_a_chain():
    config = problems.tagging_config(energy="high_order").energy
    energy = build_energy(replace(config, order=1), problems.tagging_codec()).double()
    energy.V.normal_()
    y = relaxed(2, NUM_TOKENS)
    W = energy.L @ energy.V @ energy.L.T
    expected = torch.stack([chain(W, one, 1) for one in y])
    torch.testing.assert_close(energy.global_energy(y), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(energy.interaction(), W)
    # Engines cannot shard what has no entries.
    assert all(parameter.numel() for parameter in energy.parameters())


@EVERY
def test_an_energy_starts_as_its_local_potentials_and_can_leave_them(name):
    energy, y = energy_of(name, away_from_zero=False), relaxed(2, NUM_TOKENS)
    b = torch.randn(2, NUM_TOKENS, NUM_TAGS, generator=torch.Generator().manual_seed(3))
    scores = energy.score(b, y)
    torch.testing.assert_close(scores, -(b * y).sum((-1, -2)), rtol=1e-14, atol=1e-14)
    gradients = torch.autograd.grad(scores.sum(), list(head_of(energy).values()))
    assert sum(bool(g.abs().max() > 0.1) for g in gradients) >= 2, "more than the bias must move"


@EVERY
def test_longer_padding_changes_neither_energy_nor_gradient(name):
    energy, lengths = energy_of(name), torch.tensor([NUM_TOKENS, 3, 1])
    y = relaxed(3, NUM_TOKENS) * (torch.arange(NUM_TOKENS) < lengths[:, None]).unsqueeze(-1)
    results = []
    for padding in (0, 7):
        padded = torch.cat([y, torch.zeros(3, padding, NUM_TAGS)], 1).requires_grad_()
        scores = energy.score(torch.ones_like(padded), padded)
        gradient = torch.autograd.grad(
            (scores * torch.tensor([1.0, 2.0, -3.0])).sum(), [padded, *head_of(energy).values()]
        )
        real = [gradient[0][i, :n] for i, n in enumerate(lengths)]
        results.append([scores, *real, *gradient[1:]])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-13)


@EVERY
def test_an_energy_has_two_derivatives_in_y_and_its_parameters(name):
    energy = energy_of(name)
    y = relaxed(2, 2, 5).requires_grad_()
    module, names = AtOnes(energy), [f"energy.{n}" for n in head_of(energy)]

    def score(y, *values):
        head = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, head, (y,))

    inputs = (y, *(p.detach().requires_grad_() for p in head_of(energy).values()))
    assert gradcheck(score, inputs, fast_mode=True)
    assert gradgradcheck(score, inputs, fast_mode=True)


class AtOnes(torch.nn.Module):
    """The energy at potentials of one, as a module for `functional_call`."""

    def __init__(self, energy):
        super().__init__()
        self.energy = energy

    def forward(self, y):
        return self.energy.score(torch.ones_like(y), y)


@EVERY
def test_the_picture_of_an_interaction_is_read_off_the_energy(name):
    """Of hard tags, where an entry of the matrix is a difference of energies."""
    energy = energy_of(name)
    matrix, one_hot = energy.interaction(), torch.eye(NUM_TAGS)
    order = energy.order if name == "high_order" else 1

    def scores(rows):
        return -torch.stack([energy.global_energy(torch.stack(row)) for row in rows])

    pairs = list(itertools.product(one_hot, one_hot))
    expected = scores([[i] * order + [j] for i, j in pairs]) - scores(
        [[i] * order for i, _ in pairs]
    )
    first = expected.view(NUM_TAGS, NUM_TAGS)
    torch.testing.assert_close(matrix[:, :NUM_TAGS], first, rtol=1e-12, atol=1e-12)
    if name == "skip_chain":
        assert matrix.shape == (NUM_TAGS, len(energy.W) * NUM_TAGS)
        torch.testing.assert_close(matrix[:, NUM_TAGS : 2 * NUM_TAGS], energy.W[1])
    else:
        assert matrix.shape == (NUM_TAGS, NUM_TAGS)


@pytest.mark.parametrize(
    "curvature", ["hessian", pytest.param("gauss_newton", marks=pytest.mark.thorough)]
)
@EVERY
def test_curvature_by_stages_and_compiled_equals_the_whole_graph(name, curvature):
    """Through a transformer of one block: the stages are others' business, see test_graphs."""
    losses = losses_of("transformer", name=name)
    batch = problems.random_batch("transformer", 4, 1)
    whole = whole_operator(losses, batch, curvature)
    staged = build_staged_operator(curvature, losses.inner_staged(batch))
    directions = [random_like(losses.theta(), seed) for seed in (1, 2)]
    for v in directions:
        assert relative(staged.matvec(v), whole.matvec(v)) < 1e-12
    assert_the_same_mixed_product(staged, whole, losses, directions)
    compiled = compiled_operator(losses, batch, curvature)
    whole = whole_operator(losses, batch, curvature)
    assert_the_same_operator(compiled, whole, losses)


@EVERY
def test_every_parameter_of_an_interaction_matters(name):
    energy = energy_of(name)
    head = [p for n, p in head_of(energy).items() if n != "label_bias"]
    gradients = torch.autograd.grad(energy.global_energy(relaxed(2, NUM_TOKENS)).sum(), head)
    assert all(bool(g.abs().max() > 1e-6) for g in gradients)


def test_the_kernel_of_a_skip_chain_is_the_function_of_its_energy():
    energy, y = energy_of("skip_chain"), relaxed(NUM_SAMPLES, 2, NUM_TOKENS)
    expected = energy.global_energy(y)
    torch.testing.assert_close(skip_chain_reference(y, energy.W), expected, rtol=1e-13, atol=1e-13)
