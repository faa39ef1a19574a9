"""The adjoint of attention and its tangent, as kernels and as operators. Formulas: `attention.py`.

q_bar is a sum over keys, k_bar and v_bar are sums over queries: two kernels, each of which owns
what it writes and rebuilds the weights of every tile it visits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ispen_kernels.attention_launch import (
    accumulator,
    check_like,
    check_statistics,
    cut,
    is_empty,
    launch_heads,
    operands,
    rows_of,
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
    product,
    product_tangent,
    scores,
    store,
    store_statistic,
)
from ispen_kernels.launch import contiguous_like

ROW_DOT_ROWS = 32


@triton.jit
def _row_dot_kernel(
    a, b, c, e, out, num_heads, queries, ACC: tl.constexpr
):  # fmt: skip
    """Sums over the head of a b, plus c e where they are given."""
    index, first = owned(queries)
    a_t = load(head(a, index, num_heads), first, queries)
    b_t = load(head(b, index, num_heads), first, queries)
    total = tl.sum(a_t.to(ACC) * b_t.to(ACC), 1)
    if c is not None:
        c_t = load(head(c, index, num_heads), first, queries)
        e_t = load(head(e, index, num_heads), first, queries)
        total += tl.sum(c_t.to(ACC) * e_t.to(ACC), 1)
    store_statistic(out, total, index, first, queries)


@triton.jit
def _q_bar_kernel(
    q, k, v, bias, lse2, D, o_bar, q_dot, k_dot, v_dot, o_bar_dot, lse_dot, D_dot, out,
    num_heads, queries, keys,
    TANGENT: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """q_bar of a block of queries, or with TANGENT q_bar_dot: a sum over keys."""
    index, first = owned(queries)
    k_head = head(k, index, num_heads)
    v_head = head(v, index, num_heads)
    q_t = load(head(q, index, num_heads), first, queries)
    o_bar_t = load(head(o_bar, index, num_heads), first, queries)
    lse2_t = load_statistic(lse2, index, first, queries, float("inf"))
    D_t = load_statistic(D, index, first, queries, 0.0)
    if TANGENT:
        k_dot_head = head(k_dot, index, num_heads)
        v_dot_head = head(v_dot, index, num_heads)
        q_dot_t = load(head(q_dot, index, num_heads), first, queries)
        o_bar_dot_t = load(head(o_bar_dot, index, num_heads), first, queries)
        lse_dot_t = load_statistic(lse_dot, index, first, queries, 0.0)
        D_dot_t = load_statistic(D_dot, index, first, queries, 0.0)
    acc = tl.full((queries.ROWS, queries.BLOCK_H), 0.0, ACC)

    for start in range(0, keys.length, keys.ROWS):
        k_t = load(k_head, start, keys)
        v_t = load(v_head, start, keys)
        s = scores(q_t, k_t, SCALE, ACC)
        # After the product: a load before it costs registers.
        s = add_offset(s, key_offset(bias, index // num_heads, start, keys, ACC), 1)
        p = tl.exp2(s - lse2_t[:, None])
        s_bar = p * (product(o_bar_t, v_t, ACC) - D_t[:, None])
        if TANGENT:
            k_dot_t = load(k_dot_head, start, keys)
            v_dot_t = load(v_dot_head, start, keys)
            p_bar_dot = product_tangent(o_bar_t, v_t, o_bar_dot_t, v_dot_t, ACC)
            s_bar_dot = p * (p_bar_dot - D_dot_t[:, None])
            if q_dot is not None or k_dot is not None:
                s_dot = product_tangent(q_t, k_t, q_dot_t, k_dot_t, ACC) * SCALE
                s_bar_dot += s_bar * (s_dot - lse_dot_t[:, None])
            acc = dot(s_bar_dot.to(k_t.dtype), k_t, acc)
            if k_dot is not None:
                acc = dot(s_bar.to(k_t.dtype), k_dot_t, acc)
        else:
            acc = dot(s_bar.to(k_t.dtype), k_t, acc)

    store(out, acc * SCALE, index, first, queries)


@triton.jit
def _kv_bar_kernel(
    q, k, v, bias, lse2, D, o_bar, q_dot, k_dot, v_dot, o_bar_dot, lse_dot, D_dot, k_out, v_out,
    num_heads, queries, keys,
    TANGENT: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """k_bar and v_bar of a block of keys, or with TANGENT their tangents: sums over queries.

    All tiles of weights are transposed, keys by queries, so that they are left operands as built.
    """
    index, first = owned(keys)
    q_head = head(q, index, num_heads)
    o_bar_head = head(o_bar, index, num_heads)
    k_t = load(head(k, index, num_heads), first, keys)
    v_t = load(head(v, index, num_heads), first, keys)
    offset = key_offset(bias, index // num_heads, first, keys, ACC)
    if TANGENT:
        q_dot_head = head(q_dot, index, num_heads)
        o_bar_dot_head = head(o_bar_dot, index, num_heads)
        k_dot_t = load(head(k_dot, index, num_heads), first, keys)
        v_dot_t = load(head(v_dot, index, num_heads), first, keys)
    k_acc = tl.full((keys.ROWS, keys.BLOCK_H), 0.0, ACC)
    v_acc = tl.full((keys.ROWS, keys.BLOCK_H), 0.0, ACC)

    for start in range(0, queries.length, queries.ROWS):
        q_t = load(q_head, start, queries)
        o_bar_t = load(o_bar_head, start, queries)
        lse2_t = load_statistic(lse2, index, start, queries, float("inf"))
        D_t = load_statistic(D, index, start, queries, 0.0)
        s = add_offset(scores(k_t, q_t, SCALE, ACC), offset, 0)
        p = tl.exp2(s - lse2_t[None, :])
        s_bar = p * (product(v_t, o_bar_t, ACC) - D_t[None, :])
        if TANGENT:
            q_dot_t = load(q_dot_head, start, queries)
            o_bar_dot_t = load(o_bar_dot_head, start, queries)
            D_dot_t = load_statistic(D_dot, index, start, queries, 0.0)
            p_bar_dot = product_tangent(v_t, o_bar_t, v_dot_t, o_bar_dot_t, ACC)
            s_bar_dot = p * (p_bar_dot - D_dot_t[None, :])
            if q_dot is not None or k_dot is not None:
                lse_dot_t = load_statistic(lse_dot, index, start, queries, 0.0)
                s_dot = product_tangent(k_t, q_t, k_dot_t, q_dot_t, ACC) * SCALE
                s_dot -= lse_dot_t[None, :]
                s_bar_dot += s_bar * s_dot
                v_acc = dot((p * s_dot).to(q_t.dtype), o_bar_t, v_acc)
            if o_bar_dot is not None:
                v_acc = dot(p.to(q_t.dtype), o_bar_dot_t, v_acc)
            k_acc = dot(s_bar_dot.to(q_t.dtype), q_t, k_acc)
            if q_dot is not None:
                k_acc = dot(s_bar.to(q_t.dtype), q_dot_t, k_acc)
        else:
            v_acc = dot(p.to(q_t.dtype), o_bar_t, v_acc)
            k_acc = dot(s_bar.to(q_t.dtype), q_t, k_acc)

    store(k_out, k_acc * SCALE, index, first, keys)
    store(v_out, v_acc, index, first, keys)


def _run_backward(q, k, v, key_bias, lse2, D, o_bar, dots, statistics_dot, scale, tangent):
    """Fill (q_bar, k_bar, v_bar), or with `tangent` their tangents."""
    q_out, k_out, v_out = (contiguous_like(x) for x in (q, k, v))
    if is_empty(q, k):
        return q_out.zero_(), k_out.zero_(), v_out.zero_()
    inputs = (
        *operands(q, k, v, key_bias), lse2, D, *operands(o_bar, *dots), *statistics_dot
    )  # fmt: skip
    name = "bar_tangent" if tangent else "bar"
    queries, keys, options = cut(f"q_{name}", q, k)
    launch_heads(
        _q_bar_kernel, q, queries, *inputs, q_out, q.shape[1], queries, keys,
        SCALE=scale, TANGENT=tangent, **options,
    )  # fmt: skip
    queries, keys, options = cut(f"kv_{name}", q, k, by_keys=True)
    launch_heads(
        _kv_bar_kernel, q, keys, *inputs, k_out, v_out, q.shape[1], queries, keys,
        SCALE=scale, TANGENT=tangent, **options,
    )  # fmt: skip
    return q_out, k_out, v_out


def _run_row_dot(a, b, c=None, e=None):
    out = statistic_of(a)
    if a.numel() == 0:
        return out.zero_()
    queries, ACC = rows_of(a, ROW_DOT_ROWS, ragged=True), accumulator(a)
    launch_heads(
        _row_dot_kernel, a, queries, *operands(a, b, c, e), out, a.shape[1], queries, ACC=ACC
    )
    return out


@torch.library.custom_op("ispen::attention_row_dot", mutates_args=())
def attention_row_dot(
    a: Tensor, b: Tensor, c: Tensor | None = None, e: Tensor | None = None
) -> Tensor:
    """Sum a b, plus c e where given, over the head: (B, N, T, H) to the row statistic (B, N, T).

    D is `attention_row_dot(o_bar, o)`, and D_dot `attention_row_dot(o_bar, o_dot, o_bar_dot, o)`.
    """
    check_like(a, b=b, c=c, e=e)
    return _run_row_dot(a, b, c, e)


@attention_row_dot.register_fake
def _(a, b, c=None, e=None):
    return statistic_of(a)


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
    check_like(q, o=o, o_bar=o_bar)
    check_like(k, v=v)
    check_statistics(q, lse2=lse2)
    D = _run_row_dot(o_bar, o)
    nothing = (None,) * 4, (None,) * 2
    return _run_backward(q, k, v, key_bias, lse2, D, o_bar, *nothing, scale, False)


@attention_backward.register_fake
def _(q, k, v, key_bias, o, lse2, o_bar, scale):
    return contiguous_like(q), contiguous_like(k), contiguous_like(v)


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
    check_like(q, o_bar=o_bar, q_dot=q_dot, o_bar_dot=o_bar_dot)
    check_like(k, v=v, k_dot=k_dot, v_dot=v_dot)
    check_statistics(q, lse2=lse2, D=D, lse_dot=lse_dot, D_dot=D_dot)
    dots, statistics_dot = (q_dot, k_dot, v_dot, o_bar_dot), (lse_dot, D_dot)
    return _run_backward(q, k, v, key_bias, lse2, D, o_bar, dots, statistics_dot, scale, True)


@attention_backward_tangent.register_fake
def _(q, k, v, key_bias, lse2, D, o_bar, q_dot, k_dot, v_dot, o_bar_dot, lse_dot, D_dot, scale):
    return contiguous_like(q), contiguous_like(k), contiguous_like(v)
