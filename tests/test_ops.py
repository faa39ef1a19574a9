"""Operations with several implementations are one function with the same derivatives."""

import os

import torch

CUDA = torch.cuda.is_available()
if not CUDA:  # read by Triton when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from ispen_dist import ops  # noqa: E402
from ispen_dist.linalg.solution import Status  # noqa: E402
from ispen_dist.linalg.solvers import CG, SingleReductionCG  # noqa: E402
from ispen_dist.linalg.vectors import PlainLocal, Vectors  # noqa: E402
from ispen_dist.models.dropout import Dropout  # noqa: E402
from ispen_dist.models.encoders import MASKED_SCORE, TransformerEncoder  # noqa: E402
from ispen_dist.ops import linear  # noqa: E402
from ispen_dist.ops.vectors import KernelLocal, local_vectors  # noqa: E402

D, H = 40, 6
DTYPES = [torch.float32, torch.float64]


def random(*shape, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# -- a linear layer on constant inputs -----------------------------------------------------------


def data(num_rows, *, density, dtype=torch.float64, seed=1):
    draw = torch.Generator().manual_seed(seed)
    kept = torch.rand(num_rows, D, generator=draw) < density
    return random(num_rows, D, seed=seed, dtype=dtype) * kept


def derivatives(layer, x, weight, bias):
    """Value, and derivatives of the first three orders in fixed directions."""
    leaves = [t.clone().requires_grad_() for t in (weight, bias) if t is not None]
    y = layer(x, *leaves)
    result, scalar = [y], (torch.tanh(y) * random(*y.shape, seed=5, dtype=y.dtype)).sum()
    for order in range(3):
        grads = torch.autograd.grad(scalar, leaves, create_graph=True)
        result += grads
        directions = [random(*g.shape, seed=6 + order, dtype=g.dtype) for g in grads]
        scalar = sum((g * v).sum() for g, v in zip(grads, directions, strict=True))
    return result


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("density", [0.05, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_layer_on_data_has_the_derivatives_of_the_plain_one(dtype, density, with_bias):
    x = data(17, density=density, dtype=dtype)
    weight = 0.2 * random(H, D, dtype=dtype)
    bias = random(H, seed=2, dtype=dtype) if with_bias else None
    found = derivatives(ops.constant_linear, x, weight, bias)
    expected = derivatives(F.linear, x, weight, bias)
    assert (linear._compressed(x).rows is not None) == (density < linear.MAX_DENSITY)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype == dtype
        assert a.shape == b.shape
        # A sum of D terms in another order is off by up to D roundings.
        assert relative(a, b) < D * torch.finfo(dtype).eps


@pytest.mark.parametrize("density", [0.05, 1.0])
def test_a_linear_layer_on_an_empty_batch_or_one_of_zeros(density):
    weight, bias = random(H, D), random(H, seed=2)
    for x in (data(0, density=density), torch.zeros(3, D).double()):
        found = derivatives(ops.constant_linear, x, weight, bias)
        expected = derivatives(F.linear, x, weight, bias)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_a_linear_layer_on_an_input_that_learns_is_the_plain_one():
    x = data(7, density=0.05).requires_grad_()
    weight = random(H, D).requires_grad_()
    (found,) = torch.autograd.grad(ops.constant_linear(x, weight).square().sum(), x)
    assert torch.equal(found, 2.0 * F.linear(x, weight) @ weight)


@pytest.mark.parametrize("shape", [(D,), (2, 3, D)])
def test_a_linear_layer_takes_what_the_plain_one_takes(shape):
    x, weight, bias = random(*shape), random(H, D), random(H, seed=2)
    assert torch.equal(ops.constant_linear(x, weight, bias), F.linear(x, weight, bias))


def test_a_change_of_the_data_in_place_is_noticed():
    whole, weight = data(9, density=0.05), random(H, D)
    x = whole[:5]
    assert relative(ops.constant_linear(x, weight), x @ weight.T) < 1e-14
    x[0, 3] += 1.0
    assert relative(ops.constant_linear(x, weight), x @ weight.T) < 1e-14
    whole.mul_(3.0)  # through the tensor that x is a part of
    assert relative(ops.constant_linear(x, weight), x @ weight.T) < 1e-14


def test_data_at_the_address_of_freed_data_is_not_confused_with_it():
    weight, ids = random(H, D), []
    for seed in range(30):
        x = data(9, density=0.05, seed=seed)
        ids.append(id(x))
        assert relative(ops.constant_linear(x, weight), x @ weight.T) < 1e-14
        del x
    assert len(set(ids)) < len(ids)  # otherwise nothing was tried
    assert len(linear._recent) <= linear._NUM_RECENT


def test_between_a_forward_and_a_backward_pass_other_data_may_come():
    batches, weight = [data(9, density=0.05, seed=s) for s in range(20)], random(H, D)
    leaf = weight.clone().requires_grad_()
    total = sum(ops.constant_linear(x, leaf).square().sum() for x in batches)
    (found,) = torch.autograd.grad(total, leaf)
    expected = sum(2.0 * (x @ weight.T).T @ x for x in batches)
    assert relative(found, expected) < 1e-14


# -- attention -----------------------------------------------------------------------------------


def heads(seed, num_tokens):
    return random(2, 3, num_tokens, 8, seed=seed)


def bias_of(*lengths, num_tokens):
    mask = torch.arange(num_tokens) < torch.tensor(lengths)[:, None]
    return (~mask).double() * MASKED_SCORE


def test_attention_is_the_formula():
    q, k, v = (heads(i, n).requires_grad_() for i, n in enumerate((5, 7, 7)))
    bias = bias_of(4, 7, num_tokens=7)
    found = ops.attention(q, k, v, bias)
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None])
    assert relative(found, expected) < 1e-14
    a = heads(8, 5)
    for x, y in zip(
        torch.autograd.grad(found, (q, k, v), a),
        torch.autograd.grad(expected, (q, k, v), a),
        strict=True,
    ):
        assert relative(x, y) < 1e-13


def test_attention_drops_weights_and_not_values():
    q, k, v = (heads(i, 5) for i in range(3))
    bias = bias_of(5, 3, num_tokens=5)
    weights = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5 + bias[:, None, None], dim=-1)
    mask = (random(*weights.shape, seed=4) > 0.0).double()
    for kernels in ops.KERNELS:
        with ops.using_kernels(kernels):
            found = ops.attention(q, k, v, bias, lambda w: w * mask)
        assert relative(found, (weights * mask) @ v) < 1e-14


