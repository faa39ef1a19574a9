"""Curvature stage by stage equals the graph of the whole gradient and a dense reference."""

import dataclasses

import problems
import pytest
import torch
from torch import nn

import ispen_dist
from ispen_dist.implicit import staged_hypergradient
from ispen_dist.linalg.layout import Replicas
from ispen_dist.linalg.operators import build_operator
from ispen_dist.linalg.reduction import OneProcess
from ispen_dist.linalg.staged import StagedFunction
from ispen_dist.linalg.staged_operators import StagedHessian, StagedLoss, build_staged_operator
from ispen_dist.linalg.stages import StageError
from ispen_dist.losses import Losses
from ispen_dist.models.stages import Part, StagedNetwork, parts_of, stages_at
from ispen_dist.players import build_players, replicated

pytestmark = pytest.mark.usefixtures("float64")

CURVATURES = ["hessian", "gauss_newton"]
MEMORY = ["states", "recompute"]


def tiny(task, memory="states", dropout=0.0, **energy):
    """Losses of a tiny run with the energy away from zero."""
    config = problems.config_of(task, objective="ssvm", task_weight=1.0)
    net = dataclasses.replace(
        config.inference_net, dropout=dropout, feature_dropout=dropout, num_layers=2
    )
    config = dataclasses.replace(
        config,
        inference_net=net,
        energy=dataclasses.replace(config.energy, **energy),
        solver=dataclasses.replace(config.solver, memory=memory),
    )
    players = build_players(config, problems.codec_of(task), problems.CPU)
    with torch.no_grad():
        for name, value in problems.random_phi(players).items():
            players.phi[name].copy_(value)
    return Losses(players, replicated(players))


def random_like(tree, seed=7):
    draw = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=draw) for k, v in tree.items()}


def relative(a, b):
    a, b = problems.flatten(a), problems.flatten(b)
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("task", problems.TASKS)
def test_every_part_of_an_operator_equals_the_whole_graph(task, curvature, memory, dropout):
    losses = tiny(task, memory, dropout)
    batch = problems.random_batch(task, 5, 1)
    torch.manual_seed(3)
    whole = build_operator(curvature, losses.inner_graph(batch), losses.theta(), losses.phi())
    torch.manual_seed(3)
    staged = build_staged_operator(curvature, losses.inner_staged(batch))
    assert staged.value == pytest.approx(whole.value.item(), rel=1e-14)
    assert relative(staged.gradient, whole.gradient) < 1e-13
    directions = [random_like(losses.theta(), seed) for seed in (1, 2)]
    for v in directions:
        assert relative(staged.matvec(v), whole.matvec(v)) < 1e-12
    assert_the_same_mixed_product(staged, whole, losses, directions)


def assert_the_same_mixed_product(operator, whole, losses, multiplied):
    """Of any vector, and without a pass of a combination of those that were multiplied."""
    q = random_like(losses.theta(), 3)
    mixed = operator.mixed(q)
    assert list(mixed) == list(losses.phi())
    assert relative(mixed, whole.mixed(q)) < 1e-12
    coefficients = [0.7 - 1.1 * i for i in range(len(multiplied))]
    q = {k: sum(c * v[k] for c, v in zip(coefficients, multiplied, strict=True)) for k in q}
    assert relative(operator.mixed({}, coefficients), whole.mixed(q)) < 1e-12


@pytest.mark.parametrize("freeze_local", [True, False])
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("task", problems.TASKS)
def test_the_hypergradient_equals_that_of_the_whole_graph(task, curvature, freeze_local):
    losses = tiny(task, freeze_local=freeze_local)
    inner, outer = (problems.random_batch(task, 5, seed) for seed in (1, 9))
    settings = {"solver": ispen_dist.CG(15, 1e-12), "damping": 3.0, "curvature": curvature}
    generator = torch.Generator()
    whole = ispen_dist.hypergradient(
        losses.inner_graph(inner),
        losses.outer_graph(outer, generator.manual_seed(5)),
        losses.theta(),
        losses.phi(),
        **settings,
    )
    staged = staged_hypergradient(
        losses.inner_staged(inner),
        losses.outer_staged(outer, generator.manual_seed(5)),
        **settings,
    )
    assert relative(staged.explicit, whole.explicit) < 1e-12
    assert relative(staged.implicit, whole.implicit) < 1e-10
    assert problems.flatten(staged.implicit).norm() > 0.0
    assert staged.num_steps == whole.num_steps


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_hessian_by_stages_is_the_dense_one(curvature):
    """Against columns of a flat double backward, which no operator of the package takes part in."""
    losses = tiny("transformer")
    batch = problems.random_batch("transformer", 4, 2)
    theta = {k: v.detach() for k, v in losses.theta().items()}
    loss = losses.inner_graph(batch)

    def flat(vector):
        return problems.scalar(loss(problems.unflatten(vector, theta), losses.phi()))

    if curvature == "hessian":
        dense = torch.autograd.functional.hessian(flat, problems.flatten(theta))
    else:
        z = loss.model(theta)
        J = torch.autograd.functional.jacobian(
            lambda t: loss.model(problems.unflatten(t, theta)).flatten(), problems.flatten(theta)
        )
        g_zz = torch.autograd.functional.hessian(
            lambda z_: problems.scalar(loss.output_loss(z_.view(z.shape), losses.phi())),
            z.detach().flatten(),
        )
        dense = J.T @ g_zz @ J
    operator = build_staged_operator(curvature, losses.inner_staged(batch))
    for seed in range(3):
        v = random_like(theta, seed)
        product = problems.flatten(operator.matvec(v))
        expected = dense @ problems.flatten(v)
        assert (product - expected).norm() / expected.norm() < 1e-12


