"""Compiled curvature equals the eager one, and is split, shared and kept as it says."""

import functools
import gc
import itertools
from collections import Counter

import problems
import pytest
import torch
from test_staged import (
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
from ispen_dist.graphs.compiler import Compiler
from ispen_dist.graphs.operators import CompiledOperator
from ispen_dist.graphs.passes import CompiledPasses
from ispen_dist.graphs.stage_graphs import (
    GRADIENT,
    PRODUCT,
    TANGENT,
    VALUE,
    StageGraph,
    stage_graph,
)
from ispen_dist.implicit import staged_hypergradient
from ispen_dist.linalg.operators import build_operator, symmetry_defect
from ispen_dist.linalg.staged_operators import StagedLoss, build_staged_operator
from ispen_dist.linalg.stages import StageError
from ispen_dist.losses import Losses
from ispen_dist.models.encoders import TransformerBlock, TransformerEncoder, mask_bias
from ispen_dist.models.stages import Part, StagedNetwork, stages_at
from ispen_dist.models.structure import structure
from ispen_dist.ops import using_kernels
from ispen_dist.players import build_players, replicated

pytestmark = pytest.mark.usefixtures("float64")

CURVATURES = ["hessian", "gauss_newton"]
TASKS = ["multilabel", "transformer"]  # shapes of a bilstm depend on lengths
aten = torch.ops.aten

TRACED = Compiler("trace")
"""Shared by tests, as a run shares its own: what one of them traces the others use."""
losses_of = functools.cache(tiny)
"""Kept to the end: a compiler knows an output loss by its address."""


# -- the same numbers ----------------------------------------------------------------------------


def assert_the_same_operator(operator, whole, losses):
    """Sums of about a hundred terms in another order: 1e-12 is four digits above roundoff."""
    assert operator.value.item() == pytest.approx(whole.value.item(), rel=1e-12)
    assert list(operator.gradient) == list(whole.gradient)
    assert relative(operator.gradient, whole.gradient) < 1e-12
    directions = [random_like(losses.theta(), seed) for seed in (1, 2)]
    for v in directions:
        assert relative(operator.matvec(v), whole.matvec(v)) < 1e-12
    assert_the_same_mixed_product(operator, whole, losses, directions)
    # A mixed product, which uses the tangent alone, leaves the next product right.
    assert relative(operator.matvec(v), whole.matvec(v)) < 1e-12


def whole_operator(losses, batch, curvature, seed=3):
    torch.manual_seed(seed)
    return build_operator(curvature, losses.inner_graph(batch), losses.theta(), losses.phi())


def compiled_operator(losses, batch, curvature, compiler=TRACED, seed=3):
    torch.manual_seed(seed)
    return CompiledOperator(losses.inner_staged(batch), compiler, curvature)


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


# -- the split -----------------------------------------------------------------------------------

PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm}
COSTLY = {
    aten.exp, aten.erf, aten.tanh, aten.rsqrt, aten.sqrt, aten.pow, aten.log, aten._softmax,
    aten.native_layer_norm, aten.var_mean, aten.amax, aten.gelu, aten.bernoulli,
}  # fmt: skip


def operations(graph: StageGraph, *numbers: int) -> Counter:
    """Count the operations of some phases."""
    nodes = (n for i in numbers for n in graph.phases[i].module.graph.nodes)
    return Counter(n.target.overloadpacket for n in nodes if hasattr(n.target, "overloadpacket"))


def num_products(graph: StageGraph, *numbers: int) -> int:
    return sum(operations(graph, *numbers)[packet] for packet in PRODUCTS)


def block_graph(curvature: str, dropout: float = 0.2) -> StageGraph:
    """The phases of a transformer block, large enough that no product is small."""
    encoder = TransformerEncoder(6, 24, 1, 3, dropout)
    mask = torch.ones(4, 7, dtype=torch.bool)
    stage = stages_at(Alone(encoder), {"mask": mask}, True)[1]
    p = {f"encoder.{name}": x for name, x in encoder.named_parameters()}
    p = {key: p[key] for key in stage.keys}
    return stage_graph(
        Compiler("trace"), curvature, stage, frozenset(), p, (torch.randn(4, 7, 24),)
    )


