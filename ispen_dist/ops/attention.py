"""Softmax attention that has first and second derivatives, with or without a T x T matrix."""

import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ispen_dist.ops.choice import chosen, told


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return `dropout(softmax(q k^T / sqrt(H) + key_bias)) v`.

    On a GPU, in 16 bits and without dropout, it is the fused kernel of `ispen_kernels.attention`,
    in memory linear in T and differentiable twice; otherwise plain PyTorch, differentiable to any
    order. In float32 the kernel's tangents spill registers, so it has to be asked for.

    Args:
        q: queries, (B, N, T, H).
        k: keys, (B, N, S, H).
        v: values, (B, N, S, H).
        key_bias: (B, S), a constant: 0 at tokens, a large negative finite number at padding.
        dropout: of the attention weights, or None where it is not active.

    Returns:
        (B, N, T, H).
    """
    if chosen(
        can_run=dropout is None and _kernel_runs(q, k, v),
        is_better=q.is_cuda and q.element_size() == 2,
    ):
        from ispen_kernels.attention import attention as fused

        return fused(q, k, v, key_bias)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + key_bias[:, None, None, :]
    weights = torch.softmax(scores, dim=-1)
    return (weights if dropout is None else dropout(weights)) @ v


def _kernel_runs(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if told() == "reference" or importlib.util.find_spec("triton") is None:
        return False
    from ispen_kernels.attention import supports

    return supports(q, k, v)
