"""Signs and gradient paths of every objective, and of the energies."""

import dataclasses
import math

import problems
import pytest
import torch

from ispen_dist import objectives
from ispen_dist.models.output_spaces import LabelSets, TagSequences
from ispen_dist.models.registry import output_space
from ispen_dist.objectives import OUTER_OBJECTIVES
from ispen_dist.players import build_players

pytestmark = pytest.mark.usefixtures("float64")
Y = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.3, 0.2, -0.7]], dtype=torch.float64)


def view(energy=lambda y: -y.sum(-1), logits=LOGITS, **settings):
    return objectives.View(
        space=LabelSets(),
        inputs={},
        y=Y,
        weight=torch.ones(2),
        logits=logits,
        energy=energy,
        gibbs_nll=lambda: energy(Y) + 9.0,
        generator=torch.Generator().manual_seed(0),
        num_samples=4,
        **settings,
    )


def view_of(players, batch, logits, generator):
    """The energy at its own parameters."""
    return players.view(batch, logits, players.potentials(batch), generator=generator)


def test_ssvm_is_the_margin_rescaled_hinge():
    energy = lambda y: (y * torch.tensor([0.1, 0.2, -0.4])).sum(-1)  # noqa: E731
    ybar = torch.sigmoid(LOGITS)
    cost = 1 - 2 * (ybar * Y).sum(-1) / (ybar.sum(-1) + Y.sum(-1))
    expected = torch.relu(2.0 * cost - energy(ybar) + energy(Y))
    torch.testing.assert_close(objectives.ssvm(view(energy, margin_scale=2.0)), expected)


def test_dvn_compares_the_true_score_with_the_one_read_from_the_energy():
    ybar = torch.sigmoid(LOGITS)
    score = 2 * (ybar * Y).sum(-1) / (ybar.sum(-1) + Y.sum(-1))
    predicted = torch.sigmoid(ybar.sum(-1))
    expected = -(score * predicted.log() + (1 - score) * (1 - predicted).log())
    torch.testing.assert_close(objectives.dvn(view()), expected)


@pytest.mark.parametrize("name", ["dvn", "dvn_gold", "regression"])
def test_the_score_scale_multiplies_the_energy_of_predicted_scores(name):
    half = OUTER_OBJECTIVES[name].loss(view(lambda y: -0.5 * y.sum(-1)))
    torch.testing.assert_close(OUTER_OBJECTIVES[name].loss(view(score_scale=0.5)), half)


def test_dvn_gold_also_wants_a_score_of_one_for_the_gold():
    at_gold = -torch.sigmoid(Y.sum(-1)).log()
    torch.testing.assert_close(objectives.dvn_gold(view()), (objectives.dvn(view()) + at_gold) / 2)


def test_nce_and_cd_put_the_gold_first():
    for name in ("nce", "cd"):
        gold_is_low = lambda y: 50.0 * (y - Y).abs().sum(-1)  # noqa: E731
        gold_is_high = lambda y: -50.0 * (y - Y).abs().sum(-1)  # noqa: E731
        loss = OUTER_OBJECTIVES[name].loss
        structures = view().samples()
        differs = ((structures[1:] - Y).abs().sum(-1) > 0).any(0)
        assert differs.all()
        assert (loss(view(gold_is_low)) < math.log(5) + 1e-9).all()
        assert (loss(view(gold_is_high)) > 40.0).all()


def test_nce_adds_the_negative_log_noise_to_each_logit():
    v = view()
    structures = v.samples()
    p = torch.sigmoid(LOGITS)
    log_noise = (structures * p.log() + (1 - structures) * (1 - p).log()).sum(-1)
    logits = structures.sum(-1) - log_noise
    expected = -torch.log_softmax(logits, 0)[0]
    torch.testing.assert_close(objectives.nce(view()), expected)


