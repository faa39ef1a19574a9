"""Fused attention against the float64 reference: values, derivatives, shapes, memory, errors.

Shapes: B batch, N heads, T queries, S keys, H head size.
"""

import os

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from ispen_kernels import attention as kernels
from ispen_kernels.attention import attention, attention_reference, supports

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
EXACT = [torch.float64] if kernels.INTERPRETED else []
# Rounding of the result alone: the reference may happen to be better than that.
FLOOR_IN_EPS = 2
NAMES = ("o", "o_dot", "q_bar", "k_bar", "v_bar", "q_bar_dot", "k_bar_dot", "v_bar_dot")
SHAPES = [
    (2, 1, 1, 1, 16),
    (1, 2, 3, 17, 16),
    (1, 1, 33, 17, 24),
    (1, 1, 17, 65, 64),
    (1, 1, 65, 33, 5),
]
# The interpreter is slow: every shape in float64, the strictest, and every type at two odd shapes.
ODD = (SHAPES[1], SHAPES[-1])
CASES = [
    (shape, dtype)
    for shape in SHAPES
    for dtype in (*EXACT, *DTYPES)
    if not EXACT or dtype in EXACT or shape in ODD
]


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def island(x: torch.Tensor) -> torch.Tensor:
    """Return the same numbers with odd strides in a sea of NaN: a read outside shows."""
    B, N, T, H = x.shape
    sea = x.new_full((T + 2, B + 1, 2 * H + 1, N + 1), float("nan"))
    view = sea[1 : T + 1, :B, 1 : 2 * H + 1 : 2, :N].permute(1, 3, 0, 2)
    return view.copy_(x)


