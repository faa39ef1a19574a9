"""The value of attention and its tangent, as kernels and as operators. Formulas: `attention.py`.

Each program owns a block of queries and visits all keys. The value is known only up to the largest
score so far, so what is summed is rescaled on the way; the tangent of a value that is known has
each weight at once.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ispen_kernels.attention_launch import (
    check_like,
    check_statistics,
    cut,
    is_empty,
    launch_heads,
    operands,
    statistic_of,
)
from ispen_kernels.attention_tiles import (
    add_offset,
    dot,
    head,
    key_offset,
    load,
    load_statistic,
    owned,
    product_tangent,
    scores,
    store,
    store_statistic,
)
from ispen_kernels.launch import contiguous_like


@triton.jit
def _forward_kernel(
    q, k, v, bias, q_dot, k_dot, v_dot, o, lse2, o_dot, lse_dot, num_heads, queries, keys,
    TANGENT: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Value of a block of queries, and with TANGENT its tangent, in one pass over the keys."""
    index, first = owned(queries)
    k_head = head(k, index, num_heads)
    v_head = head(v, index, num_heads)
    k_dot_head = head(k_dot, index, num_heads)
    v_dot_head = head(v_dot, index, num_heads)

    q_t = load(head(q, index, num_heads), first, queries)
    q_dot_t = load(head(q_dot, index, num_heads), first, queries)
    largest = tl.full((queries.ROWS,), float("-inf"), ACC)
    total = tl.full((queries.ROWS,), 0.0, ACC)
    acc = tl.full((queries.ROWS, queries.BLOCK_H), 0.0, ACC)
    if TANGENT:
        total_dot = tl.full((queries.ROWS,), 0.0, ACC)
        acc_dot = tl.full((queries.ROWS, queries.BLOCK_H), 0.0, ACC)

    for start in range(0, keys.length, keys.ROWS):
        k_t = load(k_head, start, keys)
        v_t = load(v_head, start, keys)
        s = scores(q_t, k_t, SCALE, ACC)
        # After the product: a load before it costs registers.
        s = add_offset(s, key_offset(bias, index // num_heads, start, keys, ACC), 1)
        # Everything summed so far is relative to the largest score so far.
        larger = tl.maximum(largest, tl.max(s, 1))
        shrink = tl.exp2(largest - larger)
        p = tl.exp2(s - larger[:, None])
        total = total * shrink + tl.sum(p, 1)
        acc = dot(p.to(v_t.dtype), v_t, acc * shrink[:, None])
        if TANGENT:
            k_dot_t = load(k_dot_head, start, keys)
            v_dot_t = load(v_dot_head, start, keys)
            acc_dot = acc_dot * shrink[:, None]
            total_dot = total_dot * shrink
            if q_dot_t is not None or k_dot_t is not None:
                w = p * (product_tangent(q_t, k_t, q_dot_t, k_dot_t, ACC) * SCALE)
                total_dot += tl.sum(w, 1)
                acc_dot = dot(w.to(v_t.dtype), v_t, acc_dot)
            if v_dot_t is not None:
                acc_dot = dot(p.to(v_t.dtype), v_dot_t, acc_dot)
        largest = larger

    o_t = acc / total[:, None]
    store(o, o_t, index, first, queries)
    store_statistic(lse2, largest + tl.log2(total), index, first, queries)
    if TANGENT:
        mean = total_dot / total
        store(o_dot, acc_dot / total[:, None] - mean[:, None] * o_t, index, first, queries)
        store_statistic(lse_dot, mean, index, first, queries)


@triton.jit
def _tangent_kernel(
    q, k, v, bias, o, lse2, q_dot, k_dot, v_dot, o_dot, lse_dot, num_heads, queries, keys,
    SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Tangent of a block of queries whose value is known: no maximum, no rescaling, no p v."""
    index, first = owned(queries)
    k_head = head(k, index, num_heads)
    v_head = head(v, index, num_heads)
    k_dot_head = head(k_dot, index, num_heads)
    v_dot_head = head(v_dot, index, num_heads)

    q_t = load(head(q, index, num_heads), first, queries)
    q_dot_t = load(head(q_dot, index, num_heads), first, queries)
    lse2_t = load_statistic(lse2, index, first, queries, float("inf"))
    mean = tl.full((queries.ROWS,), 0.0, ACC)
    acc_dot = tl.full((queries.ROWS, queries.BLOCK_H), 0.0, ACC)

    for start in range(0, keys.length, keys.ROWS):
        k_t = load(k_head, start, keys)
        s = scores(q_t, k_t, SCALE, ACC)
        # After the product: a load before it costs registers.
        s = add_offset(s, key_offset(bias, index // num_heads, start, keys, ACC), 1)
        p = tl.exp2(s - lse2_t[:, None])
        if q_dot is not None or k_dot is not None:
            v_t = load(v_head, start, keys)
            k_dot_t = load(k_dot_head, start, keys)
            w = p * (product_tangent(q_t, k_t, q_dot_t, k_dot_t, ACC) * SCALE)
            mean += tl.sum(w, 1)
            acc_dot = dot(w.to(v_t.dtype), v_t, acc_dot)
        if v_dot is not None:
            v_dot_t = load(v_dot_head, start, keys)
            acc_dot = dot(p.to(v_dot_t.dtype), v_dot_t, acc_dot)

    o_t = load(head(o, index, num_heads), first, queries)
    store(o_dot, acc_dot - mean[:, None] * o_t.to(ACC), index, first, queries)
    store_statistic(lse_dot, mean, index, first, queries)


def _run_forward(q, k, v, key_bias, q_dot, k_dot, v_dot, scale, tangent):
    """Fill (o, lse2), and with `tangent` (o_dot, lse_dot)."""
    check_like(q, q_dot=q_dot)
    check_like(k, v=v, k_dot=k_dot, v_dot=v_dot)
    outputs = [contiguous_like(q), statistic_of(q)]
    outputs_dot = [contiguous_like(q), statistic_of(q)] if tangent else []
    if is_empty(q, k):
        # The mean of no values is zero, as that of an empty matrix product.
        outputs[1].fill_(-math.inf)
        for x in (outputs[0], *outputs_dot):
            x.zero_()
        return *outputs, *outputs_dot
    queries, keys, options = cut("forward_tangent" if tangent else "forward", q, k)
    launch_heads(
        _forward_kernel, q, queries, *operands(q, k, v, key_bias, q_dot, k_dot, v_dot),
        *outputs, *(outputs_dot or (None, None)), q.shape[1], queries, keys,
        SCALE=scale, TANGENT=tangent, **options,
    )  # fmt: skip
    return *outputs, *outputs_dot


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
    return contiguous_like(q), statistic_of(q)


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
    return contiguous_like(q), statistic_of(q), contiguous_like(q), statistic_of(q)


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
    check_like(q, o=o, q_dot=q_dot)
    check_like(k, v=v, k_dot=k_dot, v_dot=v_dot)
    check_statistics(q, lse2=lse2)
    o_dot, lse_dot = contiguous_like(q), statistic_of(q)
    if is_empty(q, k):
        return o_dot.zero_(), lse_dot.zero_()
    queries, keys, options = cut("tangent", q, k)
    launch_heads(
        _tangent_kernel, q, queries,
        *operands(q, k, v, key_bias, o), lse2, *operands(q_dot, k_dot, v_dot),
        o_dot, lse_dot, q.shape[1], queries, keys, SCALE=scale, **options,
    )  # fmt: skip
    return o_dot, lse_dot


@attention_tangent.register_fake
def _(q, k, v, key_bias, o, lse2, q_dot, k_dot, v_dot, scale):
    return contiguous_like(q), statistic_of(q)
