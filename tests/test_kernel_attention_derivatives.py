"""Derivatives of fused attention by every way of autograd, against the reference."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

pytest.importorskip("triton")

from attention_problems import DEVICE, EXACT, Problem, inner, random, reverse_over_reverse

from ispen_kernels import attention as kernels
from ispen_kernels.attention import attention, attention_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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