def products(encoder, x, mask):
    """Value, gradient and a Hessian product of an encoder in its parameters and its input."""
    state = (x.clone().requires_grad_(),)
    for part in encoder.parts():
        state = part.function({"mask": mask}, *state)
    (h,) = state
    leaves = list(encoder.parameters())
    scalar = (torch.tanh(h) * random(*h.shape, seed=3)).sum()
    grads = torch.autograd.grad(scalar, leaves, create_graph=True)
    directions = [random(*g.shape, seed=4) for g in grads]
    along = sum((g * v).sum() for g, v in zip(grads, directions, strict=True))
    return [
        [h],
        grads,
        torch.autograd.grad(along, leaves, allow_unused=True, materialize_grads=True),
    ]


def test_an_encoder_with_the_attention_kernel_is_that_of_the_reference(monkeypatch):
    pytest.importorskip("triton")
    if CUDA:
        pytest.skip("on a GPU the kernel takes no float64")
    from ispen_kernels import attention as module

    calls, fused = [], module.attention

    def counted(*arguments):
        calls.append(arguments)
        return fused(*arguments)

    monkeypatch.setattr(module, "attention", counted)
    torch.manual_seed(0)
    encoder = TransformerEncoder(4, 16, 2, 2).double()
    x, mask = random(2, 5, 4), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    x = x * mask.unsqueeze(-1)
    with ops.using_kernels("reference"):
        expected = products(encoder, x, mask)
    assert not calls
    with ops.using_kernels("always"):
        found = products(encoder, x, mask)
    assert len(calls) == 2
    for these, those in zip(found, expected, strict=True):
        a, b = (torch.cat([t.flatten() for t in group]) for group in (these, those))
        # Two blocks of sums of at most 64 terms, through two derivatives: 1e-12 is 5000 roundings.
        assert relative(a, b) < 1e-12


