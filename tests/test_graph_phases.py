"""How a compiled stage is split into phases, what each costs, and what is kept between them."""

import gc
import itertools
from collections import Counter

import problems
import pytest
import torch
from staged import CURVATURES, Alone, compiled_operator, losses_of, random_like

from ispen_dist.graphs.compiler import Compiler
from ispen_dist.graphs.stage_graphs import (
    GRADIENT,
    PRODUCT,
    TANGENT,
    VALUE,
    StageGraph,
    stage_graph,
)
from ispen_dist.models.encoders import TransformerEncoder
from ispen_dist.models.stages import stages_at

pytestmark = pytest.mark.usefixtures("float64")

aten = torch.ops.aten
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
