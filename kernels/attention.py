"""Softmax attention with first and second derivatives in linear memory, from Triton kernels.

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
The kernels are those of `attention_forward` and `attention_backward`; this file differentiates.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ispen_kernels.attention_backward import (
    attention_backward,
    attention_backward_tangent,
    attention_row_dot,
)
from ispen_kernels.attention_forward import (
    attention_forward,
    attention_forward_tangent,
    attention_tangent,
)
from ispen_kernels.launch import INTERPRETED

# Beyond 128 two accumulators do not fit in the registers.
MIN_HEAD_SIZE, MAX_HEAD_SIZE = 1, 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = ("dtype", "device")
BEYOND = (
    "attention: expected at most two derivatives, got a third; use attention_reference, which has "
    "derivatives of any order"
)


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
