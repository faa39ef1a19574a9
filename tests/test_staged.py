"""Curvature stage by stage equals the graph of the whole gradient and a dense reference."""

import problems
import pytest
import torch
from staged import (
    CURVATURES,
    MEMORY,
    NoPotentials,
    Tied,
    assert_the_same_mixed_product,
    random_like,
    relative,
    square,
    staged_of,
    tiny,
)
from torch import nn

import ispen_dist
from ispen_dist.implicit import staged_hypergradient
from ispen_dist.linalg.operators import build_operator
from ispen_dist.linalg.staged_operators import StagedHessian, StagedLoss, build_staged_operator
from ispen_dist.linalg.stages import StageError
from ispen_dist.models.stages import Part, StagedNetwork, parts_of

pytestmark = pytest.mark.usefixtures("float64")


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
