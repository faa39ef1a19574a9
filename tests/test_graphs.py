"""Compiled curvature equals the eager one, and what it cannot compile is refused by name."""

import problems
import pytest
import torch
from staged import (
    CURVATURES,
    MEMORY,
    TRACED,
    NoPotentials,
    Tied,
    assert_the_same_operator,
    compiled_operator,
    losses_of,
    random_like,
    relative,
    square,
    staged_of,
    tiny,
    whole_operator,
)
from torch import nn

import ispen_dist
from ispen_dist.graphs.compiler import Compiler
from ispen_dist.graphs.operators import CompiledOperator
from ispen_dist.graphs.passes import CompiledPasses
from ispen_dist.graphs.stage_graphs import GRADIENT, PRODUCT, TANGENT, VALUE
from ispen_dist.implicit import staged_hypergradient
from ispen_dist.linalg.operators import build_operator, symmetry_defect
from ispen_dist.linalg.staged_operators import StagedLoss, build_staged_operator
from ispen_dist.linalg.stages import StageError
from ispen_dist.models.encoders import TransformerBlock, mask_bias
from ispen_dist.models.stages import Part, StagedNetwork
from ispen_dist.ops import using_kernels

pytestmark = pytest.mark.usefixtures("float64")

TASKS = ["multilabel", "transformer"]  # shapes of a bilstm depend on lengths


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("task", TASKS)
def test_every_part_of_an_operator_equals_the_whole_graph(task, curvature, dropout):
    losses, batch = losses_of(task, dropout=dropout), problems.random_batch(task, 5, 1)
    whole = whole_operator(losses, batch, curvature)
    assert_the_same_operator(compiled_operator(losses, batch, curvature), whole, losses)


@pytest.mark.thorough
def test_generated_code_gives_the_same_operator():
    losses, batch = losses_of("multilabel", dropout=0.4), problems.random_batch("multilabel", 5, 1)
    whole = whole_operator(losses, batch, "hessian")
    operator = compiled_operator(losses, batch, "hessian", Compiler("inductor"))
    assert_the_same_operator(operator, whole, losses)


@pytest.mark.thorough
def test_generated_code_of_a_block_gives_the_same_operator():
    """The stage of a transformer that has everything: attention, norms, masks and a shortcut."""
    torch.manual_seed(0)
    network = OneBlock().train()
    inputs = {"x": torch.randn(3, 4, 4), "mask": torch.arange(4) < torch.tensor([[4], [2], [3]])}
    loss = StagedLoss(staged_of(network, inputs), square, NoPotentials())
    compiler = Compiler("inductor")
    torch.manual_seed(3)
    eager = build_staged_operator("hessian", loss)
    torch.manual_seed(3)
    operator = CompiledOperator(loss, compiler, "hessian")
    assert relative(operator.gradient, eager.gradient) < 1e-12
    for seed in (1, 2):
        v = random_like(operator.gradient, seed)
        assert relative(operator.matvec(v), eager.matvec(v)) < 1e-12
    assert len(compiler.names) == 4


class OneBlock(StagedNetwork):
    """A block of a transformer and nothing else."""

    def __init__(self):
        super().__init__()
        self.block = TransformerBlock(4, 2, 0.4)

    def parts(self):
        def run(inputs):
            return (self.block(inputs["x"], mask_bias(inputs["mask"], inputs["x"].dtype)),)

        return [Part("block", run, [self.block])]


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("task", TASKS)
def test_compiled_passes_equal_the_whole_graph(task, curvature, memory):
    losses, batch = losses_of(task, memory, 0.4), problems.random_batch(task, 5, 1)
    whole = whole_operator(losses, batch, curvature)
    torch.manual_seed(3)
    staged = losses.inner_staged(batch, compiler=TRACED)
    assert isinstance(staged.model.passes, CompiledPasses)
    assert_the_same_operator(build_staged_operator(curvature, staged), whole, losses)


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("task", TASKS)
def test_the_hypergradient_equals_that_of_the_whole_graph(task, curvature):
    losses = losses_of(task, freeze_local=False)
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
    compiled = staged_hypergradient(
        losses.inner_staged(inner),
        losses.outer_staged(outer, generator.manual_seed(5)),
        compiler=TRACED,
        **settings,
    )
    assert relative(compiled.explicit, whole.explicit) < 1e-10
    assert relative(compiled.implicit, whole.implicit) < 1e-10
    assert problems.flatten(compiled.implicit).norm() > 0.0
    assert compiled.num_steps == whole.num_steps