class Tied(StagedNetwork):
    """A linear layer read twice, with one frozen parameter between."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(3, 3)
        self.scale = nn.Linear(3, 3, bias=False)
        self.scale.weight.requires_grad_(False)

    def parts(self):
        return [
            Part("in", lambda x, *s: (torch.tanh(self.shared(x["x"])),), [self.shared]),
            Part("scale", lambda x, h: (torch.sin(self.scale(h)),), [self.scale]),
            Part("out", lambda x, h: (torch.tanh(self.shared(h)),), [self.shared]),
        ]


def staged_of(network, inputs, **settings):
    frozen = frozenset(n for n, p in network.named_parameters() if not p.requires_grad)
    return StagedFunction(
        stages_at(network, inputs, True),
        Replicas(OneProcess()),
        dict(network.named_parameters()),
        frozen=frozen,
        **settings,
    )


class NoPotentials:
    psi: dict = {}  # noqa: RUF012

    def pull_back(self, psi_bar):
        return {}


def square(z, psi, data=None):
    return (torch.exp(z) * z).sum(), 1.0


@pytest.mark.parametrize("prefetch", [True, False])
@pytest.mark.parametrize("keep_states", [True, False])
def test_tied_and_frozen_parameters(keep_states, prefetch):
    torch.manual_seed(0)
    network, inputs = Tied(), {"x": torch.randn(4, 3)}
    model = staged_of(network, inputs, keep_states=keep_states, prefetch=prefetch)
    operator = StagedHessian(StagedLoss(model, square, NoPotentials()))
    theta = {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}
    assert operator.gradient.keys() == theta.keys() == {"shared.weight", "shared.bias"}

    def flat(vector):
        tree = problems.unflatten(vector, theta)
        return square(torch.func.functional_call(network, tree, (inputs,)), {})[0]

    dense = torch.autograd.functional.hessian(flat, problems.flatten(theta))
    v = random_like(theta)
    expected = dense @ problems.flatten(v)
    error = (problems.flatten(operator.matvec(v)) - expected).norm() / expected.norm()
    assert error < 1e-13


def test_a_forward_pass_by_stages_draws_the_masks_of_a_plain_one():
    losses = tiny("transformer", dropout=0.5)
    network = losses._players.inference_net.train()
    batch = problems.random_batch("transformer", 4, 0)
    torch.manual_seed(11)
    plain = network(batch.inputs)
    torch.manual_seed(11)
    function = staged_of(network, batch.inputs)
    assert torch.equal(function.value(), plain)
    after = torch.rand(3)
    assert torch.equal(function.states_and_tangents(random_like(losses.theta()))[0][-1][0], plain)
    torch.manual_seed(11)
    network(batch.inputs)
    assert torch.equal(torch.rand(3), after)


def test_a_network_without_stages_is_refused_by_name():
    with pytest.raises(StageError, match=r"Linear: expected a StagedNetwork.*define parts\(\)"):
        parts_of(nn.Linear(2, 2))


def test_a_parameter_that_no_stage_reads_is_named():
    network = Tied()
    network.extra = nn.Linear(2, 2)
    with pytest.raises(StageError, match=r"extra\.weight, extra\.bias in none"):
        parts_of(network)


class Fused(StagedNetwork):
    """Attention by a kernel that has no second derivative."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 8)

    def parts(self):
        def attend(inputs):
            x = self.project(inputs["x"])
            return (nn.functional.scaled_dot_product_attention(x, x, x),)

        return [Part("blocks.0", attend, [self.project])]


@pytest.mark.parametrize("keep_states", [True, False])
def test_a_layer_without_second_derivative_is_named(keep_states):
    network = Fused().float()
    inputs = {"x": torch.randn(1, 2, 5, 8, dtype=torch.float32)}
    model = staged_of(network, inputs, keep_states=keep_states)
    operator = StagedHessian(StagedLoss(model, square, NoPotentials()))
    v = {k: torch.ones_like(p) for k, p in network.named_parameters()}
    with pytest.raises(StageError, match=r"stage blocks\.0: expected layers that can be .* twice"):
        operator.matvec(v)
