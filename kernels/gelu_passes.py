"""Every pass of GELU, as one kernel and its operators. Formulas: `norms.py`."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from ispen_kernels.launch import contiguous_like, launch

# Values per program: 8 per thread of 4 warps.
BLOCK_ELEMENTS = 1024

INV_SQRT_2 = tl.constexpr(1.0 / math.sqrt(2.0))
INV_SQRT_2PI = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))


@triton.jit
def _gelu_kernel(
    x, x_dot, g, g_dot, value, out, num_elements,
    WITH_VALUE: tl.constexpr, WITH_FIRST: tl.constexpr, WITH_SECOND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write f(x) to `value`; to `out` f' g (first), f'' x_dot g (second), or that plus f' g_dot."""
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = k < num_elements
    x_k = tl.load(x + k, mask=inside, other=0.0)
    Phi = 0.5 * (1.0 + tl.erf(x_k * INV_SQRT_2))
    if WITH_VALUE:
        tl.store(value + k, x_k * Phi, mask=inside)
    if WITH_FIRST or WITH_SECOND:
        phi = INV_SQRT_2PI * tl.exp(-0.5 * x_k * x_k)
        g_k = tl.load(g + k, mask=inside, other=0.0)
        if WITH_SECOND:
            # phi is 0 where x^2 overflows, and 0 inf would be NaN: x phi first.
            second = (2.0 * phi - (x_k * phi) * x_k) * g_k
            result = second * tl.load(x_dot + k, mask=inside, other=0.0)
            if WITH_FIRST:
                result += (Phi + x_k * phi) * tl.load(g_dot + k, mask=inside, other=0.0)
        else:
            result = (Phi + x_k * phi) * g_k
        tl.store(out + k, result, mask=inside)


def _launch(
    x: Tensor, *, x_dot: Tensor | None = None, g: Tensor | None = None, g_dot: Tensor | None = None,
    value: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (f(x), f' g), or with x_dot (f(x), f'' x_dot g + f' g_dot); x where not asked for."""
    first = g_dot is not None or (g is not None and x_dot is None)
    x, *others = (x.contiguous(), *(x if a is None else a for a in (x_dot, g, g_dot)))
    values = torch.empty_like(x) if value else x
    out = x if g is None else torch.empty_like(x)
    if x.numel():
        launch(
            _gelu_kernel, (triton.cdiv(x.numel(), BLOCK_ELEMENTS),), x.device,
            x, *(a.contiguous() for a in others), values, out, x.numel(), WITH_VALUE=value,
            WITH_FIRST=first, WITH_SECOND=x_dot is not None, BLOCK=BLOCK_ELEMENTS,
        )  # fmt: skip
    return values, out


@custom_op("ispen::gelu", mutates_args=())
def forward(x: Tensor) -> Tensor:
    """Compute f(x)."""
    return _launch(x, value=True)[0]


@forward.register_fake
def _(x: Tensor) -> Tensor:
    return contiguous_like(x)


@custom_op("ispen::gelu_with_tangent", mutates_args=())
def forward_with_tangent(x: Tensor, x_dot: Tensor) -> tuple[Tensor, Tensor]:
    """Compute f(x) and f'(x) x_dot."""
    return _launch(x, g=x_dot, value=True)


@forward_with_tangent.register_fake
def _(x: Tensor, x_dot: Tensor) -> tuple[Tensor, Tensor]:
    return contiguous_like(x), contiguous_like(x)


@custom_op("ispen::gelu_backward", mutates_args=())
def backward(g: Tensor, x: Tensor) -> Tensor:
    """Compute f'(x) g, adjoint and tangent alike."""
    return _launch(x, g=g)[1]


@backward.register_fake
def _(g: Tensor, x: Tensor) -> Tensor:
    return contiguous_like(x)


@custom_op("ispen::gelu_backward_tangent", mutates_args=())
def backward_tangent(g: Tensor, g_dot: Tensor | None, x: Tensor, x_dot: Tensor) -> Tensor:
    """Compute f''(x) x_dot g + f'(x) g_dot; a g_dot that is None is zero."""
    return _launch(x, x_dot=x_dot, g=g, g_dot=g_dot)[1]


@backward_tangent.register_fake
def _(g: Tensor, g_dot: Tensor | None, x: Tensor, x_dot: Tensor) -> Tensor:
    return contiguous_like(x)
