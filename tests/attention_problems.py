"""Points and directions for attention, and its derivatives by the operators and by the reference.

Shapes: B batch, N heads, T queries, S keys, H head size.
"""

import torch

from ispen_kernels import attention as kernels
from ispen_kernels.attention import attention_reference

DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
EXACT = [torch.float64] if kernels.INTERPRETED else []
# Rounding of the result alone: the reference may happen to be better than that.
FLOOR_IN_EPS = 2
NAMES = ("o", "o_dot", "q_bar", "k_bar", "v_bar", "q_bar_dot", "k_bar_dot", "v_bar_dot")


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


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


def inner(left, right):
    return sum((a * b).sum() for a, b in zip(left, right, strict=True))


def reverse_over_reverse(loss, point, dots):
    point = [x.detach().requires_grad_() for x in point]
    gradient = torch.autograd.grad(loss(*point), point, create_graph=True)
    return torch.autograd.grad(inner(gradient, dots), point)
