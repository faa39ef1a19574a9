"""Layer norm and GELU kernels against their references: every pass, both second-order modes."""

import os

import pytest
import torch
from exactness import DEVICE, assert_as_exact, random
from torch.autograd import forward_ad, grad, gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

CUDA = torch.cuda.is_available()
if not CUDA:  # read by Triton when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from ispen_kernels import gelu_passes, layer_norm_passes, norms  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.float64]
SIZES = [(1, 1), (3, 17), (5, 33), (2, 257)]

PUBLIC = {
    "layer_norm": (norms.layer_norm, norms.layer_norm_reference, [(2, 3), (3,), (3,)]),
    "gelu": (norms.gelu, norms.gelu_reference, [(2, 3)]),
}


def arguments(name, seed=0):
    return [random(*shape, seed=seed + i) for i, shape in enumerate(PUBLIC[name][2])]


def leaves(tensors):
    return [a.detach().requires_grad_() for a in tensors]


def passes(function, inputs, dots, g, g_dot):
    """Return value, tangent, gradients, and tangents of the gradients, by forward over reverse."""
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(a.detach(), d).requires_grad_()
            for a, d in zip(inputs, dots, strict=True)
        ]
        out = function(*duals)
        grads = grad(out, duals, forward_ad.make_dual(g, g_dot))
        pairs = [forward_ad.unpack_dual(a) for a in (out, *grads)]
    return [part.detach() for pair in pairs for part in pair]


def assert_passes_as_exact(name, inputs, dots, g, g_dot):
    function, reference, _ = PUBLIC[name]
    arguments_32_or_64 = (inputs, dots, g, g_dot)
    doubles = ([a.double() for a in inputs], [a.double() for a in dots], g.double(), g_dot.double())
    got, eager = (passes(f, *arguments_32_or_64) for f in (function, reference))
    exact = passes(reference, *doubles)
    assert len(got) == 2 + 2 * len(inputs)
    for trio in zip(got, eager, exact, strict=True):
        assert_as_exact(*trio, floor=8, least_size=1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_pass_of_layer_norm_is_as_exact_as_eager(size, dtype):
    rows, width = size
    x, x_dot, g, g_dot = (random(rows, width, dtype=dtype, seed=s) for s in range(4))
    weights = [random(width, dtype=dtype, seed=s) for s in range(4)]
    if rows > 2:  # padding; eps alone is left of the variance, and 1 / sqrt(eps) of its rounding
        x[-1] = 0.0
    assert_passes_as_exact(
        "layer_norm", [x, *weights[:2]], [x_dot * (x != 0), *weights[2:]], g, g_dot
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1,), (17, 33), (2, gelu_passes.BLOCK_ELEMENTS + 1)])
def test_every_pass_of_gelu_is_as_exact_as_eager(size, dtype):
    x, x_dot, g, g_dot = (random(*size, dtype=dtype, seed=s) for s in range(4))
    assert_passes_as_exact("gelu", [3.0 * x], [x_dot], g, g_dot)


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_tangent_in_one_pass_equal_those_in_two(dtype):
    x, x_dot = (random(3, 17, dtype=dtype, seed=s) for s in (0, 1))
    weights = [random(17, dtype=dtype, seed=s) for s in range(4)]
    zero = torch.zeros_like(x)
    got = norms.layer_norm_with_tangent(x, *weights[:2], x_dot, *weights[2:])
    two = passes(norms.layer_norm, [x, *weights[:2]], [x_dot, *weights[2:]], zero, zero)[:2]
    assert all(torch.equal(a, b) for a, b in zip(got, two, strict=True))
    got, two = norms.gelu_with_tangent(x, x_dot), passes(norms.gelu, [x], [x_dot], zero, zero)[:2]
    assert all(torch.equal(a, b) for a, b in zip(got, two, strict=True))


