"""Every pass of the label interaction, as one kernel and its operators. Formulas: `energies.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from ispen_kernels.launch import DTYPES, contiguous_like, launch, padded, part

# A tile of M in registers, 8 values per thread, so that float64 does not spill. One row of y per
# program: batches are small beside the 132 SMs of an H100, and M is read again from the cache.
TILE = 2048
NUM_WARPS = 8
MAX_BLOCK_UNITS = 128


@part
def _project(row, M, units, num_units, num_labels, DTYPE: tl.constexpr, BLOCK_L: tl.constexpr):
    """Return M[units] row, with one reduction over threads at the end of the row."""
    acc = tl.zeros((units.shape[0], BLOCK_L), DTYPE)
    for start in range(0, num_labels, BLOCK_L):
        label = start + tl.arange(0, BLOCK_L)
        inside = (units < num_units)[:, None] & (label < num_labels)[None, :]
        tile = tl.load(M + units[:, None] * num_labels + label[None, :], mask=inside, other=0.0)
        acc += tile * tl.load(row + label, mask=label < num_labels, other=0.0)[None, :]
    return tl.sum(acc, axis=1)


@part
def _add_back(out, weight, M, units, num_units, num_labels, first, BLOCK_L: tl.constexpr):
    """Write weight^T M[units] to the row `out`, added to what earlier units left there."""
    for start in range(0, num_labels, BLOCK_L):
        label = start + tl.arange(0, BLOCK_L)
        inside = (units < num_units)[:, None] & (label < num_labels)[None, :]
        tile = tl.load(M + units[:, None] * num_labels + label[None, :], mask=inside, other=0.0)
        earlier = tl.load(out + label, mask=(label < num_labels) & (first > 0), other=0.0)
        total = earlier + tl.sum(weight[:, None] * tile, axis=0)
        tl.store(out + label, total, mask=label < num_labels)


@triton.jit
def _label_interaction_kernel(
    y, y_dot, M, v, energy, gradient, product, num_units, num_labels,
    WITH_FIRST: tl.constexpr, WITH_PRODUCT: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * num_labels
    total = tl.zeros((BLOCK_U,), DTYPE)
    for first in range(0, num_units, BLOCK_U):
        units = first + tl.arange(0, BLOCK_U)
        v_u = tl.load(v + units, mask=units < num_units, other=0.0)
        z = _project(y + row, M, units, num_units, num_labels, DTYPE, BLOCK_L)
        # Everything from exp(-|z|) <= 1: no overflow, and s and 1 - s are exact at both ends.
        e = tl.exp(-tl.abs(z))
        s = tl.where(z >= 0, 1.0, e) / (1.0 + e)
        not_s = tl.where(z >= 0, e, 1.0) / (1.0 + e)
        if WITH_FIRST:
            # log(1 + e) = log(w) e / (w - 1) with the rounded w = 1 + e, exact for small e.
            w = 1.0 + e
            log_w = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
            # A NaN must stay one: maximum would drop it.
            total += v_u * (tl.where(z < 0, 0.0, z) + log_w)
            _add_back(gradient + row, v_u * s, M, units, num_units, num_labels, first, BLOCK_L)
        if WITH_PRODUCT:
            z_dot = _project(y_dot + row, M, units, num_units, num_labels, DTYPE, BLOCK_L)
            weight = v_u * s * not_s * z_dot
            _add_back(product + row, weight, M, units, num_units, num_labels, first, BLOCK_L)
        # Later units read what other threads of this program wrote.
        tl.debug_barrier()
    if WITH_FIRST:
        tl.store(energy + tl.program_id(0), tl.sum(total))


def _launch(
    y: Tensor, y_dot: Tensor | None, M: Tensor, v: Tensor, *, first: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (energy, gradient, product); what was not asked for is not written."""
    num_units, num_labels = M.shape
    if not len(y) or not num_units:
        return y.new_zeros(len(y)), torch.zeros_like(y), torch.zeros_like(y)
    y, M, v = y.contiguous(), M.contiguous(), v.contiguous()
    tangent = y if y_dot is None else y_dot.contiguous()
    # Where nothing is written, any pointer will do.
    energy = torch.empty(len(y), dtype=y.dtype, device=y.device) if first else y
    gradient = torch.empty_like(y) if first else y
    product = y if y_dot is None else torch.empty_like(y)
    block_units = min(MAX_BLOCK_UNITS, padded(num_units))
    launch(
        _label_interaction_kernel, (len(y),), y.device,
        y, tangent, M, v, energy, gradient, product, num_units, num_labels,
        WITH_FIRST=first, WITH_PRODUCT=y_dot is not None, DTYPE=DTYPES[y.dtype],
        BLOCK_U=block_units, BLOCK_L=min(TILE // block_units, padded(num_labels)),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return energy, gradient, product


@custom_op("ispen::label_interaction_gradient", mutates_args=())
def gradient(y: Tensor, M: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute energy (B,) and gradient in y (B, L)."""
    return _launch(y, None, M, v)[:2]


@gradient.register_fake
def _(y: Tensor, M: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape[0]), contiguous_like(y)


@custom_op("ispen::label_interaction_product", mutates_args=())
def product(y: Tensor, y_dot: Tensor, M: Tensor, v: Tensor) -> Tensor:
    """Compute the Hessian-vector product in y along y_dot."""
    return _launch(y, y_dot, M, v, first=False)[2]


@product.register_fake
def _(y: Tensor, y_dot: Tensor, M: Tensor, v: Tensor) -> Tensor:
    return contiguous_like(y)


@custom_op("ispen::label_interaction_all", mutates_args=())
def gradient_and_product(
    y: Tensor, y_dot: Tensor, M: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute energy, gradient and product."""
    return _launch(y, y_dot, M, v)


@gradient_and_product.register_fake
def _(y: Tensor, y_dot: Tensor, M: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape[0]), contiguous_like(y), contiguous_like(y)