def largest(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


class Problem:
    """A point, directions for everything, and key bias whose first sequence has padding."""

    def __init__(self, shape, dtype: torch.dtype, all_padding: bool = False) -> None:
        B, N, T, S, H = shape
        lengths = (T, S, S, T) * 2
        tensors = [random(B, N, L, H, dtype=dtype, seed=i) for i, L in enumerate(lengths)]
        *self.point, self.o_bar = tensors[:4]
        *self.dots, self.o_bar_dot = tensors[4:]
        self.key_bias = torch.zeros(B, S, device=DEVICE, dtype=dtype)
        self.key_bias[:1, 0 if all_padding else (S + 1) // 2 :] = -1e4

    def mapped(self, change) -> "Problem":
        """Return the problem with `change` applied to every (B, N, T, H) tensor."""
        other = object.__new__(Problem)
        other.point, other.dots = ([change(x) for x in xs] for xs in (self.point, self.dots))
        other.o_bar, other.o_bar_dot = change(self.o_bar), change(self.o_bar_dot)
        other.key_bias = self.key_bias
        return other


def by_reference(p: Problem) -> dict[str, torch.Tensor]:
    """Everything the operators return, by torch.func through the reference, in the same dtype."""

    def value(q, k, v):
        return attention_reference(q, k, v, p.key_bias)

    def adjoint(q, k, v, o_bar):
        return torch.func.vjp(value, q, k, v)[1](o_bar)

    o, o_dot = torch.func.jvp(value, tuple(p.point), tuple(p.dots))
    bars, bars_dot = torch.func.jvp(adjoint, (*p.point, p.o_bar), (*p.dots, p.o_bar_dot))
    return dict(zip(NAMES, (o, o_dot, *bars, *bars_dot), strict=True))


def by_operators(p: Problem) -> dict[str, torch.Tensor]:
    """The same from the operators; those that return the same thing must agree."""
    bias = p.key_bias - p.key_bias.amax(-1, keepdim=True)
    point, scale = (*p.point, bias), p.point[0].shape[-1] ** -0.5
    o, lse2 = kernels.attention_forward(*point, scale)
    together = kernels.attention_forward_tangent(*point, *p.dots, scale)
    o_dot, lse_dot = kernels.attention_tangent(*point, o, lse2, *p.dots, scale)
    D = kernels.attention_row_dot(p.o_bar, o)
    D_dot = kernels.attention_row_dot(p.o_bar, o_dot, p.o_bar_dot, o)
    bars = kernels.attention_backward(*point, o, lse2, p.o_bar, scale)
    rows_dot = lse_dot, D_dot
    bars_dot = kernels.attention_backward_tangent(
        *point, lse2, D, p.o_bar, *p.dots, p.o_bar_dot, *rows_dot, scale
    )
    for alone, joint in zip((o, lse2, o_dot, lse_dot), together, strict=True):
        # The two tangents round p in different scalings, a few times per entry.
        bound = 16 * torch.finfo(o.dtype).eps * (1 + largest(alone))
        assert largest(alone - joint) <= bound
    outputs = (o, o_dot, *bars, *bars_dot)
    assert all(x.is_contiguous() for x in (*outputs, *together, lse_dot, D))
    return dict(zip(NAMES, outputs, strict=True))


def check(p: Problem) -> None:
    """At most twice the error of eager PyTorch in the same dtype, both against float64."""
    ours, eager = by_operators(p), by_reference(p)
    exact = by_reference(p.mapped(torch.Tensor.double))
    for name, truth in exact.items():
        # With one key some derivatives vanish: products over the head that cancel, of size sqrt(H).
        size = largest(truth) if largest(truth) > 1e-9 else truth.shape[-1] ** 0.5
        error, allowed = (largest(x[name].double() - truth) for x in (ours, eager))
        if p.o_bar.dtype == torch.float64:
            assert error <= 1e-12 * size, name
            continue
        floor = FLOOR_IN_EPS * torch.finfo(p.o_bar.dtype).eps * size
        assert error <= 2 * allowed + floor, (name, error, allowed, floor)


class TestOperators:
    @pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
    def test_value_tangent_adjoint_and_its_tangent(self, shape, dtype):
        check(Problem(shape, dtype))

    @pytest.mark.parametrize("dtype", [*EXACT, torch.float32], ids=str)
    def test_a_sequence_of_padding_alone(self, dtype):
        check(Problem((2, 1, 5, 33, 16), dtype, all_padding=True))

    def test_strides_and_nothing_read_outside(self):
        check(Problem((2, 2, 17, 33, 24), torch.float32).mapped(island))

    def test_heads_of_one_packed_projection(self):
        B, N, T, H = 2, 2, 17, 16
        packed = [random(B, T, 3 * N * H, dtype=torch.float32, seed=i) for i in range(2)]
        p = Problem((B, N, T, T, H), torch.float32)
        p.point, p.dots = (
            list(x.unflatten(-1, (3, N, H)).transpose(1, 3).unbind(2)) for x in packed
        )
        check(p)

    def test_expanded_tensors(self):
        check(
            Problem((2, 2, 3, 5, 16), torch.float32).mapped(
                lambda x: x[:1, :1].expand(2, 2, -1, -1)
            )
        )

    def test_no_bias_is_a_bias_of_zero(self):
        q, k, v = Problem((1, 1, 3, 33, 16), torch.float32).point
        zero = torch.zeros(1, 33, device=DEVICE)
        assert torch.equal(attention(q, k, v), attention(q, k, v, zero))
        assert torch.equal(attention(q, k, v, scale=16**-0.5), attention(q, k, v, zero))

    @pytest.mark.parametrize("given", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)], ids=str)
    def test_a_missing_direction_is_zero(self, given):
        p = Problem((1, 1, 3, 5, 16), torch.float32)
        dots = [*p.dots, p.o_bar_dot]
        missing = [x if i in given else None for i, x in enumerate(dots)]
        zeros = [x if i in given else torch.zeros_like(x) for i, x in enumerate(dots)]
        scale, point = 0.25, (*p.point, p.key_bias)
        o, lse2 = kernels.attention_forward(*point, scale)
        results = []
        for *point_dots, o_bar_dot in (missing, zeros):
            o_dot, lse_dot = kernels.attention_tangent(*point, o, lse2, *point_dots, scale)
            D = kernels.attention_row_dot(p.o_bar, o)
            extra = () if o_bar_dot is None else (o_bar_dot, o)
            D_dot = kernels.attention_row_dot(p.o_bar, o_dot, *extra)
            bars_dot = kernels.attention_backward_tangent(
                *point, lse2, D, p.o_bar, *point_dots, o_bar_dot, lse_dot, D_dot, scale
            )
            together = kernels.attention_forward_tangent(*point, *point_dots, scale)
            results.append([o_dot, lse_dot, *bars_dot, *together])
        for left, right in zip(*results, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        "shape", [(0, 2, 3, 3, 16), (2, 1, 0, 3, 16), (2, 1, 3, 0, 16)], ids=str
    )
    def test_empty(self, shape):
        p = Problem(shape, torch.float32)
        point, scale = (*p.point, p.key_bias), 0.25
        o, lse2, o_dot, lse_dot = kernels.attention_forward_tangent(*point, *p.dots, scale)
        D = kernels.attention_row_dot(p.o_bar, o)
        bars = kernels.attention_backward(*point, o, lse2, p.o_bar, scale)
        bars_dot = kernels.attention_backward_tangent(
            *point, lse2, D, p.o_bar, *p.dots, p.o_bar_dot, lse_dot, D, scale
        )
        leaves = [x.requires_grad_() for x in p.point]
        value = attention(*leaves, p.key_bias)
        assert torch.equal(value, attention_reference(*leaves, p.key_bias))
        gradients = torch.autograd.grad(value.sum(), leaves)
        for x in (o, o_dot, lse_dot, *bars, *bars_dot, *gradients):
            assert largest(x) == 0.0
        assert torch.equal(lse2, torch.full_like(lse2, -float("inf")))

    def test_scores_of_ten_thousand(self):
        p = Problem((1, 1, 5, 33, 16), torch.float32)
        p.point = [100 * p.point[0], 100 * p.point[1], p.point[2]]
        scores = p.point[0] @ p.point[1].transpose(-1, -2) / 4
        assert largest(scores) > 1e4
        for name, x in by_operators(p).items():
            assert x.isfinite().all(), name
        exact = by_reference(p.mapped(torch.Tensor.double))["o"]
        error, allowed = (
            largest(f(*p.point, p.key_bias).double() - exact)
            for f in (attention, attention_reference)
        )
        assert error <= 2 * allowed + FLOOR_IN_EPS * torch.finfo(torch.float32).eps

    def test_results_are_reproducible(self):
        p = Problem((1, 1, 3, 33, 16), torch.float32)
        first, second = by_operators(p), by_operators(p)
        assert all(torch.equal(first[name], second[name]) for name in NAMES)

    def test_operators_declare_what_they_do(self):
        """Schema without mutation or aliasing, and a fake with the shapes of the real thing."""
        p = Problem((1, 2, 3, 5, 16), torch.float32).mapped(island)
        point = (*p.point, p.key_bias)
        o, lse2 = kernels.attention_forward(*point, 0.25)
        rows = [lse2.clone() for _ in range(3)]
        calls = {
            kernels.attention_forward: point,
            kernels.attention_forward_tangent: (*point, *p.dots),
            kernels.attention_tangent: (*point, o, lse2, p.dots[0], None, p.dots[2]),
            kernels.attention_backward: (*point, o, lse2, p.o_bar),
            kernels.attention_backward_tangent: (
                *(*point, lse2, rows[0], p.o_bar),
                *(*p.dots, None, rows[1], rows[2]),
            ),
        }
        tests = ("test_schema", "test_faketensor")
        for operator, arguments in calls.items():
            torch.library.opcheck(operator, (*arguments, 0.25), test_utils=tests)
        torch.library.opcheck(kernels.attention_row_dot, (o, p.o_bar), test_utils=tests)