def test_more_rows_than_partial_sums(monkeypatch):
    monkeypatch.setattr(layer_norm_passes, "NUM_PARTIALS", 3)
    monkeypatch.setattr(layer_norm_passes, "COMBINE_COLUMNS", 4)
    monkeypatch.setattr(layer_norm_passes, "COMBINE_ROWS", 2)
    x, x_dot, g, g_dot = (random(7, 9, seed=s) for s in range(4))
    weights = [random(9, seed=s) for s in range(4)]
    assert_passes_as_exact("layer_norm", [x, *weights[:2]], [x_dot, *weights[2:]], g, g_dot)
    gradients = [grad((norms.layer_norm(*a) * g).sum(), a) for a in [leaves([x, *weights[:2]])] * 2]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_gelu_of_extreme_inputs_is_finite():
    x = torch.tensor([-3e38, -1e20, -40.0, 40.0, 1e20, 3e38], device=DEVICE)
    ones = torch.ones_like(x)
    value, tangent, first, second = passes(norms.gelu, [x], [ones], ones, ones)
    assert torch.equal(value, x.clamp(min=0.0))
    step = (x > 0).float()
    assert torch.equal(tangent, step)
    assert torch.equal(first, step)
    assert torch.equal(second, step)  # f'' x' g = 0, and f' g' is left


def test_eps_is_exact_in_float64():
    x, weight, bias = random(2, 3) * 1e-3, random(3), random(3)
    for eps in (1e-5, 0.1):
        torch.testing.assert_close(
            norms.layer_norm(x, weight, bias, eps),
            norms.layer_norm_reference(x, weight, bias, eps),
            rtol=1e-13,
            atol=1e-13,
        )


def test_leading_dimensions_and_strides_change_nothing():
    x, weight, bias = random(5, 4, 3).transpose(0, 2), random(5, 2)[:, 0], random(5)
    assert not x.is_contiguous()
    assert not weight.is_contiguous()
    for a in (x, x[0], x[0, 0]):
        torch.testing.assert_close(norms.gelu(a), norms.gelu_reference(a))
        torch.testing.assert_close(
            norms.layer_norm(a, weight, bias), norms.layer_norm_reference(a, weight, bias)
        )
    g, dots = random(4, 3, 5).transpose(0, 1), [random(3, 5, 4).mT, weight, bias]
    assert_passes_as_exact("layer_norm", [x, weight, bias], dots, g, g)
    assert_passes_as_exact("gelu", [x], dots[:1], g, g)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 2, 3)])
def test_empty_tensors(shape):
    x, weight, bias = leaves([random(*shape), random(shape[-1]), random(shape[-1])])
    gradients = grad(norms.layer_norm(x, weight, bias).sum(), (x, weight, bias))
    for a, g in zip((x, weight, bias), gradients, strict=True):
        assert torch.equal(g, torch.zeros_like(a))
    assert norms.gelu(x).shape == shape
    assert grad(norms.gelu(x).sum(), x)[0].shape == shape


