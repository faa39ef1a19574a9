"""The energy kernels against their references: every output, both second-order modes, refusals."""

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

from ispen_kernels import (  # noqa: E402
    energies,
    label_interaction_passes,
    skip_chain_passes,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.float64]
# B, L, U: one of each, odd, more labels than a tile, more units than a block.
LABEL_SIZES = [
    (1, 1, 1),
    (3, 17, 5),
    (2, 257, 33),
    (2, 33, label_interaction_passes.MAX_BLOCK_UNITS + 3),
]
# B, T, K, D: one of each, sequences shorter than an offset, several blocks of tokens, most tags.
CHAIN_SIZES = [(1, 1, 1, 1), (3, 2, 3, 3), (2, 33, 17, 2), (1, 17, 64, 1)]

PUBLIC = {
    "label_interaction": (
        energies.label_interaction,
        energies.label_interaction_reference,
        [(2, 3), (2, 3), (2,)],
    ),
    "skip_chain": (energies.skip_chain, energies.skip_chain_reference, [(2, 3, 2), (2, 2, 2)]),
}


def arguments(name, dtype=torch.float64):
    return [
        random(*shape, dtype=dtype, seed=seed).requires_grad_()
        for seed, shape in enumerate(PUBLIC[name][2])
    ]


def all_of(reference, y, y_dot, *parameters):
    """Return energy, gradient and product in y of a reference."""
    y = y.detach().requires_grad_()
    energy = reference(y, *parameters)
    (gradient,) = grad(energy.sum(), y, create_graph=True)
    (product,) = grad((gradient * y_dot).sum(), y)
    return energy.detach(), gradient.detach(), product