# -- which implementation ------------------------------------------------------------------------


def test_unknown_kernels_are_refused():
    message = r"kernels: expected one of auto, reference, always, got 'fast'"
    with pytest.raises(ValueError, match=message):
        ops.set_kernels("fast")
    with pytest.raises(ValueError, match=message), ops.using_kernels("fast"):
        pass
    assert ops.choice.told() == "auto"


def raise_an_error(seen):
    with ops.using_kernels("reference"):
        seen.append(ops.choice.told())
        raise RuntimeError


def test_what_was_told_for_a_while_is_forgotten_also_after_an_error():
    seen = []
    with pytest.raises(RuntimeError):
        raise_an_error(seen)
    assert seen == ["reference"]
    assert ops.choice.told() == "auto"


@pytest.mark.parametrize(
    ("kernels", "can_run", "is_better", "expected"),
    [
        ("auto", True, True, True),
        ("auto", True, False, False),
        ("auto", False, True, False),
        ("reference", True, True, False),
        ("always", True, False, True),
        ("always", False, True, False),
    ],
)
def test_a_kernel_is_chosen(kernels, can_run, is_better, expected):
    with ops.using_kernels(kernels):
        assert ops.chosen(can_run=can_run, is_better=is_better) is expected


SHIFT = 3.0


def definite_system():
    """A symmetric positive definite product and right-hand side on a tree of odd shapes."""
    shapes = {"a": (3, 5), "b": (7,), "c": (1,)}
    sizes = [torch.Size(s).numel() for s in shapes.values()]
    M = random(sum(sizes), sum(sizes))
    A = M @ M.T / sum(sizes)

    def tree(vector):
        parts = zip(shapes.items(), vector.split(sizes), strict=True)
        return {name: part.view(shape).clone() for (name, shape), part in parts}

    def flat(tree_):
        return torch.cat([x.flatten() for x in tree_.values()])

    return A, (lambda v: tree(A @ flat(v))), tree(random(sum(sizes), seed=9)), flat


@pytest.mark.parametrize("solver", [CG, SingleReductionCG])
def test_a_solver_with_the_vector_kernels_gives_the_same_solution(solver):
    pytest.importorskip("triton")
    A, matvec, rhs, flat = definite_system()
    with ops.using_kernels("reference"):
        plain = local_vectors(torch.device("cpu"))
    assert isinstance(plain, PlainLocal)
    if CUDA:
        pytest.skip("kernels run on the GPU there")
    with ops.using_kernels("always"):
        kernel = local_vectors(torch.device("cpu"))
    assert isinstance(kernel, KernelLocal)
    found, expected = (
        solver(60, 1e-14).solve(matvec, rhs, shift=SHIFT, vectors=Vectors(local=local))
        for local in (kernel, plain)
    )
    assert found.status is expected.status is Status.CONVERGED
    # The condition number is below 10: both are within 1e-13 of the solution.
    exact = torch.linalg.solve(A + SHIFT * torch.eye(len(A)).double(), flat(rhs))
    assert relative(flat(found.value), exact) < 1e-12
    assert relative(flat(found.value), flat(expected.value)) < 1e-12
    assert found.num_steps == expected.num_steps


def test_on_a_cpu_solver_vectors_are_plain_unless_told():
    assert isinstance(local_vectors(torch.device("cpu")), PlainLocal)


# -- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_that_of_torch_bit_for_bit(training, rate, dtype):
    x, results = random(13, 7, dtype=dtype), []
    for kind in (Dropout, nn.Dropout):
        module, leaf = kind(rate).train(training), x.clone().requires_grad_()
        torch.manual_seed(4)
        y = module(leaf)
        (grad,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        results.append((y, grad, torch.rand(3)))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(results[0][0] == 0, x == 0) == (not training or rate == 0.0)