class Alone(StagedNetwork):
    """An encoder as a network."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def parts(self):
        return self.encoder.parts()


GRADIENT_PRODUCTS = 4 * 3 + 2 + 4
"""Of a block: three per linear layer; two of attention forward, two backward for each of them."""


def test_an_exact_product_of_a_block_costs_two_gradients():
    graph = block_graph("hessian")
    assert num_products(graph, VALUE, GRADIENT) == GRADIENT_PRODUCTS
    assert num_products(graph, TANGENT, PRODUCT) == 2 * GRADIENT_PRODUCTS


def test_a_gauss_newton_product_of_a_block_costs_four_thirds_of_a_gradient():
    graph = block_graph("gauss_newton")
    assert num_products(graph, VALUE, GRADIENT) == GRADIENT_PRODUCTS
    assert 3 * num_products(graph, TANGENT, PRODUCT) == 4 * GRADIENT_PRODUCTS


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_product_repeats_nothing_costly_of_the_solve_point(curvature):
    graph = block_graph(curvature)
    at_point = operations(graph, VALUE, GRADIENT)
    assert at_point[aten.exp] + at_point[aten._softmax] > 0  # the list names what is there
    assert at_point[aten.erf] > 0
    in_product = operations(graph, TANGENT, PRODUCT)
    assert not COSTLY & in_product.keys()


def test_what_is_kept_of_gelu_are_its_value_two_derivatives_and_the_adjoint():
    """Chosen once for tangent and product: erf(u) and exp(-u^2 / 2) would be one array more."""
    graph = block_graph("hessian", dropout=0.0)
    directions = {name for number in (TANGENT, PRODUCT) for name, _ in graph.inputs[number]}
    own = {name for name, _ in graph.inputs[VALUE]}
    kept = {
        node.name: tuple(node.meta["val"].shape)
        for number in (TANGENT, PRODUCT)
        for node in graph.phases[number].module.graph.nodes
        if node.op == "placeholder" and node.name not in directions | own
    }
    of_solve = set(graph.phases[VALUE].leaves) | set(graph.phases[GRADIENT].leaves)
    hidden = [n for n, shape in kept.items() if n in of_solve and shape[-1] == 4 * 24]
    assert len(hidden) == 4, {name: kept[name] for name in hidden}


# -- what is shared ------------------------------------------------------------------------------


def transformer_losses(num_layers: int, dropout: float = 0.0) -> Losses:
    """Losses of a transformer of some blocks, wide enough for two heads."""
    config = problems.tagging_config("transformer", objective="ssvm", task_weight=1.0)
    net = config.inference_net
    for name, value in {"num_layers": num_layers, "hidden_size": 4, "dropout": dropout}.items():
        object.__setattr__(net, name, value)
    players = build_players(config, problems.tagging_codec(), problems.CPU)
    return Losses(players, replicated(players))


def compiled_by(losses, batch, compiler):
    """Return the names of the functions that a solve compiles."""
    before = len(compiler.names)
    operator = compiled_operator(losses, batch, "hessian", compiler)
    operator.mixed(operator.matvec(random_like(losses.theta())))
    return compiler.names[before:]


def test_five_blocks_compile_as_many_functions_as_two():
    batch, compiler = problems.random_batch("transformer", 3, 0), Compiler("trace")
    two, five = (transformer_losses(n, 0.2) for n in (2, 5))
    names = compiled_by(two, batch, compiler)
    assert len(names) == 5 * 4 + 3  # embedding, projection, block, norm, output; the loss
    # The others hold their network, which has another number of blocks.
    assert len(compiled_by(five, batch, compiler)) == len(names) - 4
    assert len([name for name in compiler.names if "blocks" in name]) == 4


def test_a_second_solve_of_the_same_shapes_compiles_nothing():
    losses, compiler = tiny("multilabel", dropout=0.2), Compiler("trace")
    assert compiled_by(losses, problems.random_batch("multilabel", 3, 0), compiler)
    with torch.no_grad():
        for p in losses.theta().values():
            p.add_(0.1)
    again, other = (problems.random_batch("multilabel", size, 5) for size in (3, 4))
    assert compiled_by(losses, again, compiler) == []
    whole = whole_operator(losses, again, "hessian")
    assert_the_same_operator(compiled_operator(losses, again, "hessian", compiler), whole, losses)
    assert compiled_by(losses, other, compiler)


@pytest.mark.parametrize("other", [(8, 2, 0.1), (4, 1, 0.1), (4, 2, 0.3)])
def test_unlike_blocks_are_not_shared(other):
    assert structure(TransformerBlock(4, 2, 0.1)) == structure(TransformerBlock(4, 2, 0.1))
    assert structure(TransformerBlock(*other)) != structure(TransformerBlock(4, 2, 0.1))


def test_training_and_evaluation_are_not_shared():
    network, inputs = Alone(TransformerEncoder(4, 4, 2, 2, 0.1)), {}
    first, second = stages_at(network, inputs, True)[1:3]
    assert first.signature() == second.signature()
    assert first.signature() != stages_at(network, inputs, False)[1].signature()


def test_a_frozen_or_tied_parameter_is_not_shared():
    plain, frozen, tied = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(3))
    frozen[0].weight.requires_grad_(False)
    tied[1].weight = tied[0].weight
    assert len({structure(m) for m in (plain, frozen, tied)}) == 3


class Offset(StagedNetwork):
    """Two stages of the same code that add different constants, made anew for every pass."""

    def __init__(self, make):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.make, self.offsets = make, (1.0, 2.0)

    def parts(self):
        def part(i, layer, offset):
            def run(inputs, *s):
                return (torch.tanh(layer(s[0] if s else inputs["x"]) + offset),)

            return Part(f"layers.{i}", run, [layer])

        return [part(i, self.layers[i], self.make(self.offsets[i])) for i in range(2)]


@pytest.mark.parametrize("make", [float, torch.tensor])
def test_constants_of_a_stage_are_not_shared(make):
    torch.manual_seed(0)
    network, inputs, compiler = Offset(make), {"x": torch.randn(4, 3)}, Compiler("trace")
    for offsets in ((1.0, 2.0), (0.5, -1.0), (3.0, 0.0)):
        network.offsets = offsets
        loss = StagedLoss(staged_of(network, inputs), square, NoPotentials())
        operator = CompiledOperator(loss, compiler, "hessian")
        eager = build_staged_operator("hessian", loss)
        v = random_like(operator.gradient)
        assert relative(operator.matvec(v), eager.matvec(v)) < 1e-13
        del loss, operator, eager


# -- randomness, memory and errors ---------------------------------------------------------------


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


def live_bytes() -> int:
    """Bytes of all tensors that Python holds."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    return sum({x.data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_product_leaves_its_tangent_behind_and_nothing_else(curvature):
    losses = losses_of("transformer", dropout=0.4)
    batch = problems.random_batch("transformer", 5, 1)
    operator = compiled_operator(losses, batch, curvature)
    v, held = random_like(losses.theta()), []
    for product in (operator.matvec, operator.matvec, operator.mixed, operator.matvec):
        product(v)
        held.append(live_bytes())
    tangent = operator._model.z.numel() * operator._model.z.element_size()
    assert [b - a for a, b in itertools.pairwise(held)] == [tangent, 0, tangent]
    points = operator._model._points
    assert points
    for point in points:
        later = {name for i in (TANGENT, PRODUCT) for name in point._graph.phases[i].reads}
        assert point._product == {}
        assert point._solve.keys() <= later


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


# -- kernels -------------------------------------------------------------------------------------


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
