"""Structures inferred from the energy, from it and the network, and from a second head."""

import itertools
import math

import problems
import pytest
import torch

from ispen_dist import objectives
from ispen_dist.command_line import config_from_dict, config_to_dict
from ispen_dist.config import InferenceConfig
from ispen_dist.graphs.compiler import Compiler
from ispen_dist.implicit import outer_gradients, staged_outer_gradients
from ispen_dist.inference import descend, infer, mean_field
from ispen_dist.inner import inner_step
from ispen_dist.inner_program import InnerProgram
from ispen_dist.linalg.operators import build_operator
from ispen_dist.linalg.staged_operators import build_staged_operator
from ispen_dist.losses import Losses
from ispen_dist.objectives import OUTER_OBJECTIVES
from ispen_dist.optim import Phase
from ispen_dist.players import build_players, replicated


def players_of(task, **changes):
    config = problems.multilabel_config() if task == "multilabel" else problems.tagging_config(task)
    values = config_to_dict(config)
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    codec = problems.multilabel_codec() if task == "multilabel" else problems.tagging_codec()
    players = build_players(config_from_dict(values), codec, problems.CPU)
    with torch.no_grad():
        for name, value in problems.random_phi(players).items():
            players.phi[name].copy_(value)
    return players


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_descent_reaches_the_minimum_of_a_convex_energy(momentum):
    target = torch.tensor([[0.2, 0.7, 0.5], [0.9, 0.1, 0.4]], dtype=torch.float64)
    config = InferenceConfig(steps=400, learning_rate=4.0, momentum=momentum)
    z = descend(lambda z: (z.sigmoid() - target).square().sum(), torch.zeros_like(target), config)
    torch.testing.assert_close(z.sigmoid(), target, rtol=0.0, atol=1e-10)
    assert not z.requires_grad


@pytest.mark.parametrize("task", ["multilabel", "bilstm"])
@pytest.mark.parametrize("start", ["zeros", "potentials"])
def test_descent_lowers_the_energy_and_the_cost_is_subtracted(task, start):
    players = players_of(
        task, inference__name="gradient_descent", inference__start=start, inference__steps=300,
        inference__learning_rate=3.0, outer__margin_scale=5.0,
    )  # fmt: skip
    batch = problems.random_batch(task, 5, 0)
    b = players.potentials(batch).detach()
    view = players.view(batch, b, b)
    relaxed = lambda z: players.space.relax(z, batch.inputs)  # noqa: E731
    energy = lambda z: view.energy(relaxed(z)[None])[0]  # noqa: E731
    augmented = lambda z: energy(z) - 5.0 * players.space.cost(relaxed(z), view.y)  # noqa: E731
    first = torch.zeros_like(b) if start == "zeros" else b
    found = infer(players, batch.inputs, b)
    other = infer(players, batch.inputs, b, gold=view.y)
    assert (energy(found) < energy(first)).all()
    assert (augmented(other) < augmented(first)).all()
    assert augmented(other).sum() < augmented(found).sum() - 0.1
    assert energy(found).sum() < energy(other).sum() - 0.1


@pytest.mark.parametrize("task", ["multilabel", "bilstm"])
@pytest.mark.parametrize("unrolled", [True, False])
def test_the_gradient_of_the_outer_loss_is_that_of_its_structure(task, unrolled):
    """Unrolled: a finite difference through the steps. Otherwise the structure is a constant."""
    players = players_of(
        task, inference__name="gradient_descent", inference__unrolled=unrolled, inference__steps=4,
        inference__momentum=0.5, inference__start="potentials", outer__objective="dvn",
    )  # fmt: skip
    batch, generator = problems.random_batch(task, 5, 0), torch.Generator()
    losses = Losses(players, replicated(players))
    _, gradient = losses.energy_gradient(batch, generator)
    draw = torch.Generator().manual_seed(7)
    direction = {k: torch.randn(g.shape, generator=draw).to(g) for k, g in gradient.items()}
    constant = infer(players, batch.inputs, players.potentials(batch).detach())

    def loss(step):
        with torch.no_grad():
            for name, p in players.phi.items():
                p.add_(step * direction[name])
        b = players.potentials(batch).detach()
        logits = infer(players, batch.inputs, b) if unrolled else constant
        value = OUTER_OBJECTIVES["dvn"].loss(players.view(batch, logits, b)).mean()
        with torch.no_grad():
            for name, p in players.phi.items():
                p.sub_(step * direction[name])
        return value

    eps = 1e-5
    expected = (loss(eps) - loss(-eps)) / (2 * eps)
    found = sum((g * direction[k]).sum() for k, g in gradient.items())
    assert abs(found) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)


