"""Layer norm over the last dimension and exact GELU, each with its tangent.

Layer norm of a row x of width D, with weight w, bias b, m = mean(x), rho = (var(x) + eps)^(-1/2),
n = (x - m) rho, and P(a) = a - mean(a) - n mean(a n), the projection that differentiates n:

    y = w n + b                                  n' = rho P(x')
    y' = w n' + w' n + b'                        rho' = - rho^2 mean(n x')
    x_bar = rho P(h), h = w y_bar                w_bar = sum y_bar n,   b_bar = sum y_bar

and the tangent of the backward pass, along y_bar', x', w', with h' = w y_bar' + w' y_bar:

    x_bar' = rho' P(h) + rho (P(h') - n' mean(h n) - n mean(h n'))
    w_bar' = sum (y_bar' n + y_bar n'),          b_bar' = sum y_bar'

The backward of the backward needs no kernel of its own. With J the derivative of y in (x, w, b),
the backward is g = J^T y_bar, and for a cotangent u of g, <u, J^T y_bar> = <J u, y_bar>: its
gradient in y_bar is the forward tangent along u; in (x, w) it is the second derivative of
<y, y_bar> applied to u, which is symmetric, hence the tangent of g along u with y_bar' = 0.

GELU, with Phi and phi the normal distribution and its density, in the same scheme:

    f = x Phi(x),   f' = Phi + x phi,   f'' = phi (2 - x^2)

Order of differentiability of both: 2, by reverse mode, forward mode, reverse over reverse and
forward over reverse; reverse over forward, forward over forward and any third derivative raise.
The references: any order, any mode.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.library import custom_op

DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

# A row is held in registers, in the largest kernel as four vectors: 32 values of each per thread.
MAX_WIDTH = 8192
MIN_BLOCK = 16
# Programs of the backward pass, each with its own sum for w and b: two for each of the 132 SMs of
# an H100, and few enough that adding them up costs little beside the pass itself.
NUM_PARTIALS = 264
# Columns per program and rows at a time when partial sums are added up.
COMBINE_COLUMNS = 32
COMBINE_ROWS = 32
# Values per program of GELU: 8 per thread of 4 warps.
GELU_BLOCK = 1024

INV_SQRT_2 = tl.constexpr(1.0 / math.sqrt(2.0))
INV_SQRT_2PI = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """See `layer_norm`."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias


def gelu_reference(x: Tensor) -> Tensor:
    """See `gelu`."""
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


@triton.jit
def _mean(a, width):
    return tl.sum(a, axis=0) / width


@triton.jit
def _normalise_dot(n, x_dot, rho, inside, width):
    """Return n' = rho P(x'), zero beyond the end of the row."""
    projected = x_dot - _mean(x_dot, width) - n * _mean(x_dot * n, width)
    return tl.where(inside, rho * projected, 0.0)


@triton.jit
def _layer_norm_kernel(
    x, w, b, x_dot, w_dot, b_dot, y, y_dot, mean, rstd, width,
    EPS: tl.constexpr, WITH_VALUE: tl.constexpr, WITH_TANGENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * width
    k = tl.arange(0, BLOCK)
    inside = k < width
    x_k = tl.load(x + row + k, mask=inside, other=0.0)
    m = _mean(x_k, width)
    centred = tl.where(inside, x_k - m, 0.0)
    rho = 1.0 / tl.sqrt(_mean(centred * centred, width) + EPS)
    n = centred * rho
    w_k = tl.load(w + k, mask=inside, other=0.0)
    if WITH_VALUE:
        tl.store(y + row + k, n * w_k + tl.load(b + k, mask=inside, other=0.0), mask=inside)
        tl.store(mean + tl.program_id(0), m)
        tl.store(rstd + tl.program_id(0), rho)
    if WITH_TANGENT:
        x_dot_k = tl.load(x_dot + row + k, mask=inside, other=0.0)
        tangent = w_k * _normalise_dot(n, x_dot_k, rho, inside, width)
        tangent += n * tl.load(w_dot + k, mask=inside, other=0.0)
        tangent += tl.load(b_dot + k, mask=inside, other=0.0)
        tl.store(y_dot + row + k, tangent, mask=inside)


@triton.jit
def _layer_norm_backward_kernel(
    y_bar, x, w, mean, rstd, x_bar, w_parts, b_parts, num_rows, width,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, BLOCK)
    inside = k < width
    w_k = tl.load(w + k, mask=inside, other=0.0)
    w_sum = tl.zeros((BLOCK,), DTYPE)
    b_sum = tl.zeros((BLOCK,), DTYPE)
    for i in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int64) * width
        g = tl.load(y_bar + row + k, mask=inside, other=0.0)
        x_k = tl.load(x + row + k, mask=inside, other=0.0)
        rho = tl.load(rstd + i)
        n = tl.where(inside, (x_k - tl.load(mean + i)) * rho, 0.0)
        h = w_k * g
        tl.store(x_bar + row + k, _normalise_dot(n, h, rho, inside, width), mask=inside)
        w_sum += g * n
        b_sum += g
    part = tl.program_id(0) * width
    tl.store(w_parts + part + k, w_sum, mask=inside)
    tl.store(b_parts + part + k, b_sum, mask=inside)