def loss_of(attend, dtype=torch.float64):
    """A scalar function of (q, k, v) with curvature of its own."""
    key_bias = torch.tensor([[0.0] * 3 + [-1e4] * 2], device=DEVICE, dtype=dtype)
    weight = random(1, 1, 3, 16, dtype=dtype, seed=9)

    def loss(q, k, v):
        return (torch.sin(attend(q, k, v, key_bias)) * weight).sum()

    return loss


def second_problem(dtype=torch.float64):
    p = Problem((1, 1, 3, 5, 16), dtype)
    return tuple(p.point), tuple(p.dots)


def inner(left, right):
    return sum((a * b).sum() for a, b in zip(left, right, strict=True))


def reverse_over_reverse(loss, point, dots):
    point = [x.detach().requires_grad_() for x in point]
    gradient = torch.autograd.grad(loss(*point), point, create_graph=True)
    return torch.autograd.grad(inner(gradient, dots), point)


def twice_reverse(loss, point, dots):
    """Do the same by torch.func, which nests."""

    def slope(*x):
        return inner(torch.func.grad(loss, (0, 1, 2))(*x), dots)

    return torch.func.grad(slope, (0, 1, 2))(*point)


def forward_over_reverse(loss, point, dots):
    return torch.func.jvp(torch.func.grad(loss, (0, 1, 2)), point, dots)[1]


