"""Fused attention against the float64 reference: operators, shapes, memory, errors.

Shapes: B batch, N heads, T queries, S keys, H head size.
"""

import pytest
import torch

pytest.importorskip("triton")

from attention_problems import (
    DEVICE,
    DTYPES,
    EXACT,
    FLOOR_IN_EPS,
    NAMES,
    Problem,
    by_operators,
    by_reference,
    check,
    largest,
    random,
    reverse_over_reverse,
)

from ispen_kernels import attention as kernels
from ispen_kernels.attention import attention, attention_reference, supports

pytestmark = pytest.mark.usefixtures("poisoned_memory")

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


def island(x: torch.Tensor) -> torch.Tensor:
    """Return the same numbers with odd strides in a sea of NaN: a read outside shows."""
    B, N, T, H = x.shape
    sea = x.new_full((T + 2, B + 1, 2 * H + 1, N + 1), float("nan"))
    view = sea[1 : T + 1, :B, 1 : 2 * H + 1 : 2, :N].permute(1, 3, 0, 2)
    return view.copy_(x)


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