@pytest.mark.parametrize("name", PUBLIC)
def test_first_and_second_derivatives_in_all_arguments(name):
    function = PUBLIC[name][0]
    assert gradcheck(function, leaves(arguments(name)), fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(function, leaves(arguments(name)), fast_mode=True)


def second_order(function, inputs, directions):
    """Return the gradients in all inputs of <d |f|^2 / d inputs, directions>."""
    first = grad(function(*inputs).square().sum(), inputs, create_graph=True)
    return grad(sum((g * d).sum() for g, d in zip(first, directions, strict=True)), inputs)


@pytest.mark.parametrize("name", PUBLIC)
def test_both_second_order_modes_equal_the_reference(name):
    function, reference, _ = PUBLIC[name]
    inputs, directions = arguments(name), arguments(name, seed=7)
    expected = second_order(reference, leaves(inputs), directions)
    torch.testing.assert_close(second_order(function, leaves(inputs), directions), expected)
    _, forward = torch.func.jvp(
        torch.func.grad(lambda *a: function(*a).square().sum(), argnums=tuple(range(len(inputs)))),
        tuple(inputs),
        tuple(directions),
    )
    torch.testing.assert_close(forward, expected)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_tangent_of_one_argument_alone(name):
    function, reference, _ = PUBLIC[name]
    inputs, directions = arguments(name), arguments(name, seed=7)
    tangents = []
    for f in (function, reference):
        with forward_ad.dual_level():
            x = forward_ad.make_dual(inputs[0], directions[0]).requires_grad_()
            (first,) = grad(f(x, *inputs[1:]).square().sum(), x)
            tangents.append(forward_ad.unpack_dual(first).tangent)
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("mode", ["real", "symbolic"])
@pytest.mark.parametrize("name", PUBLIC)
def test_two_gradients_are_traced_as_opaque_operators(name, mode):
    def traced(inputs, directions):
        return second_order(PUBLIC[name][0], inputs, directions)

    inputs, directions = leaves(arguments(name)), arguments(name, seed=7)
    graph = make_fx(traced, tracing_mode=mode)(inputs, directions)
    names = [str(node.target) for node in graph.graph.nodes if "ispen" in str(node.target)]
    assert any("backward_tangent" in n for n in names)
    others = leaves([1.5 * a for a in inputs])
    torch.testing.assert_close(graph(others, directions), traced(others, directions))


def test_operators_match_their_declarations():
    x, g, x_dot, w, b = random(2, 3), random(2, 3), random(2, 3), random(3), random(3)
    strided = x.T.contiguous().T
    _, mean, rstd = layer_norm_passes.forward(x, w, b, 1e-5)
    for op, args in (
        (layer_norm_passes.forward, (strided, w, b, 1e-5)),
        (layer_norm_passes.forward_with_tangent, (x, w, b, x_dot, w, b, 1e-5)),
        (layer_norm_passes.tangent, (x, w, b, x_dot, w, b, 1e-5)),
        (layer_norm_passes.backward, (g, strided, w, mean, rstd)),
        (layer_norm_passes.backward_tangent, (g, g, x, x_dot, w, w, mean, rstd)),
        (layer_norm_passes.backward_tangent, (g, None, x, x_dot, w, w, mean, rstd)),
        (gelu_passes.forward, (strided,)),
        (gelu_passes.forward_with_tangent, (x, x_dot)),
        (gelu_passes.backward, (g, strided)),
        (gelu_passes.backward_tangent, (g, None, x, x_dot)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_third_derivative_raises(name):
    inputs = leaves(arguments(name))
    first = grad(PUBLIC[name][0](*inputs).square().sum(), inputs, create_graph=True)
    second = grad(first[0].square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="expected no further derivative"):
        grad(second[0].sum(), inputs)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_derivative_of_a_tangent_raises(name):
    function = PUBLIC[name][0]
    inputs, directions = tuple(arguments(name)), tuple(arguments(name, seed=7))

    def tangent(*a):
        return torch.func.jvp(function, a, directions)[1].sum()

    for derivative in (torch.func.grad(tangent), lambda *a: torch.func.jvp(tangent, a, directions)):
        with pytest.raises(RuntimeError, match="expected no further derivative"):
            derivative(*inputs)


def test_refuses_what_does_not_fit():
    x, w = random(2, 3), random(3)
    with pytest.raises(ValueError, match=r"weight: expected shape \(3,\), got \(2,\)"):
        norms.layer_norm(x, random(2), w)
    with pytest.raises(ValueError, match="bias: expected float32 or float64, one for all"):
        norms.layer_norm(x, w, w.float())
    with pytest.raises(ValueError, match="at most 8192"):
        norms.layer_norm(random(1, norms.MAX_WIDTH + 1), w, w)
    with pytest.raises(ValueError, match="x: expected float32 or float64"):
        norms.gelu(x.half())
    with pytest.raises(ValueError, match="x_dot: expected shape"):
        norms.gelu_with_tangent(x, w)


@pytest.mark.skipif(not CUDA, reason="sizes that the interpreter is too slow for need a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(2048, 768), (1031, 1000), (300, norms.MAX_WIDTH)])
def test_large_shapes_on_a_gpu(size, dtype):
    x, x_dot, g, g_dot = (random(*size, dtype=dtype, seed=s) for s in range(4))
    weights = [random(size[1], dtype=dtype, seed=s) for s in range(4)]
    assert_passes_as_exact("layer_norm", [x, *weights[:2]], [x_dot, *weights[2:]], g, g_dot)
    assert_passes_as_exact("gelu", [x], [x_dot], g, g_dot)