def forward_levels(loss, point, dots):
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(x.detach().requires_grad_(), d)
            for x, d in zip(point, dots, strict=True)
        ]
        gradient = torch.autograd.grad(loss(*duals), duals)
        return [forward_ad.unpack_dual(x).tangent for x in gradient]


def reverse_over_forward(loss, point, dots):
    return torch.func.grad(lambda *x: torch.func.jvp(loss, x, dots)[1], (0, 1, 2))(*point)


def named(way) -> str:
    return way.__name__


WAYS = [
    reverse_over_reverse,
    twice_reverse,
    forward_over_reverse,
    forward_levels,
    reverse_over_forward,
]
PRECISION = dict(rtol=1e-12, atol=1e-12) if EXACT else dict(rtol=1e-4, atol=1e-5)
BEST = torch.float64 if EXACT else torch.float32


class TestDerivatives:
    @pytest.mark.parametrize("way", WAYS, ids=named)
    def test_second_derivative(self, way):
        point, dots = second_problem(BEST)
        ours = way(loss_of(attention, BEST), point, dots)
        truth = way(loss_of(attention_reference, BEST), point, dots)
        for left, right in zip(ours, truth, strict=True):
            torch.testing.assert_close(left, right, **PRECISION)

    def test_gradient_and_tangent(self):
        point, dots = second_problem(BEST)
        ours, truth = loss_of(attention, BEST), loss_of(attention_reference, BEST)
        for left, right in zip(
            (*torch.func.grad(ours, (0, 1, 2))(*point), *torch.func.jvp(ours, point, dots)),
            (*torch.func.grad(truth, (0, 1, 2))(*point), *torch.func.jvp(truth, point, dots)),
            strict=True,
        ):
            torch.testing.assert_close(left, right, **PRECISION)

    @pytest.mark.parametrize("position", range(3))
    def test_second_derivative_in_one_argument_alone(self, position):
        point, dots = second_problem(BEST)

        def of_one(attend):
            def loss(x):
                arguments = [*point[:position], x, *point[position + 1 :]]
                return loss_of(attend, BEST)(*arguments)

            return loss

        one = point[position : position + 1], dots[position : position + 1]
        left, right = (
            reverse_over_reverse(of_one(f), *one) for f in (attention, attention_reference)
        )
        torch.testing.assert_close(left[0], right[0], **PRECISION)

    def test_curvature_is_symmetric(self):
        point, dots = second_problem(BEST)
        others = tuple(random(*x.shape, dtype=BEST, seed=20 + i) for i, x in enumerate(dots))
        loss = loss_of(attention, BEST)
        left = inner(others, reverse_over_reverse(loss, point, dots))
        right = inner(dots, reverse_over_reverse(loss, point, others))
        torch.testing.assert_close(left, right, **PRECISION)

    def test_trace_of_a_product_has_only_our_operators(self):
        point, dots = second_problem(BEST)
        loss = loss_of(attention, BEST)

        def product(q, k, v, *dots):
            return reverse_over_reverse(loss, (q, k, v), dots)

        graph = make_fx(product)(*point, *dots)
        targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
        ours = {name.split(".")[1] for name in targets if name.startswith("ispen.")}
        assert ours == {
            "attention_forward",
            "attention_backward",
            "attention_tangent",
            "attention_row_dot",
            "attention_backward_tangent",
        }
        assert not any(word in name for name in targets for word in ("softmax", "mm", "exp."))
        others = tuple(random(*x.shape, dtype=BEST, seed=30 + i) for i, x in enumerate(dots))
        truth = reverse_over_reverse(loss_of(attention_reference, BEST), point, others)
        for left, right in zip(graph(*point, *others), truth, strict=True):
            torch.testing.assert_close(left, right, **PRECISION)

    def test_compiled_gradient_is_whole_and_compiled_tangent_is_right(self):
        point, dots = second_problem(BEST)
        loss = loss_of(attention, BEST)
        leaves = [x.detach().requires_grad_() for x in point]
        torch._dynamo.reset()
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        gradients = torch.autograd.grad(compiled(*leaves), leaves)
        truth = torch.func.grad(loss_of(attention_reference, BEST), (0, 1, 2))(*point)
        for left, right in zip(gradients, truth, strict=True):
            torch.testing.assert_close(left, right, **PRECISION)
        # Traced naively the tangent would be zero, without a word.
        torch._dynamo.reset()
        tangent = torch.compile(lambda *x: torch.func.jvp(loss, x, dots)[1], backend="aot_eager")
        torch.testing.assert_close(tangent(*point), inner(truth, dots), **PRECISION)

    @pytest.mark.parametrize("third", ["forward", "reverse"])
    @pytest.mark.parametrize(
        "second", [twice_reverse, forward_over_reverse, reverse_over_forward], ids=named
    )
    def test_third_derivative_raises(self, second, third):
        point, dots = second_problem(BEST)
        loss = loss_of(attention, BEST)

        def product(*x):
            return tuple(second(loss, x, dots))

        def differentiate():
            if third == "forward":
                return torch.func.jvp(product, point, dots)
            return torch.func.vjp(product, *point)[1](tuple(dots))

        with pytest.raises(NotImplementedError, match="at most"):
            differentiate()

    def test_third_reverse_through_one_graph_raises(self):
        point, dots = second_problem(BEST)
        leaves = [x.detach().requires_grad_() for x in point]
        value = loss_of(attention, BEST)(*leaves)
        gradient = torch.autograd.grad(value, leaves, create_graph=True)
        product = torch.autograd.grad(inner(gradient, dots), leaves, create_graph=True)
        with pytest.raises(NotImplementedError, match="at most two derivatives"):
            torch.autograd.grad(inner(product, dots), leaves)

    def test_two_forward_modes_raise(self):
        point, dots = second_problem(BEST)
        loss = loss_of(attention, BEST)
        with pytest.raises(NotImplementedError, match="two"):
            torch.func.jvp(lambda *x: torch.func.jvp(loss, x, dots)[1], point, dots)

    def test_operators_beyond_the_value_have_no_gradient_of_their_own(self):
        p = Problem((1, 1, 3, 5, 16), torch.float32)
        p.o_bar.requires_grad_()
        with pytest.raises(NotImplementedError, match="attention_reference"):
            kernels.attention_row_dot(p.o_bar, p.o_bar_dot).sum().backward()

    def test_bias_is_a_constant(self):
        point, _ = second_problem(BEST)
        key_bias = torch.zeros(1, 5, device=DEVICE, dtype=BEST, requires_grad=True)
        assert not attention(*point, key_bias).requires_grad


