"""Softmax attention with first and second derivatives in linear memory, as Triton kernels.

No matrix of scores is ever kept: every derivative is rebuilt, tile by tile, from q, k, v and one
number per query. Per batch entry and head, with queries i and keys j, log2 units where marked:

    s = scale q k^T + key_bias          p = exp(s - lse),  lse_i = log sum_j exp(s_ij)
    o = p v                             (p = exp2(s log2e - lse2) in the code, lse2 = lse log2e)

Tangent of the value, in directions q_dot, k_dot, v_dot:

    s_dot = scale (q_dot k^T + q k_dot^T)
    lse_dot_i = sum_j p_ij s_dot_ij
    p_dot = p (s_dot - lse_dot)
    o_dot = p_dot v + p v_dot = (p s_dot) v + p v_dot - lse_dot o

Adjoint, for o_bar, with D_i = sum_j p_ij p_bar_ij = <o_bar_i, o_i>:

    p_bar = o_bar v^T                   s_bar = p (p_bar - D)
    q_bar = scale s_bar k               k_bar = scale s_bar^T q           v_bar = p^T o_bar

Tangent of the adjoint, with D_dot_i = <o_bar_dot_i, o_i> + <o_bar_i, o_dot_i>:

    p_bar_dot = o_bar_dot v^T + o_bar v_dot^T
    s_bar_dot = s_bar (s_dot - lse_dot) + p (p_bar_dot - D_dot)
    q_bar_dot = scale (s_bar_dot k + s_bar k_dot)
    k_bar_dot = scale (s_bar_dot^T q + s_bar^T q_dot)
    v_bar_dot = p_dot^T o_bar + p^T o_bar_dot

Reverse over reverse needs nothing new. For a fixed o_bar the adjoint is the gradient of
<o_bar, o(q, k, v)>, so its Jacobian in (q, k, v) is symmetric, and its transpose in a direction
(u_q, u_k, u_v) is its tangent in that direction with o_bar_dot = 0; as the adjoint is linear in
o_bar, what flows back to o_bar is o_dot in direction u.

Departures from a textbook: (1) lse is kept in base 2, which saves a product and a rounding per
tile; (2) `attention` subtracts the largest key bias of a sequence first, which changes no weight
and keeps a sequence of padding alone as exact as any other.

Shapes: B batch, N heads, T queries, S keys, H head size. The row statistics lse2, lse_dot, D and
D_dot are (B, N, T), float64 beside float64 and float32 otherwise. Kernels read any strides and
write contiguous outputs; every output has one writer, so results are reproducible bit by bit.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import forward_ad

INTERPRETED = bool(triton.knobs.runtime.interpret)

# The exponent of exp2 is the exponent of exp times this: the hardware has only exp2.
LOG2E = tl.constexpr(math.log2(math.e))
# The interpreter keeps bfloat16 as integers and multiplies those; it must widen before a product.
WIDEN_BFLOAT16 = tl.constexpr(INTERPRETED)

# TF32 would lose 13 bits of every factor, and a linear solve needs them.
FLOAT32_PRODUCT = tl.constexpr("ieee")

# Heads are padded to a power of two from 16, the width of a tensor core's tile; beyond 128 two
# accumulators do not fit in the registers.
MIN_HEAD_SIZE, MAX_HEAD_SIZE = 1, 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = ("dtype", "device")
BEYOND = (
    "attention: expected at most two derivatives, got a third; use attention_reference, which has "
    "derivatives of any order"
)


class Tiles(NamedTuple):
    """How a kernel is cut: rows it owns, rows it visits per step, warps, pipeline stages."""

    owned: int
    visited: int
    warps: int
    stages: int


# For head sizes up to 64, and up to 128. 64 owned rows are the least that use the wide products of
# Hopper, and little padding for sentences; a second derivative keeps four tiles of weights in
# registers, hence its narrow steps. Compiled for sm_90 by Triton 3.6 and 3.9 no 16-bit row spills
# more than 56 bytes a thread, and that only where lengths do not divide. None was timed yet.
TILES_16_BITS = {
    "forward": (Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2)),
    "forward_tangent": (Tiles(64, 32, 4, 3), Tiles(64, 32, 4, 2)),
    "tangent": (Tiles(64, 32, 4, 3), Tiles(64, 32, 4, 2)),
    "q_bar": (Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2)),
    "q_bar_tangent": (Tiles(64, 32, 4, 2), Tiles(64, 16, 4, 2)),
    "kv_bar": (Tiles(64, 64, 4, 3), Tiles(64, 32, 4, 2)),
    "kv_bar_tangent": (Tiles(64, 32, 4, 2), Tiles(128, 16, 8, 2)),
}
# IEEE products hold whole rows of both operands in registers: small tiles over many warps, and the
# tangents of head sizes from 64 spill all the same. Tiles of 16 x 16 over 8 warps would spill less,
# but the LLVM of Triton 3.9 aborts on them.
TILES_32_BITS = {
    name: (Tiles(32, 16, 8, 1),) * 2
    if "tangent" in name
    else (Tiles(32, 32, 4, 2), Tiles(32, 32, 8, 1))
    for name in TILES_16_BITS
}
# At head sizes 17 to 32 the LLVM of Triton 3.9 aborts on those, and on four others that were tried.
TILES_32_BITS_NARROW = Tiles(32, 32, 8, 1)
# Small, so that small tests meet several blocks; nothing else counts here.
TILES_INTERPRETER = Tiles(32, 32, 4, 1)
ROW_DOT_ROWS = 32


def _tiles(kernel: str, dtype: torch.dtype, block_H: int) -> Tiles:
    if INTERPRETED:
        return TILES_INTERPRETER
    if dtype.itemsize > 2 and kernel == "forward_tangent" and block_H == 32:
        return TILES_32_BITS_NARROW
    table = TILES_16_BITS if dtype.itemsize == 2 else TILES_32_BITS
    return table[kernel][block_H > 64]


def _part(function):
    """Mark a function that kernels call; in the interpreter a call of a jit function costs 5 ms."""
    return function if INTERPRETED else triton.jit(function)


@_part
def _head(pointer, strides, index, num_heads):
    """Move a pointer to the batch entry and head of a program; None stays None."""
    if pointer is None:
        moved = None
    else:
        batch = (index // num_heads).to(tl.int64)
        head = (index % num_heads).to(tl.int64)
        moved = pointer + batch * strides[0] + head * strides[1]
    return moved


@_part
def _load(
    head,
    strides,
    start,
    length,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Load rows [start, start + ROWS) of a head, zero beyond its ends; None stays None."""
    if head is None:
        tile = None
    else:
        row = tl.arange(0, ROWS)
        col = tl.arange(0, BLOCK_H)
        # 64 bits for the start only: inside a tile 32 bits are enough, and cheaper.
        base = head + tl.cast(start, tl.int64) * strides[2]
        pointers = base + row[:, None] * strides[2] + col[None, :] * strides[3]
        if RAGGED and BLOCK_H != H:
            inside = (start + row < length)[:, None] & (col < H)[None, :]
            tile = tl.load(pointers, mask=inside, other=0.0)
        elif RAGGED:
            tile = tl.load(pointers, mask=(start + row < length)[:, None], other=0.0)
        elif BLOCK_H != H:
            tile = tl.load(pointers, mask=(col < H)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@_part
def _store(
    pointer,
    tile,
    index,
    start,
    length,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Store rows of a contiguous output."""
    row = start + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_H)
    head = pointer + tl.cast(index, tl.int64) * length * H
    inside = (row < length)[:, None] & (col < H)[None, :]
    place = row.to(tl.int64)[:, None] * H + col[None, :]
    tl.store(head + place, tile.to(pointer.dtype.element_ty), mask=inside)


@_part
def _load_rows(
    pointer, index, start, length, ROWS: tl.constexpr, RAGGED: tl.constexpr, OTHER: tl.constexpr
):
    """Load a row statistic; rows beyond the end read OTHER."""
    row = start + tl.arange(0, ROWS)
    base = pointer + tl.cast(index, tl.int64) * length
    return tl.load(base + row, mask=row < length, other=OTHER) if RAGGED else tl.load(base + row)


@_part
def _store_rows(pointer, values, index, start, length, ROWS: tl.constexpr):
    row = start + tl.arange(0, ROWS)
    base = pointer + tl.cast(index, tl.int64) * length
    tl.store(base + row, values, mask=row < length)


@_part
def _key_offset(
    bias, strides, batch, start, length, ROWS: tl.constexpr, RAGGED: tl.constexpr, ACC: tl.constexpr
):
    """Return what is added to the scores of keys: bias, minus infinity beyond the end, or None."""
    key = start + tl.arange(0, ROWS)
    if bias is not None:
        pointers = bias + tl.cast(batch, tl.int64) * strides[0]
        pointers += key.to(tl.int64) * strides[1]
        loaded = tl.load(pointers, mask=key < length, other=float("-inf"))
        offset = loaded.to(ACC) * LOG2E
    elif RAGGED:
        offset = tl.where(key < length, 0.0, float("-inf")).to(ACC)
    else:
        offset = None
    return offset


@_part
def _dot(a, b, acc):
    """Return acc + a b; float32 is multiplied as float32, not as TF32."""
    if WIDEN_BFLOAT16 and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=FLOAT32_PRODUCT, out_dtype=acc.dtype)


@_part
def _product(a, b, ACC: tl.constexpr):
    """Return a b^T."""
    return _dot(a, tl.trans(b), tl.full((a.shape[0], b.shape[0]), 0.0, ACC))


@_part
def _product_tangent(a, b, a_dot, b_dot, ACC: tl.constexpr):
    """Return a_dot b^T + a b_dot^T; a direction that is None is zero."""
    c = tl.full((a.shape[0], b.shape[0]), 0.0, ACC)
    if a_dot is not None:
        c = _dot(a_dot, tl.trans(b), c)
    if b_dot is not None:
        c = _dot(a, tl.trans(b_dot), c)
    return c


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    bias,
    q_dot,
    k_dot,
    v_dot,
    o,
    lse2,
    o_dot,
    lse_dot,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    q_dot_strides,
    k_dot_strides,
    v_dot_strides,
    num_heads,
    num_queries,
    num_keys,
    SCALE: tl.constexpr,
    TANGENT: tl.constexpr,
    ACC: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RAGGED_Q: tl.constexpr,
    RAGGED_K: tl.constexpr,
):
    """Value of a block of queries, and with TANGENT its tangent, in one pass over the keys."""
    num_blocks = (num_queries + BLOCK_Q - 1) // BLOCK_Q
    index = tl.program_id(0) // num_blocks
    first = (tl.program_id(0) % num_blocks) * BLOCK_Q

    q_head = _head(q, q_strides, index, num_heads)
    k_head = _head(k, k_strides, index, num_heads)
    v_head = _head(v, v_strides, index, num_heads)
    q_dot_head = _head(q_dot, q_dot_strides, index, num_heads)
    k_dot_head = _head(k_dot, k_dot_strides, index, num_heads)
    v_dot_head = _head(v_dot, v_dot_strides, index, num_heads)

    q_t = _load(q_head, q_strides, first, num_queries, H, BLOCK_Q, BLOCK_H, RAGGED_Q)
    q_dot_t = _load(q_dot_head, q_dot_strides, first, num_queries, H, BLOCK_Q, BLOCK_H, RAGGED_Q)
    largest = tl.full((BLOCK_Q,), float("-inf"), ACC)
    total = tl.full((BLOCK_Q,), 0.0, ACC)
    acc = tl.full((BLOCK_Q, BLOCK_H), 0.0, ACC)
    if TANGENT:
        total_dot = tl.full((BLOCK_Q,), 0.0, ACC)
        acc_dot = tl.full((BLOCK_Q, BLOCK_H), 0.0, ACC)

    for start in range(0, num_keys, BLOCK_K):
        k_t = _load(k_head, k_strides, start, num_keys, H, BLOCK_K, BLOCK_H, RAGGED_K)
        v_t = _load(v_head, v_strides, start, num_keys, H, BLOCK_K, BLOCK_H, RAGGED_K)
        s = _product(q_t, k_t, ACC) * (SCALE * LOG2E)
        offset = _key_offset(
            bias, bias_strides, index // num_heads, start, num_keys, BLOCK_K, RAGGED_K, ACC
        )
        if offset is not None:
            s += offset[None, :]
        # Everything summed so far is relative to the largest score so far.
        larger = tl.maximum(largest, tl.max(s, 1))
        shrink = tl.exp2(largest - larger)
        p = tl.exp2(s - larger[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = _dot(p.to(v_t.dtype), v_t, acc * shrink[:, None])
        if TANGENT:
            k_dot_t = _load(
                k_dot_head, k_dot_strides, start, num_keys, H, BLOCK_K, BLOCK_H, RAGGED_K
            )
            v_dot_t = _load(
                v_dot_head, v_dot_strides, start, num_keys, H, BLOCK_K, BLOCK_H, RAGGED_K
            )
            acc_dot = acc_dot * shrink[:, None]
            total_dot = total_dot * shrink
            if q_dot is not None or k_dot is not None:
                w = p * (_product_tangent(q_t, k_t, q_dot_t, k_dot_t, ACC) * SCALE)
                total_dot += tl.sum(w, 1)
                acc_dot = _dot(w.to(v_t.dtype), v_t, acc_dot)
            if v_dot is not None:
                acc_dot = _dot(p.to(v_t.dtype), v_dot_t, acc_dot)
        largest = larger

    o_t = acc / total[:, None]
    _store(o, o_t, index, first, num_queries, H, BLOCK_Q, BLOCK_H)
    _store_rows(lse2, largest + tl.log2(total), index, first, num_queries, BLOCK_Q)
    if TANGENT:
        mean = total_dot / total
        o_dot_t = acc_dot / total[:, None] - mean[:, None] * o_t
        _store(o_dot, o_dot_t, index, first, num_queries, H, BLOCK_Q, BLOCK_H)
        _store_rows(lse_dot, mean, index, first, num_queries, BLOCK_Q)


@triton.jit
def _tangent_kernel(
    q,
    k,
    v,
    bias,
    o,
    lse2,
    q_dot,
    k_dot,
    v_dot,
    o_dot,
    lse_dot,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    o_strides,
    q_dot_strides,
    k_dot_strides,
    v_dot_strides,
    num_heads,
    num_queries,
    num_keys,
    SCALE: tl.constexpr,
    ACC: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RAGGED_Q: tl.constexpr,
    RAGGED_K: tl.constexpr,
):
    """Tangent of a block of queries whose value is known: no maximum, no rescaling, no p v."""
    num_blocks = (num_queries + BLOCK_Q - 1) // BLOCK_Q
    index = tl.program_id(0) // num_blocks
    first = (tl.program_id(0) % num_blocks) * BLOCK_Q

    q_head = _head(q, q_strides, index, num_heads)
    k_head = _head(k, k_strides, index, num_heads)
    v_head = _head(v, v_strides, index, num_heads)
    o_head = _head(o, o_strides, index, num_heads)
    q_dot_head = _head(q_dot, q_dot_strides, index, num_heads)
    k_dot_head = _head(k_dot, k_dot_strides, index, num_heads)
    v_dot_head = _head(v_dot, v_dot_strides, index, num_heads)

    q_t = _load(q_head, q_strides, first, num_queries, H, BLOCK_Q, BLOCK_H, RAGGED_Q)
    q_dot_t = _load(q_dot_head, q_dot_strides, first, num_queries, H, BLOCK_Q, BLOCK_H, RAGGED_Q)
    lse2_t = _load_rows(lse2, index, first, num_queries, BLOCK_Q, RAGGED_Q, float("inf"))
    mean = tl.full((BLOCK_Q,), 0.0, ACC)
    acc_dot = tl.full((BLOCK_Q, BLOCK_H), 0.0, ACC)

    for start in range(0, num_keys, BLOCK_K):
        k_t = _load(k_head, k_strides, start, num_keys, H, BLOCK_K, BLOCK_H, RAGGED_K)
        s = _product(q_t, k_t, ACC) * (SCALE * LOG2E)
        offset = _key_offset(
            bias, bias_strides, index // num_heads, start, num_keys, BLOCK_K, RAGGED_K, ACC
        )
        if offset is not None:
            s += offset[None, :]
        p = tl.exp2(s - lse2_t[:, None])
        if q_dot is not None or k_dot is not None:
            v_t = _load(v_head, v_strides, start, num_keys, H, BLOCK_K, BLOCK_H, RAGGED_K)
            k_dot_t = _load(
                k_dot_head, k_dot_strides, start, num_keys, H, BLOCK_K, BLOCK_H, RAGGED_K
            )
            w = p * (_product_tangent(q_t, k_t, q_dot_t, k_dot_t, ACC) * SCALE)
            mean += tl.sum(w, 1)
            acc_dot = _dot(w.to(v_t.dtype), v_t, acc_dot)
        if v_dot is not None:
            v_dot_t = _load(
                v_dot_head, v_dot_strides, start, num_keys, H, BLOCK_K, BLOCK_H, RAGGED_K
            )
            acc_dot = _dot(p.to(v_dot_t.dtype), v_dot_t, acc_dot)

    o_t = _load(o_head, o_strides, first, num_queries, H, BLOCK_Q, BLOCK_H, RAGGED_Q)
    o_dot_t = acc_dot - mean[:, None] * o_t.to(ACC)
    _store(o_dot, o_dot_t, index, first, num_queries, H, BLOCK_Q, BLOCK_H)
    _store_rows(lse_dot, mean, index, first, num_queries, BLOCK_Q)


@triton.jit
def _row_dot_kernel(
    a,
    b,
    c,
    e,
    out,
    a_strides,
    b_strides,
    c_strides,
    e_strides,
    num_heads,
    num_queries,
    ACC: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """Sums over the head of a b, plus c e where they are given."""
    num_blocks = (num_queries + BLOCK_Q - 1) // BLOCK_Q
    index = tl.program_id(0) // num_blocks
    first = (tl.program_id(0) % num_blocks) * BLOCK_Q
    a_head = _head(a, a_strides, index, num_heads)
    b_head = _head(b, b_strides, index, num_heads)
    c_head = _head(c, c_strides, index, num_heads)
    e_head = _head(e, e_strides, index, num_heads)
    a_t = _load(a_head, a_strides, first, num_queries, H, BLOCK_Q, BLOCK_H, True)
    b_t = _load(b_head, b_strides, first, num_queries, H, BLOCK_Q, BLOCK_H, True)
    total = tl.sum(a_t.to(ACC) * b_t.to(ACC), 1)
    if c is not None:
        c_t = _load(c_head, c_strides, first, num_queries, H, BLOCK_Q, BLOCK_H, True)
        e_t = _load(e_head, e_strides, first, num_queries, H, BLOCK_Q, BLOCK_H, True)
        total += tl.sum(c_t.to(ACC) * e_t.to(ACC), 1)
    _store_rows(out, total, index, first, num_queries, BLOCK_Q)


@triton.jit
def _q_bar_kernel(
    q,
    k,
    v,
    bias,
    lse2,
    D,
    o_bar,
    q_dot,
    k_dot,
    v_dot,
    o_bar_dot,
    lse_dot,
    D_dot,
    out,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    o_bar_strides,
    q_dot_strides,
    k_dot_strides,
    v_dot_strides,
    o_bar_dot_strides,
    num_heads,
    num_queries,
    num_keys,
    SCALE: tl.constexpr,
    TANGENT: tl.constexpr,
    ACC: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RAGGED_Q: tl.constexpr,
    RAGGED_K: tl.constexpr,
):
    """q_bar of a block of queries, or with TANGENT q_bar_dot: a sum over keys."""
    num_blocks = (num_queries + BLOCK_Q - 1) // BLOCK_Q
    index = tl.program_id(0) // num_blocks
    first = (tl.program_id(0) % num_blocks) * BLOCK_Q

    q_head = _head(q, q_strides, index, num_heads)
    k_head = _head(k, k_strides, index, num_heads)
    v_head = _head(v, v_strides, index, num_heads)
    o_bar_head = _head(o_bar, o_bar_strides, index, num_heads)
    q_t = _load(q_head, q_strides, first, num_queries, H, BLOCK_Q, BLOCK_H, RAGGED_Q)
    o_bar_t = _load(o_bar_head, o_bar_strides, first, num_queries, H, BLOCK_Q, BLOCK_H, RAGGED_Q)
    # An infinite lse makes every weight of a row beyond the end zero.
    lse2_t = _load_rows(lse2, index, first, num_queries, BLOCK_Q, RAGGED_Q, float("inf"))
    D_t = _load_rows(D, index, first, num_queries, BLOCK_Q, RAGGED_Q, 0.0)
    if TANGENT:
        q_dot_head = _head(q_dot, q_dot_strides, index, num_heads)
        k_dot_head = _head(k_dot, k_dot_strides, index, num_heads)
        v_dot_head = _head(v_dot, v_dot_strides, index, num_heads)
        o_bar_dot_head = _head(o_bar_dot, o_bar_dot_strides, index, num_heads)
        q_dot_t = _load(
            q_dot_head, q_dot_strides, first, num_queries, H, BLOCK_Q, BLOCK_H, RAGGED_Q
        )
        o_bar_dot_t = _load(
            o_bar_dot_head, o_bar_dot_strides, first, num_queries, H, BLOCK_Q, BLOCK_H, RAGGED_Q
        )
        lse_dot_t = _load_rows(lse_dot, index, first, num_queries, BLOCK_Q, RAGGED_Q, 0.0)
        D_dot_t = _load_rows(D_dot, index, first, num_queries, BLOCK_Q, RAGGED_Q, 0.0)
    acc = tl.full((BLOCK_Q, BLOCK_H), 0.0, ACC)

    for start in range(0, num_keys, BLOCK_K):
        k_t = _load(k_head, k_strides, start, num_keys, H, BLOCK_K, BLOCK_H, RAGGED_K)
        v_t = _load(v_head, v_strides, start, num_keys, H, BLOCK_K, BLOCK_H, RAGGED_K)
        s = _product(q_t, k_t, ACC) * (SCALE * LOG2E)
        offset = _key_offset(
            bias, bias_strides, index // num_heads, start, num_keys, BLOCK_K, RAGGED_K, ACC
        )
        if offset is not None:
            s += offset[None, :]
        p = tl.exp2(s - lse2_t[:, None])
        s_bar = p * (_product(o_bar_t, v_t, ACC) - D_t[:, None])
        if TANGENT:
            k_dot_t = _load(
                k_dot_head, k_dot_strides, start, num_keys, H, BLOCK_K, BLOCK_H, RAGGED_K
            )
            v_dot_t = _load(
                v_dot_head, v_dot_strides, start, num_keys, H, BLOCK_K, BLOCK_H, RAGGED_K
            )
            p_bar_dot = _product_tangent(o_bar_t, v_t, o_bar_dot_t, v_dot_t, ACC)
            s_bar_dot = p * (p_bar_dot - D_dot_t[:, None])
            if q_dot is not None or k_dot is not None:
                s_dot = _product_tangent(q_t, k_t, q_dot_t, k_dot_t, ACC) * SCALE
                s_bar_dot += s_bar * (s_dot - lse_dot_t[:, None])
            acc = _dot(s_bar_dot.to(k_t.dtype), k_t, acc)
            if k_dot is not None:
                acc = _dot(s_bar.to(k_t.dtype), k_dot_t, acc)
        else:
            acc = _dot(s_bar.to(k_t.dtype), k_t, acc)

    _store(out, acc * SCALE, index, first, num_queries, H, BLOCK_Q, BLOCK_H)


@triton.jit
def _kv_bar_kernel(
    q,
    k,
    v,
    bias,
    lse2,
    D,
    o_bar,
    q_dot,
    k_dot,
    v_dot,
    o_bar_dot,
    lse_dot,
    D_dot,
    k_out,
    v_out,
    q_strides,
    k_strides,
    v_strides,
    bias_strides,
    o_bar_strides,
    q_dot_strides,
    k_dot_strides,
    v_dot_strides,
    o_bar_dot_strides,
    num_heads,
    num_queries,
    num_keys,
    SCALE: tl.constexpr,
    TANGENT: tl.constexpr,
    ACC: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RAGGED_Q: tl.constexpr,
    RAGGED_K: tl.constexpr,
):
    """k_bar and v_bar of a block of keys, or with TANGENT their tangents: sums over queries.

    All tiles of weights are transposed, keys by queries, so that they are left operands as built.
    """
    num_blocks = (num_keys + BLOCK_K - 1) // BLOCK_K
    index = tl.program_id(0) // num_blocks
    first = (tl.program_id(0) % num_blocks) * BLOCK_K

    q_head = _head(q, q_strides, index, num_heads)
    k_head = _head(k, k_strides, index, num_heads)
    v_head = _head(v, v_strides, index, num_heads)
    o_bar_head = _head(o_bar, o_bar_strides, index, num_heads)
    k_t = _load(k_head, k_strides, first, num_keys, H, BLOCK_K, BLOCK_H, RAGGED_K)
    v_t = _load(v_head, v_strides, first, num_keys, H, BLOCK_K, BLOCK_H, RAGGED_K)
    offset = _key_offset(
        bias, bias_strides, index // num_heads, first, num_keys, BLOCK_K, RAGGED_K, ACC
    )
    if TANGENT:
        q_dot_head = _head(q_dot, q_dot_strides, index, num_heads)
        k_dot_head = _head(k_dot, k_dot_strides, index, num_heads)
        v_dot_head = _head(v_dot, v_dot_strides, index, num_heads)
        o_bar_dot_head = _head(o_bar_dot, o_bar_dot_strides, index, num_heads)
        k_dot_t = _load(k_dot_head, k_dot_strides, first, num_keys, H, BLOCK_K, BLOCK_H, RAGGED_K)
        v_dot_t = _load(v_dot_head, v_dot_strides, first, num_keys, H, BLOCK_K, BLOCK_H, RAGGED_K)
    k_acc = tl.full((BLOCK_K, BLOCK_H), 0.0, ACC)
    v_acc = tl.full((BLOCK_K, BLOCK_H), 0.0, ACC)

    for start in range(0, num_queries, BLOCK_Q):
        q_t = _load(q_head, q_strides, start, num_queries, H, BLOCK_Q, BLOCK_H, RAGGED_Q)
        o_bar_t = _load(
            o_bar_head, o_bar_strides, start, num_queries, H, BLOCK_Q, BLOCK_H, RAGGED_Q
        )
        lse2_t = _load_rows(lse2, index, start, num_queries, BLOCK_Q, RAGGED_Q, float("inf"))
        D_t = _load_rows(D, index, start, num_queries, BLOCK_Q, RAGGED_Q, 0.0)
        s = _product(k_t, q_t, ACC) * (SCALE * LOG2E)
        if offset is not None:
            s += offset[:, None]
        p = tl.exp2(s - lse2_t[None, :])
        s_bar = p * (_product(v_t, o_bar_t, ACC) - D_t[None, :])
        if TANGENT:
            q_dot_t = _load(
                q_dot_head, q_dot_strides, start, num_queries, H, BLOCK_Q, BLOCK_H, RAGGED_Q
            )
            o_bar_dot_t = _load(
                o_bar_dot_head, o_bar_dot_strides, start, num_queries, H, BLOCK_Q, BLOCK_H, RAGGED_Q
            )
            D_dot_t = _load_rows(D_dot, index, start, num_queries, BLOCK_Q, RAGGED_Q, 0.0)
            p_bar_dot = _product_tangent(v_t, o_bar_t, v_dot_t, o_bar_dot_t, ACC)
            s_bar_dot = p * (p_bar_dot - D_dot_t[None, :])
            if q_dot is not None or k_dot is not None:
                lse_dot_t = _load_rows(lse_dot, index, start, num_queries, BLOCK_Q, RAGGED_Q, 0.0)
                s_dot = _product_tangent(k_t, q_t, k_dot_t, q_dot_t, ACC) * SCALE
                s_dot -= lse_dot_t[None, :]
                s_bar_dot += s_bar * s_dot
                v_acc = _dot((p * s_dot).to(q_t.dtype), o_bar_t, v_acc)
            if o_bar_dot is not None:
                v_acc = _dot(p.to(q_t.dtype), o_bar_dot_t, v_acc)
            k_acc = _dot(s_bar_dot.to(q_t.dtype), q_t, k_acc)
            if q_dot is not None:
                k_acc = _dot(s_bar.to(q_t.dtype), q_dot_t, k_acc)
        else:
            v_acc = _dot(p.to(q_t.dtype), o_bar_t, v_acc)
            k_acc = _dot(s_bar.to(q_t.dtype), q_t, k_acc)

    _store(k_out, k_acc * SCALE, index, first, num_keys, H, BLOCK_K, BLOCK_H)
    _store(v_out, v_acc, index, first, num_keys, H, BLOCK_K, BLOCK_H)


def _stat_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _empty(like: Tensor, shape: tuple[int, ...] | None = None, stat: bool = False) -> Tensor:
    """Return contiguous memory; `empty_like` would keep the strides of a view."""
    return torch.empty(
        like.shape if shape is None else shape,
        dtype=_stat_dtype(like) if stat else like.dtype,
        device=like.device,
    )


def _strides(*tensors: Tensor | None) -> list[tuple[int, ...]]:
    return [(0, 0, 0, 0) if x is None else x.stride() for x in tensors]


def _check_like(expected: Tensor, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and (x.shape != expected.shape or x.dtype != expected.dtype):
            raise ValueError(
                f"{name}: expected {tuple(expected.shape)} of {expected.dtype}, got "
                f"{tuple(x.shape)} of {x.dtype}; pass a tensor like the one it belongs to"
            )


def _check_rows(q: Tensor, **rows: Tensor | None) -> None:
    for name, x in rows.items():
        if x is not None and not (
            x.shape == q.shape[:3] and x.dtype == _stat_dtype(q) and x.is_contiguous()
        ):
            raise ValueError(
                f"{name}: expected contiguous {tuple(q.shape[:3])} of {_stat_dtype(q)}, got "
                f"{tuple(x.shape)} of {x.dtype}; pass the row statistic as an operator returned it"
            )


def _is_empty(q: Tensor, k: Tensor) -> bool:
    return q.numel() == 0 or k.numel() == 0


def _block_H(x: Tensor) -> int:
    return max(16, triton.next_power_of_2(x.shape[-1]))


def _constants(kernel: str, q: Tensor, k: Tensor, scale: float, by_keys: bool = False) -> dict:
    """Return the compile-time arguments of a kernel that owns queries, or keys."""
    head_size = q.shape[-1]
    block_H = _block_H(q)
    tiles = _tiles(kernel, q.dtype, block_H)
    block_Q, block_K = (tiles.visited, tiles.owned) if by_keys else (tiles.owned, tiles.visited)
    return {
        "SCALE": scale,
        "ACC": _accumulator(q),
        "H": head_size,
        "BLOCK_H": block_H,
        "BLOCK_Q": block_Q,
        "BLOCK_K": block_K,
        "RAGGED_Q": q.shape[2] % block_Q != 0,
        "RAGGED_K": k.shape[2] % block_K != 0,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _launch(kernel, like: Tensor, length: int, block: int, *args, **constants) -> None:
    grid = (like.shape[0] * like.shape[1] * triton.cdiv(length, block),)
    with torch.cuda.device_of(like):
        kernel[grid](*args, **constants)


def _run_forward(q, k, v, key_bias, q_dot, k_dot, v_dot, scale, tangent):
    """Fill (o, lse2), and with `tangent` (o_dot, lse_dot)."""
    _check_like(q, q_dot=q_dot)
    _check_like(k, v=v, k_dot=k_dot, v_dot=v_dot)
    outputs = (_empty(q), _empty(q, q.shape[:3], stat=True))
    if tangent:
        outputs += (_empty(q), _empty(q, q.shape[:3], stat=True))
    if _is_empty(q, k):
        # The mean of no values is zero, as that of an empty matrix product.
        outputs[1].fill_(-math.inf)
        for x in outputs[:1] + outputs[2:]:
            x.zero_()
        return outputs
    constants = _constants("forward_tangent" if tangent else "forward", q, k, scale)
    inputs = (q, k, v, key_bias, q_dot, k_dot, v_dot)
    _launch(
        _forward_kernel,
        q,
        q.shape[2],
        constants["BLOCK_Q"],
        *inputs,
        *(outputs if tangent else (*outputs, None, None)),
        *_strides(*inputs),
        q.shape[1],
        q.shape[2],
        k.shape[2],
        TANGENT=tangent,
        **constants,
    )
    return outputs


def _run_backward(q, k, v, key_bias, lse2, D, o_bar, dots, rows_dot, scale, tangent):
    """Fill (q_bar, k_bar, v_bar), or with `tangent` their tangents."""
    outputs = _empty(q), _empty(k), _empty(v)
    if _is_empty(q, k):
        return tuple(x.zero_() for x in outputs)
    inputs = (q, k, v, key_bias, lse2, D, o_bar, *dots, *rows_dot)
    strides = _strides(q, k, v, key_bias, o_bar, *dots)
    sizes = (q.shape[1], q.shape[2], k.shape[2])
    name = "bar_tangent" if tangent else "bar"
    constants = _constants(f"q_{name}", q, k, scale)
    _launch(
        _q_bar_kernel,
        q,
        q.shape[2],
        constants["BLOCK_Q"],
        *inputs,
        outputs[0],
        *strides,
        *sizes,
        TANGENT=tangent,
        **constants,
    )
    constants = _constants(f"kv_{name}", q, k, scale, by_keys=True)
    _launch(
        _kv_bar_kernel,
        q,
        k.shape[2],
        constants["BLOCK_K"],
        *inputs,
        *outputs[1:],
        *strides,
        *sizes,
        TANGENT=tangent,
        **constants,
    )
    return outputs


def _run_row_dot(a, b, c=None, e=None):
    out = _empty(a, a.shape[:3], stat=True)
    if a.numel() == 0:
        return out.zero_()
    inputs = (a, b, c, e)
    _launch(
        _row_dot_kernel,
        a,
        a.shape[2],
        ROW_DOT_ROWS,
        *inputs,
        out,
        *_strides(*inputs),
        a.shape[1],
        a.shape[2],
        ACC=_accumulator(a),
        H=a.shape[-1],
        BLOCK_H=_block_H(a),
        BLOCK_Q=ROW_DOT_ROWS,
    )
    return out


@torch.library.custom_op("ispen::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute attention and its row statistic.

    Args:
        q: (B, N, T, H).
        k: (B, N, S, H).
        v: (B, N, S, H).
        key_bias: (B, S), added to the scores; finite.
        scale: factor of the scores, compiled into the kernel.

    Returns:
        o (B, N, T, H) and lse2 (B, N, T), the log-sum-exp of the scores in base 2.
    """
    return _run_forward(q, k, v, key_bias, None, None, None, scale, False)


@attention_forward.register_fake
def _(q, k, v, key_bias, scale):
    return _empty(q), _empty(q, q.shape[:3], stat=True)


@torch.library.custom_op("ispen::attention_forward_tangent", mutates_args=())
def attention_forward_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute value and tangent in one pass; a direction that is None is zero.

    Returns:
        o and lse2 as `attention_forward`, o_dot (B, N, T, H), and lse_dot (B, N, T), the tangent of
        the natural log-sum-exp.
    """
    return _run_forward(q, k, v, key_bias, q_dot, k_dot, v_dot, scale, True)


@attention_forward_tangent.register_fake
def _(q, k, v, key_bias, q_dot, k_dot, v_dot, scale):
    rows = q.shape[:3]
    return _empty(q), _empty(q, rows, stat=True), _empty(q), _empty(q, rows, stat=True)


@torch.library.custom_op("ispen::attention_tangent", mutates_args=())
def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    o: Tensor,
    lse2: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Compute (o_dot, lse_dot) where o and lse2 are known; a direction that is None is zero."""
    _check_like(q, o=o, q_dot=q_dot)
    _check_like(k, v=v, k_dot=k_dot, v_dot=v_dot)
    _check_rows(q, lse2=lse2)
    o_dot, lse_dot = _empty(q), _empty(q, q.shape[:3], stat=True)
    if _is_empty(q, k):
        return o_dot.zero_(), lse_dot.zero_()
    constants = _constants("tangent", q, k, scale)
    _launch(
        _tangent_kernel,
        q,
        q.shape[2],
        constants["BLOCK_Q"],
        *(q, k, v, key_bias, o, lse2, q_dot, k_dot, v_dot, o_dot, lse_dot),
        *_strides(q, k, v, key_bias, o, q_dot, k_dot, v_dot),
        q.shape[1],
        q.shape[2],
        k.shape[2],
        **constants,
    )
    return o_dot, lse_dot


@attention_tangent.register_fake
def _(q, k, v, key_bias, o, lse2, q_dot, k_dot, v_dot, scale):
    return _empty(q), _empty(q, q.shape[:3], stat=True)


@torch.library.custom_op("ispen::attention_row_dot", mutates_args=())
def attention_row_dot(
    a: Tensor, b: Tensor, c: Tensor | None = None, e: Tensor | None = None
) -> Tensor:
    """Sum a b, plus c e where given, over the head: (B, N, T, H) to the row statistic (B, N, T).

    D is `attention_row_dot(o_bar, o)`, and D_dot `attention_row_dot(o_bar, o_dot, o_bar_dot, o)`.
    """
    _check_like(a, b=b, c=c, e=e)
    return _run_row_dot(a, b, c, e)


@attention_row_dot.register_fake
def _(a, b, c=None, e=None):
    return _empty(a, a.shape[:3], stat=True)


@torch.library.custom_op("ispen::attention_backward", mutates_args=())
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    o: Tensor,
    lse2: Tensor,
    o_bar: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (q_bar, k_bar, v_bar) from o_bar (B, N, T, H)."""
    _check_like(q, o=o, o_bar=o_bar)
    _check_like(k, v=v)
    _check_rows(q, lse2=lse2)
    D = _run_row_dot(o_bar, o)
    nothing = (None,) * 4, (None,) * 2
    return _run_backward(q, k, v, key_bias, lse2, D, o_bar, *nothing, scale, False)


@attention_backward.register_fake
def _(q, k, v, key_bias, o, lse2, o_bar, scale):
    return _empty(q), _empty(k), _empty(v)


@torch.library.custom_op("ispen::attention_backward_tangent", mutates_args=())
def attention_backward_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    lse2: Tensor,
    D: Tensor,
    o_bar: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    o_bar_dot: Tensor | None,
    lse_dot: Tensor,
    D_dot: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (q_bar_dot, k_bar_dot, v_bar_dot); a direction that is None is zero.

    lse_dot is that of `attention_tangent` in the same direction; D and D_dot come from
    `attention_row_dot`.
    """
    _check_like(q, o_bar=o_bar, q_dot=q_dot, o_bar_dot=o_bar_dot)
    _check_like(k, v=v, k_dot=k_dot, v_dot=v_dot)
    _check_rows(q, lse2=lse2, D=D, lse_dot=lse_dot, D_dot=D_dot)
    dots, rows_dot = (q_dot, k_dot, v_dot, o_bar_dot), (lse_dot, D_dot)
    return _run_backward(q, k, v, key_bias, lse2, D, o_bar, dots, rows_dot, scale, True)


@attention_backward_tangent.register_fake
def _(q, k, v, key_bias, lse2, D, o_bar, q_dot, k_dot, v_dot, o_bar_dot, lse_dot, D_dot, scale):
    return _empty(q), _empty(k), _empty(v)


def _no_derivative(ctx, *gradients):
    raise NotImplementedError(BEYOND)


# Without this PyTorch would say only that no formula was registered. Forward mode reaches no
# operator: PyTorch drops tangents at them, which is why `attention` never hands them any.
for _operator in (
    attention_forward_tangent,
    attention_tangent,
    attention_row_dot,
    attention_backward,
    attention_backward_tangent,
):
    _operator.register_autograd(_no_derivative)


class Attention(torch.autograd.Function):
    """(q, k, v) to (o, lse2); lse2 counts as a constant. Differentiable to order 2."""

    @staticmethod
    def forward(q, k, v, key_bias, scale):
        """Return o and lse2."""
        return attention_forward(q, k, v, key_bias, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep the point and its row statistic: linear memory."""
        *point, ctx.scale = inputs
        o, lse2 = output
        ctx.mark_non_differentiable(lse2)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*point, o, lse2)
        ctx.save_for_forward(*point, o, lse2)

    @staticmethod
    def backward(ctx, o_bar, _):
        """Return the adjoint, itself differentiable."""
        if o_bar is None:
            return (None,) * 5
        return *AttentionBackward.apply(*ctx.saved_tensors, o_bar, ctx.scale), None, None

    @staticmethod
    def jvp(ctx, q_dot, k_dot, v_dot, *_):
        """Return o_dot."""
        dots = q_dot, k_dot, v_dot
        o_dot, _ = AttentionTangent.apply(*ctx.saved_tensors, *dots, ctx.scale)
        return o_dot, None


# Compiled code sees the operator in place of the function: dynamo refuses functions with a `jvp`.
attention_forward.register_autograd(Attention.backward, setup_context=Attention.setup_context)


class AttentionTangent(torch.autograd.Function):
    """(q, k, v), a direction, and what is known at the point, to (o_dot, lse_dot).

    Its reverse mode exists (order 2 in all), its forward mode raises.
    """

    @staticmethod
    def forward(q, k, v, key_bias, o, lse2, q_dot, k_dot, v_dot, scale):
        """Return o_dot and lse_dot."""
        return attention_tangent(q, k, v, key_bias, o, lse2, q_dot, k_dot, v_dot, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep everything; lse_dot counts as a constant."""
        *point, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*point)

    @staticmethod
    def backward(ctx, o_dot_bar, _):
        """Return the transposed second derivative for the point, the adjoint for the direction."""
        if o_dot_bar is None:
            return (None,) * 10
        *point, q_dot, k_dot, v_dot = ctx.saved_tensors
        dots = q_dot, k_dot, v_dot, None
        _, *bars_dot = AttentionSecond.apply(*point, o_dot_bar, *dots, ctx.scale)
        bars = AttentionBackward.apply(*point, o_dot_bar, ctx.scale)
        bars = (None if d is None else bar for d, bar in zip(dots, bars, strict=False))
        return *bars_dot, None, None, None, *bars, None

    @staticmethod
    def jvp(ctx, *dots):
        """Raise: forward over forward is not provided."""
        raise NotImplementedError(
            "attention: expected at most one forward-mode derivative, got two; take one of them in "
            "reverse mode, or use attention_reference"
        )


class AttentionBackward(torch.autograd.Function):
    """(q, k, v, o_bar), and what is known at the point, to (q_bar, k_bar, v_bar).

    Its own derivative is the second one of attention, and the last.
    """

    @staticmethod
    def forward(q, k, v, key_bias, o, lse2, o_bar, scale):
        """Return q_bar, k_bar and v_bar."""
        return attention_backward(q, k, v, key_bias, o, lse2, o_bar, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep all inputs."""
        *point, ctx.scale = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*point)
        ctx.save_for_forward(*point)

    @staticmethod
    def backward(ctx, u_q, u_k, u_v):
        """Return tangents in direction u, by the symmetry of the second derivative."""
        if u_q is None and u_k is None and u_v is None:
            return (None,) * 8
        u = u_q, u_k, u_v, None
        o_dot, *bars_dot = AttentionSecond.apply(*ctx.saved_tensors, *u, ctx.scale)
        return *bars_dot, None, None, None, o_dot, None

    @staticmethod
    def jvp(ctx, q_dot, k_dot, v_dot, key_bias_dot, o_dot, lse2_dot, o_bar_dot, *_):
        """Return the tangents of q_bar, k_bar and v_bar; that of o is computed, not read."""
        dots = q_dot, k_dot, v_dot, o_bar_dot
        return AttentionSecond.apply(*ctx.saved_tensors, *dots, ctx.scale)[1:]


class AttentionSecond(torch.autograd.Function):
    """Directions (q_dot, k_dot, v_dot, o_bar_dot) to (o_dot, q_bar_dot, k_bar_dot, v_bar_dot).

    Already the second derivative: its own derivatives raise.
    """

    @staticmethod
    def forward(q, k, v, key_bias, o, lse2, o_bar, q_dot, k_dot, v_dot, o_bar_dot, scale):
        """Return the tangents of value and adjoint."""
        point, dots = (q, k, v, key_bias), (q_dot, k_dot, v_dot)
        o_dot, lse_dot = attention_tangent(*point, o, lse2, *dots, scale)
        D = attention_row_dot(o_bar, o)
        if o_bar_dot is None:
            D_dot = attention_row_dot(o_bar, o_dot)
        else:
            D_dot = attention_row_dot(o_bar, o_dot, o_bar_dot, o)
        rows_dot = lse_dot, D_dot
        bars_dot = attention_backward_tangent(
            *point, lse2, D, o_bar, *dots, o_bar_dot, *rows_dot, scale
        )
        return o_dot, *bars_dot

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keep nothing: there is no next derivative."""

    backward = staticmethod(_no_derivative)
    jvp = staticmethod(_no_derivative)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute what `attention` computes, in plain PyTorch: the specification.

    Takes the same arguments, needs memory for T x S scores, and is differentiable to any order.
    """
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if key_bias is not None:
        scores = scores + key_bias.detach().to(scores.dtype)[:, None, None, :]
    return torch.softmax(scores, dim=-1) @ v


def supports(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tell whether the kernels can run on these tensors, shapes being right.

    They need a head size of at most 128, and either a GPU and bfloat16, float16 or float32, or
    the interpreter of Triton (`TRITON_INTERPRET=1` before the first import), which also takes
    float64.
    """
    dtypes = (*DTYPES, torch.float64) if INTERPRETED else DTYPES
    return all(
        x.dtype in dtypes
        and x.dtype == q.dtype
        and x.device == q.device
        and (x.is_cuda or INTERPRETED)
        and MIN_HEAD_SIZE <= x.shape[-1] <= MAX_HEAD_SIZE
        for x in (q, k, v)
    )


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> None:
    shapes = f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape
    if not fits or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q, k, v: expected (B, N, T, H), (B, N, S, H), (B, N, S, H), {shapes}; "
            "split heads and put them before tokens"
        )
    if not supports(q, k, v):
        dtypes, devices = (sorted({str(getattr(x, name)) for x in (q, k, v)}) for name in KINDS)
        raise ValueError(
            f"q, k, v: expected one dtype of {[str(x) for x in DTYPES]} on one GPU and a head size "
            f"up to {MAX_HEAD_SIZE}, got {dtypes} on {devices} and head size {q.shape[3]}; convert "
            "them, use attention_reference, or set TRITON_INTERPRET=1 before the first import"
        )
    if key_bias is not None and not (
        key_bias.shape == (q.shape[0], k.shape[2])
        and key_bias.is_floating_point()
        and key_bias.device == q.device
    ):
        raise ValueError(
            f"key_bias: expected (B, S) = {(q.shape[0], k.shape[2])} of a floating type on "
            f"{q.device}, got {tuple(key_bias.shape)} of {key_bias.dtype} on {key_bias.device}; "
            "pass 0 at tokens and -1e4 at padding"
        )


def _is_transformed() -> bool:
    """Tell whether forward mode or a transform of torch.func is active, also while compiling."""
    level = torch._C._functorch.maybe_current_level()
    return level is not None or forward_ad._current_level >= 0


@torch.compiler.disable
def _apply(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, scale: float) -> Tensor:
    # Dynamo may skip the function and trace its forward alone, whose tangents are lost: a wrong
    # zero. A break in the graph is slower and right.
    return Attention.apply(q, k, v, key_bias, scale)[0]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend: softmax(scale q k^T + key_bias) v, without ever holding the scores.

    Differentiable to order 2 in q, k and v (reverse over reverse, forward over reverse, reverse
    over forward); the third derivative, and forward over forward, raise NotImplementedError. Inside
    torch.compile it is one operator, also in the gradient; transforms of torch.func there break the
    graph. Compile a second derivative from a trace by make_fx.

    Args:
        q: queries (B, N, T, H), any strides, H up to 128.
        k: keys (B, N, S, H).
        v: values (B, N, S, H).
        key_bias: (B, S), added to the scores of every query and head: 0 at tokens, a large
            negative finite number at padding. A constant: it gets no gradient. A row may be all
            padding; its weights are then those without a bias.
        scale: factor of the scores, 1 / sqrt(H) by default. It is compiled into the kernel.

    Returns:
        (B, N, T, H), contiguous, in the dtype of q; zeros where there are no keys.

    Raises:
        ValueError: for shapes, dtypes or devices the kernels do not take.
    """
    _check_inputs(q, k, v, key_bias)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if key_bias is not None:
        key_bias = key_bias.detach()
        if key_bias.shape[1]:
            key_bias = key_bias - key_bias.amax(-1, keepdim=True)
    if torch.compiler.is_compiling() and not _is_transformed():
        return attention_forward(q, k, v, key_bias, scale)[0]
    return _apply(q, k, v, key_bias, scale)
