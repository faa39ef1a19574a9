"""Every pass of layer norm over rows, as kernels and their operators. Formulas: `norms.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from ispen_kernels.launch import DTYPES, contiguous_like, launch, padded, part

# A row is held in registers, in the largest kernel as four vectors: 32 values of each per thread.
MAX_WIDTH = 8192
# Programs of the backward pass, each with its own sum for w and b: two for each of the 132 SMs of
# an H100, and few enough that adding them up costs little beside the pass itself.
NUM_PARTIALS = 264
# Columns per program and rows at a time when partial sums are added up.
COMBINE_COLUMNS = 32
COMBINE_ROWS = 32


@part
def _mean(a, width):
    return tl.sum(a, axis=0) / width


@part
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


def _row_constants(width: int) -> dict[str, int]:
    """Return block and warps: up to 8 values of a row per thread, then more of them."""
    block = padded(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


def _launch(
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
        launch(
            _layer_norm_kernel, (len(x),), x.device,
            x, w, b, x_dot, w_dot, b_dot, y, y_dot, mean, rstd, x.shape[1], EPS=eps,
            WITH_VALUE=value, WITH_TANGENT=dots is not None, **_row_constants(x.shape[1]),
        )  # fmt: skip
    return y, mean, rstd, y_dot


def _add_parts(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Add up parts (2, P, D) of the gradients of weight and bias."""
    _, num_parts, width = parts.shape
    w_bar, b_bar = parts.new_empty(width), parts.new_empty(width)
    launch(
        _add_parts_kernel, (triton.cdiv(width, COMBINE_COLUMNS), 2), parts.device,
        parts, w_bar, b_bar, num_parts, width,
        DTYPE=DTYPES[parts.dtype], ROWS=COMBINE_ROWS, COLUMNS=COMBINE_COLUMNS,
    )  # fmt: skip
    return w_bar, b_bar


@custom_op("ispen::layer_norm", mutates_args=())
def forward(x: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y (N, D), and the mean and the inverse deviation of every row, (N,) each."""
    return _launch(x, w, b, None, eps)[:3]


@forward.register_fake
def _(x: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return contiguous_like(x), x.new_empty(x.shape[0]), x.new_empty(x.shape[0])


@custom_op("ispen::layer_norm_with_tangent", mutates_args=())
def forward_with_tangent(
    x: Tensor, w: Tensor, b: Tensor, x_dot: Tensor, w_dot: Tensor, b_dot: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute y and y_dot."""
    y, _, _, y_dot = _launch(x, w, b, (x_dot, w_dot, b_dot), eps)
    return y, y_dot


@forward_with_tangent.register_fake
def _(x: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return contiguous_like(x), contiguous_like(x)


@custom_op("ispen::layer_norm_tangent", mutates_args=())
def tangent(
    x: Tensor, w: Tensor, b: Tensor, x_dot: Tensor, w_dot: Tensor, b_dot: Tensor, eps: float
) -> Tensor:
    """Compute y_dot alone."""
    return _launch(x, w, b, (x_dot, w_dot, b_dot), eps, value=False)[3]


@tangent.register_fake
def _(x: Tensor, *others: object) -> Tensor:
    return contiguous_like(x)


@custom_op("ispen::layer_norm_backward", mutates_args=())
def backward(
    y_bar: Tensor, x: Tensor, w: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute x_bar, w_bar and b_bar."""
    if not x.numel():
        return torch.zeros_like(x), torch.zeros_like(w), torch.zeros_like(w)
    num_rows, width = x.shape
    y_bar, x, w, x_bar = y_bar.contiguous(), x.contiguous(), w.contiguous(), contiguous_like(x)
    parts = x.new_empty(2, min(NUM_PARTIALS, num_rows), width)
    launch(
        _layer_norm_backward_kernel, (parts.shape[1],), x.device,
        y_bar, x, w, mean, rstd, x_bar, parts[0], parts[1], num_rows, width,
        DTYPE=DTYPES[x.dtype], **_row_constants(width),
    )  # fmt: skip
    return x_bar, *_add_parts(parts)


@backward.register_fake
def _(y_bar: Tensor, x: Tensor, w: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    return contiguous_like(x), contiguous_like(w), contiguous_like(w)


@custom_op("ispen::layer_norm_backward_tangent", mutates_args=())
def backward_tangent(
    y_bar: Tensor, y_bar_dot: Tensor | None, x: Tensor, x_dot: Tensor, w: Tensor, w_dot: Tensor,
    mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the tangents of what `backward` computes; a y_bar_dot that is None is zero."""
    if not x.numel():
        return torch.zeros_like(x), torch.zeros_like(w), torch.zeros_like(w)
    num_rows, width = x.shape
    y_bar, x, x_dot, w, w_dot = (a.contiguous() for a in (y_bar, x, x_dot, w, w_dot))
    y_bar_dot = None if y_bar_dot is None else y_bar_dot.contiguous()
    x_bar_dot = contiguous_like(x)
    parts = x.new_empty(2, min(NUM_PARTIALS, num_rows), width)
    launch(
        _layer_norm_backward_tangent_kernel, (parts.shape[1],), x.device,
        y_bar, y_bar if y_bar_dot is None else y_bar_dot, x, x_dot, w, w_dot, mean, rstd,
        x_bar_dot, parts[0], parts[1], num_rows, width,
        WITH_Y_BAR_DOT=y_bar_dot is not None, DTYPE=DTYPES[x.dtype], **_row_constants(width),
    )  # fmt: skip
    return x_bar_dot, *_add_parts(parts)


@backward_tangent.register_fake
def _(
    y_bar: Tensor, y_bar_dot: Tensor | None, x: Tensor, x_dot: Tensor, w: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    return contiguous_like(x), contiguous_like(w), contiguous_like(w)