@triton.jit
def _layer_norm_backward_tangent_kernel(
    y_bar, y_bar_dot, x, x_dot, w, w_dot, mean, rstd, x_bar_dot, w_parts, b_parts,
    num_rows, width, WITH_Y_BAR_DOT: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, BLOCK)
    inside = k < width
    w_k = tl.load(w + k, mask=inside, other=0.0)
    w_dot_k = tl.load(w_dot + k, mask=inside, other=0.0)
    w_sum = tl.zeros((BLOCK,), DTYPE)
    b_sum = tl.zeros((BLOCK,), DTYPE)
    for i in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int64) * width
        g = tl.load(y_bar + row + k, mask=inside, other=0.0)
        x_k = tl.load(x + row + k, mask=inside, other=0.0)
        x_dot_k = tl.load(x_dot + row + k, mask=inside, other=0.0)
        rho = tl.load(rstd + i)
        n = tl.where(inside, (x_k - tl.load(mean + i)) * rho, 0.0)
        n_dot = _normalise_dot(n, x_dot_k, rho, inside, width)
        rho_dot_by_rho = -rho * _mean(n * x_dot_k, width)
        h = w_k * g
        h_dot = w_dot_k * g
        w_sum += g * n_dot
        if WITH_Y_BAR_DOT:
            g_dot = tl.load(y_bar_dot + row + k, mask=inside, other=0.0)
            h_dot += w_k * g_dot
            w_sum += g_dot * n
            b_sum += g_dot
        out = rho_dot_by_rho * _normalise_dot(n, h, rho, inside, width)
        out += _normalise_dot(n, h_dot, rho, inside, width)
        out -= rho * (n_dot * _mean(h * n, width) + n * _mean(h * n_dot, width))
        tl.store(x_bar_dot + row + k, out, mask=inside)
    part = tl.program_id(0) * width
    tl.store(w_parts + part + k, w_sum, mask=inside)
    tl.store(b_parts + part + k, b_sum, mask=inside)