def test_ranking_is_the_logistic_loss_of_pairs_of_unequal_cost():
    energy = lambda y: (y * torch.tensor([0.1, 0.9, -0.4])).sum(-1)  # noqa: E731
    v = view(energy)
    structures = v.samples()
    cost, value = v.space.cost(structures, Y), energy(structures)
    for b, loss in enumerate(objectives.ranking(view(energy))):
        pairs = [(i, j) for i in range(5) for j in range(5) if cost[i, b] < cost[j, b]]
        terms = [-torch.sigmoid(value[j, b] - value[i, b]).log() for i, j in pairs]
        torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_regression_compares_scores_of_all_samples():
    v = view()
    structures = v.samples()
    error = torch.sigmoid(structures.sum(-1)) - 1.0 + v.space.cost(structures, Y)
    torch.testing.assert_close(objectives.regression(view()), error.square().mean(0))


@pytest.mark.parametrize("name", OUTER_OBJECTIVES)
def test_whether_theta_enters_is_what_the_registry_says(name):
    logits = LOGITS.clone().requires_grad_()
    total, count = objectives.outer(view(logits=logits), name)
    assert count == 2
    assert total.requires_grad == OUTER_OBJECTIVES[name].depends_on_theta
    total, _ = objectives.outer(view(logits=logits), name, task_weight=1.0)
    (gradient,) = torch.autograd.grad(total, logits)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("name", OUTER_OBJECTIVES)
def test_fillers_count_nothing(name):
    full = objectives.outer(view(), name, task_weight=0.5)
    masked = dataclasses.replace(view(), weight=torch.tensor([1.0, 0.0]))
    total, count = objectives.outer(masked, name, task_weight=0.5)
    assert count == 1
    assert 0 < total < full[0]


def test_inner_loss_adds_the_weighted_energy():
    total, count = objectives.inner(view(), 0.3)
    expected = objectives.mle(view()).sum() - 0.3 * torch.sigmoid(LOGITS).sum()
    torch.testing.assert_close(total, expected)
    assert count == 2


def test_the_fixed_part_of_the_inner_loss_can_hold_the_cost_of_the_task():
    without, count = objectives.inner(view(), 0.3)
    total, _ = objectives.inner(view(fixed_task_weight=7.0), 0.3)
    ybar = torch.sigmoid(LOGITS)
    f1 = 2 * (ybar * Y).sum(-1) / (ybar.sum(-1) + Y.sum(-1))
    torch.testing.assert_close(total, without + 7.0 * (1 - f1).sum())
    assert count == 2
    # The likelihood as an outer loss, and that of the local potentials, stay what they are.
    torch.testing.assert_close(
        objectives.outer(view(fixed_task_weight=7.0), "mle")[0], objectives.outer(view(), "mle")[0]
    )


LEARNED = [(task, "linear_chain") for task in problems.TASKS]
LEARNED += [("bilstm", energy) for energy in problems.TAGGING_ENERGIES if energy != "linear_chain"]


@pytest.mark.parametrize(("task", "energy"), LEARNED)
def test_outer_training_lowers_the_energy_of_gold_below_corrupted(task, energy):
    """The sign convention: an energy trained on gold data is lower at gold than at corrupted y."""
    batch = problems.random_batch(task, 8, 0)
    config = (
        problems.config_of(task)
        if energy == "linear_chain"
        else problems.tagging_config(task, energy)
    )
    players = build_players(config, problems.codec_of(task), problems.CPU)
    optimizer = torch.optim.Adam(players.energy.parameters(), 0.05)
    logits = torch.zeros_like(players.inference_net(batch.inputs))
    for step in range(60):
        generator = torch.Generator().manual_seed(step)
        total, count = objectives.outer(view_of(players, batch, logits, generator), "nce")
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    v = view_of(players, batch, logits, torch.Generator().manual_seed(99))
    scores = v.energy(v.samples())
    differs = (v.samples()[1:] - v.y).flatten(2).abs().sum(-1) > 0
    margin = (scores[1:] - scores[0])[differs]
    assert margin.mean() > 0.5
    assert (margin > 0).double().mean() > 0.85