class TestErrors:
    def test_shapes(self):
        x = torch.zeros(2, 1, 3, 16, device=DEVICE)
        for arguments in ((x[0], x, x), (x, x, x[:, :, :2]), (x, x[:1], x[:1])):
            with pytest.raises(ValueError, match=r"expected \(B, N, T, H\).*got"):
                attention(*arguments)

    def test_dtypes_and_head_size(self):
        x = torch.zeros(2, 1, 3, 16, device=DEVICE)
        wide = torch.zeros(2, 1, 3, 129, device=DEVICE)
        for arguments in ((x, x.half(), x), (x.int(), x.int(), x.int()), (wide, wide, wide)):
            assert not supports(*arguments)
            with pytest.raises(ValueError, match=r"attention_reference"):
                attention(*arguments)
        assert supports(x, x, x)

    def test_key_bias(self):
        x = torch.zeros(2, 1, 3, 16, device=DEVICE)
        for key_bias in (x.new_zeros(2, 4), x.new_zeros(2, 3, dtype=torch.bool)):
            with pytest.raises(ValueError, match=r"key_bias: expected .* got .* pass 0"):
                attention(x, x, x, key_bias)

    def test_operators_refuse_what_they_would_read_wrongly(self):
        p = Problem((1, 1, 3, 5, 16), torch.float32)
        point = (*p.point, p.key_bias)
        o, lse2 = kernels.attention_forward(*point, 0.25)
        with pytest.raises(ValueError, match="q_dot"):
            kernels.attention_tangent(*point, o, lse2, p.dots[1], None, None, 0.25)
        with pytest.raises(ValueError, match="lse2"):
            kernels.attention_backward(*point, o, lse2.double(), p.o_bar, 0.25)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU and compiled kernels")
class TestOnGPU:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("head_size", [64, 80, 128])
    def test_long_sequences(self, head_size, dtype):
        check(Problem((2, 4, 512, 500, head_size), dtype))

    def test_memory_is_linear_in_length(self):
        def peak(T: int) -> int:
            point = [random(1, 4, T, 64, dtype=torch.bfloat16, seed=i) for i in range(3)]
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            reverse_over_reverse(lambda *x: attention(*x).square().sum(), point, point)
            return torch.cuda.max_memory_allocated() - before

        peak(512)
        assert peak(4096) <= 2.2 * peak(2048)