def assert_all_as_exact(kernel, reference, inputs):
    doubles = [a.double() for a in inputs]
    got, eager, exact = kernel(*inputs), all_of(reference, *inputs), all_of(reference, *doubles)
    for trio in zip(got, eager, exact, strict=True):
        assert_as_exact(*trio, floor=8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", LABEL_SIZES)
def test_label_interaction_is_as_exact_as_eager(size, dtype):
    batch, labels, units = size
    y, y_dot = (random(batch, labels, dtype=dtype, seed=s) for s in (0, 1))
    y[-1] = 0.0
    M, v = random(units, labels, dtype=dtype), random(units, dtype=dtype)
    assert_all_as_exact(
        energies.label_interaction_all, energies.label_interaction_reference, (y, y_dot, M, v)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", CHAIN_SIZES)
def test_skip_chain_is_as_exact_as_eager(size, dtype):
    batch, tokens, tags, offsets = size
    y, y_dot = (random(batch, tokens, tags, dtype=dtype, seed=s) for s in (0, 1))
    y[:, tokens // 2 + 1 :] = 0.0
    W = random(offsets, tags, tags, dtype=dtype)
    # The reference slices beyond the end where a sequence is shorter than an offset.
    assert_all_as_exact(energies.skip_chain_all, energies.skip_chain_reference, (y, y_dot, W))


@pytest.mark.parametrize("dtype", DTYPES)
def test_softplus_holds_at_both_ends(dtype):
    z = torch.tensor([-800.0, -60.0, -20.0, -1e-8, 0.0, 1e-8, 20.0, 60.0, 800.0], dtype=dtype)
    y, one = z[:, None].to(DEVICE), torch.ones(1, 1, dtype=dtype, device=DEVICE)
    energy, gradient, product = energies.label_interaction_all(y, torch.ones_like(y), one, one[0])
    z = y[:, 0].double()
    # Relative to the size of each, so that the tails count: exp may be off by its argument in eps.
    bound = 4 * torch.finfo(dtype).eps * (1 + z.abs())
    e, tiny = torch.exp(-z.abs()), 4 * torch.finfo(dtype).tiny
    for got, exact in (
        (energy, z.clamp(min=0) + torch.log1p(e)),
        (gradient[:, 0], torch.sigmoid(z)),
        (product[:, 0], e / (1 + e) ** 2),
    ):
        assert ((got.double() - exact).abs() <= bound * exact.abs() + tiny).all()


def test_a_nan_reaches_every_output():
    y = random(2, 17, dtype=torch.float32)
    y[0, 3] = float("nan")
    M, v = random(5, 17, dtype=torch.float32), random(5, dtype=torch.float32)
    for out in energies.label_interaction_all(y, torch.ones_like(y), M, v):
        assert out[0].isnan().all()
        assert out[1].isfinite().all()


@pytest.mark.parametrize("name", PUBLIC)
def test_samples_and_strides_change_nothing(name):
    public, reference, _ = PUBLIC[name]
    y, *parameters = (a.detach() for a in arguments(name))
    stack = torch.stack([y, 2 * y, -y]).transpose(0, -1).contiguous().transpose(0, -1)
    strided = [a.mT.contiguous().mT if a.dim() > 1 else a for a in parameters]
    assert not stack.is_contiguous()
    torch.testing.assert_close(public(stack, *strided), reference(stack, *parameters))


@pytest.mark.parametrize("size", [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_label_interaction_without_examples_labels_or_units(size):
    batch, labels, units = size
    inputs = (random(batch, labels), random(batch, labels), random(units, labels), random(units))
    got = energies.label_interaction_all(*inputs)
    expected = all_of(energies.label_interaction_reference, *inputs)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("size", [(0, 3, 2, 1), (2, 0, 2, 1), (2, 3, 2, 0)])
def test_skip_chain_without_examples_tokens_or_offsets(size):
    batch, tokens, tags, offsets = size
    y, y_dot = random(batch, tokens, tags), random(batch, tokens, tags, seed=1)
    energy, gradient, product = energies.skip_chain_all(y, y_dot, random(offsets, tags, tags))
    assert energy.tolist() == [0.0] * batch
    assert torch.equal(gradient, torch.zeros_like(y))
    assert torch.equal(product, torch.zeros_like(y))
    y.requires_grad_()
    energies.skip_chain(y, random(offsets, tags, tags)).sum().backward()
    assert torch.equal(y.grad, torch.zeros_like(y))


@pytest.mark.parametrize("name", PUBLIC)
def test_first_and_second_derivatives_in_all_arguments(name):
    public, _, _ = PUBLIC[name]
    assert gradcheck(public, arguments(name), fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(public, arguments(name), fast_mode=True, check_fwd_over_rev=True)


def second_order(function, inputs, directions):
    """Return the gradients in all inputs of <d E / d inputs, directions>."""
    first = grad(function(*inputs).square().sum(), inputs, create_graph=True)
    return grad(sum((g * d).sum() for g, d in zip(first, directions, strict=True)), inputs)


def forward_over_reverse(function, inputs, directions):
    """Return the tangents of d E / d inputs along `directions`."""
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(a, d).requires_grad_()
            for a, d in zip(inputs, directions, strict=True)
        ]
        first = grad(function(*duals).square().sum(), duals, create_graph=True)
        return [forward_ad.unpack_dual(g).tangent for g in first]


@pytest.mark.parametrize("name", PUBLIC)
def test_both_second_order_modes_equal_the_reference(name):
    public, reference, shapes = PUBLIC[name]
    inputs = arguments(name)
    directions = [random(*shape, seed=7) for shape in shapes]
    expected = second_order(reference, inputs, directions)
    torch.testing.assert_close(second_order(public, inputs, directions), expected)
    plain = [a.detach() for a in inputs]
    torch.testing.assert_close(forward_over_reverse(public, plain, directions), list(expected))
    _, functional = torch.func.jvp(
        torch.func.grad(lambda *a: public(*a).square().sum(), argnums=tuple(range(len(plain)))),
        tuple(plain),
        tuple(directions),
    )
    torch.testing.assert_close(functional, expected)


@pytest.mark.parametrize("mode", ["real", "symbolic"])
@pytest.mark.parametrize("name", PUBLIC)
def test_two_gradients_are_traced_as_opaque_operators(name, mode):
    public, _, shapes = PUBLIC[name]
    inputs, directions = arguments(name), [random(*shape, seed=7) for shape in shapes]

    def function(inputs, directions):
        return second_order(public, inputs, directions)

    graph = make_fx(function, tracing_mode=mode)(inputs, directions)
    assert sum("ispen" in str(node.target) for node in graph.graph.nodes) == 2
    others = [(a * 1.5).detach().requires_grad_() for a in inputs]
    torch.testing.assert_close(graph(others, directions), function(others, directions))


def test_operators_match_their_declarations():
    y, y_dot, M, v = random(2, 3), random(2, 3, seed=1), random(4, 3), random(4)
    Y, Y_dot, W = random(2, 3, 2), random(2, 3, 2, seed=1), random(1, 2, 2)
    for op, args in (
        (label_interaction_passes.gradient, (y.T.contiguous().T, M, v)),
        (label_interaction_passes.product, (y, y_dot, M, v)),
        (label_interaction_passes.gradient_and_product, (y, y_dot, M, v)),
        (skip_chain_passes.gradient, (Y.mT.contiguous().mT, W)),
        (skip_chain_passes.gradient_and_product, (Y, Y_dot, W)),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_a_third_derivative_of_label_interaction_raises():
    y, M, v = arguments("label_interaction")
    (first,) = grad(energies.label_interaction(y, M, v).sum(), y, create_graph=True)
    (second,) = grad(first.square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivative of label_interaction"):
        grad(second.sum(), y)


def test_a_third_derivative_of_skip_chain_is_right():
    inputs = arguments("skip_chain")
    thirds = []
    for function in PUBLIC["skip_chain"][:2]:
        (first,) = grad(function(*inputs).pow(3).sum(), inputs[0], create_graph=True)
        (second,) = grad(first.square().sum(), inputs[0], create_graph=True)
        thirds.append(grad(second.square().sum(), inputs))
    torch.testing.assert_close(*thirds)


def test_outputs_of_one_pass_are_not_differentiated_silently():
    y, M, v = arguments("label_interaction")
    Y, W = arguments("skip_chain")
    for results in (
        energies.label_interaction_all(y, y.detach(), M, v),
        energies.skip_chain_all(Y, Y.detach(), W),
    ):
        for out in results:
            with pytest.raises(RuntimeError, match="expected no further derivative"):
                grad(out.sum(), (y, Y), retain_graph=True, allow_unused=True)
    plain, M, v = y.detach(), M.detach(), v.detach()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no further derivative"):
        energies.label_interaction_all(forward_ad.make_dual(plain, plain), plain, M, v)


def test_refuses_what_does_not_fit():
    y, M, v = random(2, 3), random(4, 3), random(4)
    with pytest.raises(ValueError, match=r"M: expected shape \(4, 3\).*got \(4, 5\)"):
        energies.label_interaction(y, random(4, 5), v)
    with pytest.raises(ValueError, match="v: expected float32 or float64, one for all"):
        energies.label_interaction(y, M, v.float())
    with pytest.raises(ValueError, match=r"y_dot: expected shape \(2, 3\)"):
        energies.label_interaction_all(y, random(3, 3), M, v)
    with pytest.raises(ValueError, match=r"y: expected shape \(..., B, L\)"):
        energies.label_interaction(y[0], M, v)
    with pytest.raises(ValueError, match="at most 64 tags, got 65"):
        energies.skip_chain(random(1, 2, 65), random(1, 65, 65))


@pytest.mark.skipif(not CUDA, reason="sizes that the interpreter is too slow for need a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_shapes_on_a_gpu(dtype):
    y, y_dot = (random(640, 983, dtype=dtype, seed=s) for s in (0, 1))
    M, v = random(300, 983, dtype=dtype) / 31.0, random(300, dtype=dtype)
    assert_all_as_exact(
        energies.label_interaction_all, energies.label_interaction_reference, (y, y_dot, M, v)
    )
    for tags in (25, 45, 64):
        Y, Y_dot = (random(64, 131, tags, dtype=dtype, seed=s) for s in (0, 1))
        W = random(3, tags, tags, dtype=dtype)
        assert_all_as_exact(energies.skip_chain_all, energies.skip_chain_reference, (Y, Y_dot, W))