@triton.jit
def _add_parts_kernel(
    parts, w_bar, b_bar, num_parts, width,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up the rows of one of the two stacked (num_parts, width) blocks, in a fixed order."""
    block = parts + tl.program_id(1) * num_parts * width
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), DTYPE)
    for start in range(0, num_parts, ROWS):
        i = start + tl.arange(0, ROWS)
        inside = (i < num_parts)[:, None] & (k < width)[None, :]
        acc += tl.load(block + i[:, None] * width + k[None, :], mask=inside, other=0.0)
    total = tl.sum(acc, axis=0)
    if tl.program_id(1) == 0:
        tl.store(w_bar + k, total, mask=k < width)
    else:
        tl.store(b_bar + k, total, mask=k < width)


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


def _on(x: Tensor) -> AbstractContextManager:
    """Make the device of `x` current, where Triton launches; refuse a CPU without interpreter."""
    if x.is_cuda:
        return torch.cuda.device(x.device)
    if isinstance(_gelu_kernel, triton.JITFunction):
        raise ValueError(
            f"expected tensors on a GPU, got {x.device}; move them, call the reference, or set "
            "TRITON_INTERPRET=1 before Triton is imported"
        )
    return nullcontext()


def _row_constants(width: int) -> dict[str, int]:
    """Return block and warps: up to 8 values of a row per thread, then more of them."""
    block = max(MIN_BLOCK, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _launch_layer_norm(
    x: Tensor, w: Tensor, b: Tensor, dots: tuple[Tensor, Tensor, Tensor] | None, eps: float,
    *, value: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (y, mean, rstd, y_dot) of x (N, D); what was not asked for is x."""
    x, w, b = x.contiguous(), w.contiguous(), b.contiguous()
    x_dot, w_dot, b_dot = (x, w, b) if dots is None else (a.contiguous() for a in dots)
    y = torch.empty_like(x) if value else x
    mean, rstd = (x.new_empty(len(x)) if value else x for _ in range(2))
    y_dot = x if dots is None else torch.empty_like(x)
    if x.numel():
        with _on(x):
            _layer_norm_kernel[(len(x),)](
                x, w, b, x_dot, w_dot, b_dot, y, y_dot, mean, rstd, x.shape[1], EPS=eps,
                WITH_VALUE=value, WITH_TANGENT=dots is not None, **_row_constants(x.shape[1]),
            )  # fmt: skip
    return y, mean, rstd, y_dot


def _add_parts(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Add up parts (2, P, D) of the gradients of weight and bias."""
    _, num_parts, width = parts.shape
    w_bar, b_bar = parts.new_empty(width), parts.new_empty(width)
    _add_parts_kernel[(triton.cdiv(width, COMBINE_COLUMNS), 2)](
        parts, w_bar, b_bar, num_parts, width, DTYPE=DTYPES[parts.dtype], ROWS=COMBINE_ROWS,
        COLUMNS=COMBINE_COLUMNS,
    )  # fmt: skip
    return w_bar, b_bar


@custom_op("ispen::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_layer_norm(x, w, b, None, eps)[:3]


@custom_op("ispen::layer_norm_with_tangent", mutates_args=())
def _layer_norm_with_tangent(
    x: Tensor, w: Tensor, b: Tensor, x_dot: Tensor, w_dot: Tensor, b_dot: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    y, _, _, y_dot = _launch_layer_norm(x, w, b, (x_dot, w_dot, b_dot), eps)
    return y, y_dot


@custom_op("ispen::layer_norm_tangent", mutates_args=())
def _layer_norm_tangent(
    x: Tensor, w: Tensor, b: Tensor, x_dot: Tensor, w_dot: Tensor, b_dot: Tensor, eps: float
) -> Tensor:
    return _launch_layer_norm(x, w, b, (x_dot, w_dot, b_dot), eps, value=False)[3]


@custom_op("ispen::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    y_bar: Tensor, x: Tensor, w: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if not x.numel():
        return torch.zeros_like(x), torch.zeros_like(w), torch.zeros_like(w)
    num_rows, width = x.shape
    y_bar, x, w, x_bar = y_bar.contiguous(), x.contiguous(), w.contiguous(), _like(x)
    parts = x.new_empty(2, min(NUM_PARTIALS, num_rows), width)
    with _on(x):
        _layer_norm_backward_kernel[(parts.shape[1],)](
            y_bar, x, w, mean, rstd, x_bar, parts[0], parts[1], num_rows, width,
            DTYPE=DTYPES[x.dtype], **_row_constants(width),
        )  # fmt: skip
        return x_bar, *_add_parts(parts)


@custom_op("ispen::layer_norm_backward_tangent", mutates_args=())
def _layer_norm_backward_tangent(
    y_bar: Tensor, y_bar_dot: Tensor | None, x: Tensor, x_dot: Tensor, w: Tensor, w_dot: Tensor,
    mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not x.numel():
        return torch.zeros_like(x), torch.zeros_like(w), torch.zeros_like(w)
    num_rows, width = x.shape
    y_bar, x, x_dot, w, w_dot = (a.contiguous() for a in (y_bar, x, x_dot, w, w_dot))
    y_bar_dot = None if y_bar_dot is None else y_bar_dot.contiguous()
    x_bar_dot = _like(x)
    parts = x.new_empty(2, min(NUM_PARTIALS, num_rows), width)
    with _on(x):
        _layer_norm_backward_tangent_kernel[(parts.shape[1],)](
            y_bar, y_bar if y_bar_dot is None else y_bar_dot, x, x_dot, w, w_dot, mean, rstd,
            x_bar_dot, parts[0], parts[1], num_rows, width,
            WITH_Y_BAR_DOT=y_bar_dot is not None, DTYPE=DTYPES[x.dtype], **_row_constants(width),
        )  # fmt: skip
        return x_bar_dot, *_add_parts(parts)


def _launch_gelu(
    x: Tensor, *, x_dot: Tensor | None = None, g: Tensor | None = None, g_dot: Tensor | None = None,
    value: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (f(x), f' g), or with x_dot (f(x), f'' x_dot g + f' g_dot); x where not asked for."""
    first = g_dot is not None or (g is not None and x_dot is None)
    x, *others = (x.contiguous(), *(x if a is None else a for a in (x_dot, g, g_dot)))
    values = torch.empty_like(x) if value else x
    out = x if g is None else torch.empty_like(x)
    if x.numel():
        with _on(x):
            _gelu_kernel[(triton.cdiv(x.numel(), GELU_BLOCK),)](
                x, *(a.contiguous() for a in others), values, out, x.numel(), WITH_VALUE=value,
                WITH_FIRST=first, WITH_SECOND=x_dot is not None, BLOCK=GELU_BLOCK,
            )  # fmt: skip
    return values, out


@custom_op("ispen::gelu", mutates_args=())
def _gelu(x: Tensor) -> Tensor:
    return _launch_gelu(x, value=True)[0]


@custom_op("ispen::gelu_with_tangent", mutates_args=())
def _gelu_with_tangent(x: Tensor, x_dot: Tensor) -> tuple[Tensor, Tensor]:
    return _launch_gelu(x, g=x_dot, value=True)


@custom_op("ispen::gelu_backward", mutates_args=())
def _gelu_backward(g: Tensor, x: Tensor) -> Tensor:
    return _launch_gelu(x, g=g)[1]


@custom_op("ispen::gelu_backward_tangent", mutates_args=())
def _gelu_backward_tangent(g: Tensor, g_dot: Tensor | None, x: Tensor, x_dot: Tensor) -> Tensor:
    return _launch_gelu(x, x_dot=x_dot, g=g, g_dot=g_dot)[1]


@_layer_norm.register_fake
def _(x: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), x.new_empty(x.shape[0]), x.new_empty(x.shape[0])


@_layer_norm_with_tangent.register_fake
def _(x: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return _like(x), _like(x)


@_layer_norm_tangent.register_fake
def _(x: Tensor, *others: object) -> Tensor:
    return _like(x)


@_layer_norm_backward.register_fake
def _(y_bar: Tensor, x: Tensor, w: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(w), _like(w)


@_layer_norm_backward_tangent.register_fake
def _(
    y_bar: Tensor, y_bar_dot: Tensor | None, x: Tensor, x_dot: Tensor, w: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(w), _like(w)


@_gelu.register_fake
def _(x: Tensor) -> Tensor:
    return _like(x)


@_gelu_with_tangent.register_fake
def _(x: Tensor, x_dot: Tensor) -> tuple[Tensor, Tensor]:
    return _like(x), _like(x)


@_gelu_backward.register_fake
def _(g: Tensor, x: Tensor) -> Tensor:
    return _like(x)


@_gelu_backward_tangent.register_fake
def _(g: Tensor, g_dot: Tensor | None, x: Tensor, x_dot: Tensor) -> Tensor:
    return _like(x)


class _LastDerivative(torch.autograd.Function):
    """Run an operator whose own derivative would be one too many: taking it raises.

    An operator without an autograd formula raises in reverse mode but drops tangents silently.
    """

    @staticmethod
    def forward(op: Callable, name: str, *args: object) -> Tensor | tuple[Tensor, ...]:
        return op(*args)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: object) -> None:
        ctx.name = inputs[1]

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.name}: expected no further derivative, got a request for one; differentiate "
            "fewer times or call the reference"
        )

    jvp = backward


class _LayerNorm(torch.autograd.Function):
    """(x, w, b, eps) -> (y, mean, rstd)."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return _layer_norm(x, w, b, eps)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        x, w, b, ctx.eps = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, w, b, mean, rstd)
        ctx.save_for_forward(x, w, b)

    @staticmethod
    def backward(ctx: FunctionCtx, y_bar: Tensor, *_: Tensor) -> tuple:
        x, w, b, mean, rstd = ctx.saved_tensors
        return *_LayerNormBackward.apply(y_bar, x, w, b, mean, rstd, ctx.eps), None

    @staticmethod
    def jvp(
        ctx: FunctionCtx, x_dot: Tensor | None, w_dot: Tensor | None, b_dot: Tensor | None, _: None
    ) -> tuple:
        dots = (x_dot, w_dot, b_dot)
        return _tangent(*ctx.saved_tensors[:3], *dots, ctx.eps), None, None


class _LayerNormBackward(torch.autograd.Function):
    """(y_bar, x, w) -> (x_bar, w_bar, b_bar). mean and rstd count as part of x, b for its shape."""

    @staticmethod
    def forward(
        y_bar: Tensor, x: Tensor, w: Tensor, b: Tensor, mean: Tensor, rstd: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _layer_norm_backward(y_bar, x, w, mean, rstd)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: FunctionCtx, u_x: Tensor, u_w: Tensor, u_b: Tensor) -> tuple:
        y_bar, x, w, b, mean, rstd = ctx.saved_tensors
        y_bar_bar = x_bar = w_bar = None
        if ctx.needs_input_grad[0]:
            y_bar_bar = _tangent(x, w, b, u_x, u_w, u_b, ctx.eps)
        if any(ctx.needs_input_grad[1:3]):
            x_bar, w_bar, _ = _backward_tangent(y_bar, None, x, u_x, w, u_w, mean, rstd)
        return y_bar_bar, x_bar, w_bar, None, None, None, None

    @staticmethod
    def jvp(
        ctx: FunctionCtx, y_bar_dot: Tensor | None, x_dot: Tensor | None, w_dot: Tensor | None,
        *_: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        y_bar, x, w, _, mean, rstd = ctx.saved_tensors
        return _backward_tangent(y_bar, y_bar_dot, x, x_dot, w, w_dot, mean, rstd)


def _or_zeros(tangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tangent is None else tangent


def _tangent(
    x: Tensor, w: Tensor, b: Tensor,
    x_dot: Tensor | None, w_dot: Tensor | None, b_dot: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    dots = (_or_zeros(x_dot, x), _or_zeros(w_dot, w), _or_zeros(b_dot, b))
    name = "derivative of a tangent of layer_norm"
    return _LastDerivative.apply(_layer_norm_tangent, name, x, w, b, *dots, eps)


def _backward_tangent(
    y_bar: Tensor, y_bar_dot: Tensor | None, x: Tensor, x_dot: Tensor | None,
    w: Tensor, w_dot: Tensor | None, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    name = "third derivative of layer_norm"
    x_dot, w_dot = _or_zeros(x_dot, x), _or_zeros(w_dot, w)
    return _LastDerivative.apply(
        _layer_norm_backward_tangent, name, y_bar, y_bar_dot, x, x_dot, w, w_dot, mean, rstd
    )


class _Gelu(torch.autograd.Function):
    """x -> f(x)."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _gelu(x)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor) -> Tensor:
        return _GeluBackward.apply(g, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: FunctionCtx, x_dot: Tensor) -> Tensor:
        name = "derivative of a tangent of gelu"
        return _LastDerivative.apply(_gelu_backward, name, x_dot, *ctx.saved_tensors)


class _GeluBackward(torch.autograd.Function):
    """(g, x) -> f'(x) g."""

    @staticmethod
    def forward(g: Tensor, x: Tensor) -> Tensor:
        return _gelu_backward(g, x)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: FunctionCtx, u: Tensor) -> tuple[Tensor | None, Tensor | None]:
        g, x = ctx.saved_tensors
        name = "third derivative of gelu"
        g_bar = x_bar = None
        if ctx.needs_input_grad[0]:
            g_bar = _LastDerivative.apply(_gelu_backward, name, u, x)
        if ctx.needs_input_grad[1]:
            x_bar = _LastDerivative.apply(_gelu_backward_tangent, name, g, None, x, u)
        return g_bar, x_bar

    @staticmethod
    def jvp(ctx: FunctionCtx, g_dot: Tensor | None, x_dot: Tensor | None) -> Tensor:
        g, x = ctx.saved_tensors
        name, x_dot = "third derivative of gelu", _or_zeros(x_dot, x)
        return _LastDerivative.apply(_gelu_backward_tangent, name, g, g_dot, x, x_dot)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}; make it fit x"
        )
    if tensor.dtype not in DTYPES or tensor.dtype != like.dtype:
        raise ValueError(
            f"{name}: expected float32 or float64, one for all, got {tensor.dtype}; cast it"
        )
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} of x, got {tensor.device}; move it there"
        )