def test_cost_is_zero_at_gold_and_one_at_its_opposite():
    for space, y in ((LabelSets(), Y), (TagSequences(3, 2, 7.0), torch.eye(3).unsqueeze(0))):
        torch.testing.assert_close(space.cost(y, y), torch.zeros(len(y)))
        torch.testing.assert_close(space.cost(torch.zeros_like(y), y), torch.ones(len(y)))
    empty = torch.zeros(1, 3)
    assert LabelSets().cost(empty, empty) == 0.0


def test_tokens_of_entities_count_more_in_the_cost():
    codec = dataclasses.replace(problems.tagging_codec(), tags=("O", "B-x", "I-x"), spans=True)
    y = torch.eye(3)[torch.tensor([[0, 0, 1, 2], [0, 0, 0, 0]])]
    ybar = torch.eye(3)[torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0]])]
    cost = output_space(codec, 5.0).cost(ybar, y)
    torch.testing.assert_close(cost, torch.tensor([5 / 12, 1 / 4]))
    cost = output_space(codec, 1.0).cost(ybar, y)
    torch.testing.assert_close(cost, torch.tensor([1 / 4, 1 / 4]))
    plain = dataclasses.replace(codec, spans=False)
    torch.testing.assert_close(output_space(plain, 5.0).cost(ybar, y), cost)


def test_samples_follow_the_distribution_and_respect_padding():
    space, mask = TagSequences(3), torch.tensor([[True, True, False]])
    logits = torch.tensor([[[3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 9.0, 0.0]]])
    drawn = space.sample(logits, {"mask": mask}, 4000, torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, 1, 3, 3)
    frequency = drawn.mean(0)[0]
    torch.testing.assert_close(frequency[:2], torch.softmax(logits[0, :2], -1), atol=0.03, rtol=0.0)
    assert frequency[2].abs().max() == 0.0


def test_what_is_drawn_of_nan_is_nan_and_the_rest_is_what_it_was():
    nan, draws = torch.nan, 50
    logits = torch.tensor([[0.3, nan, -1.0], [2.0, 0.5, 0.1]])
    drawn = LabelSets().sample(logits, {}, draws, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.isnan(), logits.isnan().expand(draws, 2, 3))
    never = logits.nan_to_num(-99.0)
    whole = LabelSets().sample(never, {}, draws, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.nan_to_num(0.0), whole)
    logits = torch.tensor([[[0.3, nan, -1.0], [2.0, 0.5, 0.1]]])
    mask = torch.tensor([[True, True]])
    tags = TagSequences(3).sample(logits, {"mask": mask}, draws, torch.Generator().manual_seed(0))
    assert tags[:, :, 0].isnan().all()
    assert torch.equal(tags[:, :, 1].sum(-1), torch.ones(draws, 1))


def test_padding_changes_no_energy_cost_or_likelihood():
    batch = problems.random_tagging_batch(4)
    players = build_players(problems.tagging_config(), problems.tagging_codec(), problems.CPU)
    phi = problems.random_phi(players)
    longer = dataclasses.replace(
        batch,
        inputs={
            "features": torch.cat([batch.inputs["features"], torch.zeros(4, 3, 3).long()], 1),
            "mask": torch.cat([batch.inputs["mask"], torch.zeros(4, 3) > 0], 1),
        },
        target=torch.cat([batch.target, torch.zeros(4, 3).long()], 1),
    )
    for loss in (
        objectives.mle,
        objectives.task,
        objectives.ssvm,
        lambda v: objectives.inner_terms(v)[1],
    ):
        values = [
            loss(players.view(b, players.inference_net(b.inputs), players.potentials(b, phi), phi))
            for b in (batch, longer)
        ]
        torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-12)
