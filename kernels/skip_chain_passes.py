"""Every pass of the skip chain, as one kernel and its operators. Formulas: `energies.py`."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import custom_op

from ispen_kernels.launch import DTYPES, contiguous_like, launch, padded, part

# Tokens per program; the smallest block that a matrix product of Triton takes in any version.
BLOCK_TOKENS = 16
NUM_WARPS = 8
# W_d is held in one block, twice (as it is and transposed); one stage, as a second copy of both in
# flight would cost more registers than the few offsets gain.
MAX_TAGS = 64


@part
def _neighbours(row, W, num_offsets, num_tokens, num_tags, DTYPE: tl.constexpr,
                BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Return sum_d W_d^T y_{t-d} and sum_d W_d y_{t+d} for the tokens of this program."""
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    i = tl.arange(0, BLOCK_K)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    before = tl.zeros((BLOCK_T, BLOCK_K), DTYPE)
    after = tl.zeros((BLOCK_T, BLOCK_K), DTYPE)
    for d in range(1, num_offsets + 1):
        W_d = W + (d - 1) * num_tags * num_tags
        square = (i < num_tags) & (k < num_tags)
        forth = tl.load(W_d + i * num_tags + k, mask=square, other=0.0)
        back = tl.load(W_d + k * num_tags + i, mask=square, other=0.0)
        has_before = (t >= d) & (t < num_tokens) & (k < num_tags)
        y_before = tl.load(row + (t - d) * num_tags + k, mask=has_before, other=0.0)
        y_after = tl.load(
            row + (t + d) * num_tags + k, mask=(t + d < num_tokens) & (k < num_tags), other=0.0
        )
        # The full precision of the type: reduced products would cost the curvature its symmetry.
        before += tl.dot(y_before, forth, input_precision="ieee", out_dtype=DTYPE)
        after += tl.dot(y_after, back, input_precision="ieee", out_dtype=DTYPE)
    return before, after


@triton.jit
def _skip_chain_kernel(
    y, y_dot, W, energy, gradient, product, num_offsets, num_tokens, num_tags,
    WITH_PRODUCT: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * num_tokens * num_tags
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    inside = (t < num_tokens) & (k < num_tags)
    here = t * num_tags + k
    before, after = _neighbours(
        y + row, W, num_offsets, num_tokens, num_tags, DTYPE, BLOCK_T, BLOCK_K
    )
    y_here = tl.load(y + row + here, mask=inside, other=0.0)
    part = energy + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(part, -tl.sum(tl.sum(y_here * before, axis=1), axis=0))
    tl.store(gradient + row + here, -(before + after), mask=inside)
    if WITH_PRODUCT:
        before, after = _neighbours(
            y_dot + row, W, num_offsets, num_tokens, num_tags, DTYPE, BLOCK_T, BLOCK_K
        )
        tl.store(product + row + here, -(before + after), mask=inside)


def _launch(y: Tensor, y_dot: Tensor | None, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_tokens, num_tags = y.shape
    if not y.numel():
        return y.new_zeros(batch), torch.zeros_like(y), torch.zeros_like(y)
    y, W = y.contiguous(), W.contiguous()
    tangent = y if y_dot is None else y_dot.contiguous()
    num_blocks = triton.cdiv(num_tokens, BLOCK_TOKENS)
    energy = torch.empty((batch, num_blocks), dtype=y.dtype, device=y.device)
    gradient = torch.empty_like(y)
    product = energy if y_dot is None else torch.empty_like(y)
    launch(
        _skip_chain_kernel, (batch, num_blocks), y.device,
        y, tangent, W, energy, gradient, product, len(W), num_tokens, num_tags,
        WITH_PRODUCT=y_dot is not None, DTYPE=DTYPES[y.dtype],
        BLOCK_T=BLOCK_TOKENS, BLOCK_K=padded(num_tags), num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    return energy.sum(1), gradient, product


@custom_op("ispen::skip_chain_gradient", mutates_args=())
def gradient(y: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Compute energy (B,) and gradient in y (B, T, K)."""
    return _launch(y, None, W)[:2]


@gradient.register_fake
def _(y: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape[0]), contiguous_like(y)


@custom_op("ispen::skip_chain_all", mutates_args=())
def gradient_and_product(y: Tensor, y_dot: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute energy, gradient, and Hessian-vector product in y along y_dot."""
    return _launch(y, y_dot, W)


@gradient_and_product.register_fake
def _(y: Tensor, y_dot: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape[0]), contiguous_like(y), contiguous_like(y)