def _check_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if x.dim() < 1 or x.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f"x: expected a last dimension of at most {MAX_WIDTH}, got {tuple(x.shape)}; "
            "call layer_norm_reference"
        )
    _check("x", x, x.shape, x)
    _check("weight", weight, x.shape[-1:], x)
    _check("bias", bias, x.shape[-1:], x)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise over the last dimension, `(x - mean) / sqrt(var + eps) * weight + bias`.

    Ba et al. (2016). Differentiable to order 2 in `x`, `weight` and `bias`, see the top of the
    file; beyond, it raises.

    Args:
        x: (..., D), D up to 8192; any strides.
        weight: (D,).
        bias: (D,).
        eps: added to the variance, in its unit.

    Returns:
        Tensor like `x`, contiguous.

    Raises:
        ValueError: where shapes, types (float32, float64) or devices do not fit.
        RuntimeError: on a third derivative, or a derivative of a forward-mode tangent.
    """
    _check_layer_norm(x, weight, bias)
    rows = x[None] if x.dim() == 1 else x.flatten(0, -2)
    y, _, _ = _LayerNorm.apply(rows, weight, bias, float(eps))
    return y.view(x.shape)


def layer_norm_with_tangent(
    x: Tensor, weight: Tensor, bias: Tensor,
    x_dot: Tensor, weight_dot: Tensor, bias_dot: Tensor, eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the layer norm and its tangent in one pass.

    Args:
        x: (..., D), D up to 8192.
        weight: (D,).
        bias: (D,).
        x_dot: tangent of `x`, of its shape.
        weight_dot: tangent of `weight`.
        bias_dot: tangent of `bias`.
        eps: added to the variance.

    Returns:
        Value and tangent, both like `x`. Differentiable to order 0: a derivative raises.

    Raises:
        ValueError: where shapes, types or devices do not fit.
    """
    _check_layer_norm(x, weight, bias)
    _check("x_dot", x_dot, x.shape, x)
    _check("weight_dot", weight_dot, weight.shape, x)
    _check("bias_dot", bias_dot, bias.shape, x)
    rows, rows_dot = (a[None] if a.dim() == 1 else a.flatten(0, -2) for a in (x, x_dot))
    y, y_dot = _LastDerivative.apply(
        _layer_norm_with_tangent, "derivative of layer_norm_with_tangent",
        rows, weight, bias, rows_dot, weight_dot, bias_dot, float(eps),
    )  # fmt: skip
    return y.view(x.shape), y_dot.view(x.shape)


def gelu(x: Tensor) -> Tensor:
    """Compute the exact GELU, `x Phi(x)` with the normal distribution function by `erf`.

    Hendrycks and Gimpel (2016). Differentiable to order 2; beyond, it raises.

    Args:
        x: any shape and strides.

    Returns:
        Tensor like `x`, contiguous.

    Raises:
        ValueError: where the type is neither float32 nor float64.
        RuntimeError: on a third derivative, or a derivative of a forward-mode tangent.
    """
    _check("x", x, x.shape, x)
    return _Gelu.apply(x)


def gelu_with_tangent(x: Tensor, x_dot: Tensor) -> tuple[Tensor, Tensor]:
    """Compute GELU and its tangent in one pass.

    Args:
        x: any shape and strides.
        x_dot: tangent, like `x`.

    Returns:
        Value and tangent, both like `x`. Differentiable to order 0: a derivative raises.

    Raises:
        ValueError: where shapes, types or devices do not fit.
    """
    _check("x", x, x.shape, x)
    _check("x_dot", x_dot, x.shape, x)
    name = "derivative of gelu_with_tangent"
    return _LastDerivative.apply(_gelu_with_tangent, name, x, x_dot)