@pytest.mark.parametrize("signature", [None, "square"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_tied_and_frozen_parameters(curvature, signature):
    torch.manual_seed(0)
    network, inputs = Tied(), {"x": torch.randn(4, 3)}
    theta = {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}
    loss = StagedLoss(staged_of(network, inputs), square, NoPotentials(), signature=signature)
    operator = CompiledOperator(loss, Compiler("trace"), curvature)
    assert operator.gradient.keys() == theta.keys() == {"shared.weight", "shared.bias"}
    v = random_like(theta)
    expected = dense_tied(network, inputs, theta, curvature) @ problems.flatten(v)
    error = (problems.flatten(operator.matvec(v)) - expected).norm() / expected.norm()
    assert error < 1e-13


def dense_tied(network, inputs, theta, curvature):
    """The curvature of `square` by dense derivatives of one flat vector."""

    def model(vector):
        tree = problems.unflatten(vector, theta)
        return torch.func.functional_call(network, tree, (inputs,)).flatten()

    point = problems.flatten(theta)
    if curvature == "hessian":
        return torch.autograd.functional.hessian(lambda t: square(model(t), {})[0], point)
    J = torch.autograd.functional.jacobian(model, point)
    return J.T @ torch.autograd.functional.hessian(lambda z: square(z, {})[0], model(point)) @ J


def test_passes_of_tied_and_frozen_parameters():
    torch.manual_seed(0)
    network, inputs = Tied(), {"x": torch.randn(4, 3)}
    theta = {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}
    passes = CompiledPasses(Compiler("trace"), frozenset({"scale.weight"}))
    model = staged_of(network, inputs, passes=passes)
    operator = build_staged_operator("hessian", StagedLoss(model, square, NoPotentials()))
    v = random_like(theta)
    expected = dense_tied(network, inputs, theta, "hessian") @ problems.flatten(v)
    error = (problems.flatten(operator.matvec(v)) - expected).norm() / expected.norm()
    assert error < 1e-13


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("task", TASKS)
def test_masks_are_drawn_once_per_solve(task, curvature):
    losses, batch = losses_of(task, dropout=0.4), problems.random_batch(task, 5, 1)
    operator = compiled_operator(losses, batch, curvature)
    state = torch.get_rng_state()
    u, v = (random_like(losses.theta(), seed) for seed in (1, 2))
    first = operator.matvec(v)
    assert symmetry_defect(operator, u, v) < 1e-12
    again = operator.matvec(v)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert torch.equal(torch.get_rng_state(), state)
    other = compiled_operator(losses, batch, curvature, seed=4)
    assert relative(other.matvec(v), first) > 1e-3


def test_a_stage_whose_shapes_depend_on_values_is_refused_by_name():
    losses, batch = losses_of("bilstm"), problems.random_batch("bilstm", 3, 0)
    message = r"stage encoder\.lstm: expected .* compile\.curvature=false"
    with pytest.raises(StageError, match=message):
        compiled_operator(losses, batch, "hessian")


class Noisy(StagedNetwork):
    """A stage that draws by something else than dropout."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def parts(self):
        def run(inputs):
            h = self.linear(inputs["x"])
            return (h + torch.randn(h.shape),)

        return [Part("noise", run, [self.linear])]


def test_a_stage_that_draws_by_itself_is_refused_by_name():
    loss = StagedLoss(staged_of(Noisy(), {"x": torch.ones(4, 3)}), square, NoPotentials())
    message = r"stage noise: expected dropout .* compile\.curvature=false"
    with pytest.raises(StageError, match=message):
        CompiledOperator(loss, Compiler("trace"), "hessian")
    passes = CompiledPasses(Compiler("trace"))
    loss = StagedLoss(
        staged_of(Noisy(), {"x": torch.ones(4, 3)}, passes=passes), square, NoPotentials()
    )
    with pytest.raises(StageError, match=message):
        build_staged_operator("hessian", loss)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_attention_kernels_take_their_place_in_the_phases(curvature):
    """Value and gradient once per solve, tangents for every product; in Triton's interpreter."""
    pytest.importorskip("triton")
    losses, batch = tiny("transformer"), problems.random_batch("transformer", 3, 1)
    whole = build_operator(curvature, losses.inner_graph(batch), losses.theta(), losses.phi())
    with using_kernels("always"):
        operator = CompiledOperator(losses.inner_staged(batch), Compiler("trace"), curvature)
        assert_the_same_operator(operator, whole, losses)
    block = operator._model._points[2]._graph
    by_phase = {
        number: {str(n.target) for n in phase.module.graph.nodes if "ispen." in str(n.target)}
        for number, phase in block.phases.items()
    }
    assert by_phase[VALUE] == {"ispen.attention_forward.default"}
    assert "ispen.attention_backward.default" in by_phase[GRADIENT]
    assert by_phase[TANGENT] == {"ispen.attention_tangent.default"}
    exact = "ispen.attention_backward_tangent.default" in by_phase[PRODUCT]
    assert exact == (curvature == "hessian")