def test_a_chain_is_summed_and_solved_as_by_enumeration():
    players = players_of("bilstm", outer__objective="crf", inference__name="viterbi")
    batch = problems.random_tagging_batch(6)
    batch.inputs["mask"][5] = False  # a filler
    b = players.potentials(batch).detach()
    view = players.view(batch, b, b)
    nll, best = objectives.crf(view).detach(), infer(players, batch.inputs, b).argmax(-1)
    num_tags = b.shape[-1]
    for row, length in enumerate(batch.inputs["mask"].sum(-1).tolist()):
        if not length:
            assert math.isfinite(nll[row])
            continue
        paths = torch.tensor(list(itertools.product(range(num_tags), repeat=length)))
        y = torch.zeros(len(paths), *b.shape[1:], dtype=b.dtype)
        y[:, :length] = torch.nn.functional.one_hot(paths, num_tags).to(b.dtype)
        energy = players.energy.score(b[row], y).detach()
        gold = players.energy.score(b[row : row + 1], view.y[row : row + 1])[0]
        torch.testing.assert_close(nll[row], gold + torch.logsumexp(-energy, 0), rtol=1e-10, atol=0)
        assert best[row, :length].tolist() == paths[energy.argmin()].tolist()


@pytest.mark.parametrize("task", ["multilabel", "bilstm"])
def test_mean_field_is_stationary_in_the_free_energy_of_the_product(task):
    """The free energy is that of an independent distribution against P exp(-w E)."""
    weight = 0.7
    players = players_of(
        task, inference__name="mean_field", inference__steps=200,
        inference__energy_weight=weight,
    )  # fmt: skip
    batch = problems.random_batch(task, 5, 0)
    b, logits = (players.potentials(batch).detach() * c for c in (1.0, -2.0))
    energy, mask = players.energy_at(b), batch.inputs.get("mask")

    def free_energy(z):
        ybar = players.space.relax(z, batch.inputs)
        entropy = torch.special.entr(ybar.clamp(min=1e-300))  # padding is 0
        if mask is None:  # a label has two values
            entropy = entropy + torch.special.entr(1.0 - ybar)
        product = players.space.nll(logits, ybar) + weight * energy(ybar[None])[0]
        return product - entropy.flatten(1).sum(1)

    found = mean_field(players, batch.inputs, logits, b)
    assert (free_energy(found) < free_energy(logits)).all()
    slopes = []
    for z in (logits, found):
        z.requires_grad_()
        slopes.append(torch.autograd.grad(free_energy(z).sum(), z)[0].abs().max())
    assert slopes[0] > 1e-2
    assert slopes[1] < 1e-12


# -- two heads -----------------------------------------------------------------------------------

HEADS = {"inference__cost_augmented": True, "outer__objective": "ssvm_plus"}


@pytest.mark.parametrize("task", ["multilabel", "transformer"])
def test_both_heads_enter_the_losses_as_in_the_formula(task):
    players = players_of(task, outer__margin_scale=2.0, **HEADS)
    batch = problems.random_batch(task, 5, 0)
    logits, b = players.inference_net(batch.inputs), players.potentials(batch)
    half = logits.shape[-1] // 2
    view = players.view(batch, logits, b)
    space, y = players.space, view.y
    predicted, augmented = (space.relax(z, batch.inputs) for z in logits.split(half, -1))
    energy = lambda ybar: players.energy(batch.inputs, ybar)  # noqa: E731
    likelihood = space.nll(logits[..., :half], y) + space.nll(logits[..., half:], y)
    of_augmented = energy(augmented) - 2.0 * space.cost(augmented, y)
    total = likelihood + 0.3 * (energy(predicted) + of_augmented)
    torch.testing.assert_close(objectives.inner(view, 0.3)[0], total.sum())
    hinge = torch.relu(energy(y) - of_augmented) + torch.relu(energy(y) - energy(predicted))
    torch.testing.assert_close(objectives.outer(view, "ssvm_plus")[0], hinge.sum())


def test_two_heads_take_every_path_alike():
    """Plain and compiled inner steps; outer gradients and products of graph and stages."""
    batches = [problems.random_multilabel_batch(5, seed) for seed in range(3)]
    plain, compiled = (players_of("multilabel", **HEADS) for _ in range(2))
    engines = [replicated(players) for players in (plain, compiled)]
    for pair in engines:
        optimizer = plain.config.inner.optimizer
        pair.inference_net.begin(Phase("inner", optimizer, 9, frozenset({"new"})))
    rows = [inner_step(plain, engines[0], batch, 0.3) for batch in batches]
    program = InnerProgram(compiled, engines[1], Compiler("trace"))
    for row, other in zip(rows, program(batches, 0.3, lambda i: None), strict=True):
        for key in row:
            torch.testing.assert_close(other[key], row[key], rtol=1e-10, atol=1e-12)
    losses, draw = Losses(plain, engines[0]), torch.Generator()
    graph = outer_gradients(losses.outer_graph(batches[0], draw), losses.theta(), losses.phi())
    staged = staged_outer_gradients(losses.outer_staged(batches[0], draw))
    torch.testing.assert_close(staged, graph, rtol=1e-10, atol=1e-12)
    v = {k: torch.ones_like(p) for k, p in losses.theta().items()}
    whole = build_operator(
        "hessian", losses.inner_graph(batches[1]), losses.theta(), losses.phi()
    ).matvec(v)
    by_stages = build_staged_operator("hessian", losses.inner_staged(batches[1])).matvec(v)
    torch.testing.assert_close(by_stages, whole, rtol=1e-10, atol=1e-12)
