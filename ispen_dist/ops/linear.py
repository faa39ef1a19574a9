"""A linear layer on constant inputs that are mostly zero, as bags of words are.

    y = x W^T,      W_bar = y_bar^T x

x is data and needs no gradient, so the two maps `W -> x W^T` and `a -> a^T x` are each other's
derivative, to any order. On a CPU both are products with a compressed x: at the shapes of bibtex
(256 x 1836, 3.8% nonzero, 400 units, one thread) 0.8 ms each, against 5 and 8 ms when dense.
"""

import warnings
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ispen_dist.ops.choice import told

MAX_DENSITY = 0.1
"""Share of nonzero entries up to which x is compressed; at 0.15 both ways take the same time."""


def constant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x W^T + bias`, differentiable to any order in weight and bias.

    Args:
        x: (B, D), a constant. Where it needs a gradient the plain layer is used.
        weight: (H, D).
        bias: (H,) or None.

    Returns:
        (B, H).
    """
    if x.device.type != "cpu" or x.requires_grad or x.dim() != 2 or told() == "reference":
        return F.linear(x, weight, bias)
    y = _Apply.apply(x, weight)
    return y if bias is None else y + bias


@torch.library.custom_op("ispen::constant_linear", mutates_args=())
def _apply(x: Tensor, weight: Tensor) -> Tensor:
    rows = _compressed(x).rows
    if rows is None:
        return x @ weight.T
    return torch.sparse.mm(rows, weight.T.contiguous(), "sum")


@torch.library.custom_op("ispen::constant_linear_weight", mutates_args=())
def _pull_back(x: Tensor, a: Tensor) -> Tensor:
    """Return `a^T x` (H, D), stored by columns: (D, H) lies contiguous in memory."""
    columns = _compressed(x).columns
    if columns is None:
        return (x.T @ a).T
    return torch.sparse.mm(columns, a.contiguous(), "sum").T


@_apply.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@_pull_back.register_fake
def _(x: Tensor, a: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], a.shape[1]).T


class _Apply(torch.autograd.Function):
    """`W -> x W^T`; differentiable to any order, in both modes."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return _apply(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _keep_x(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> tuple[None, Tensor]:
        return None, _PullBack.apply(ctx.saved_tensors[0], y_bar)

    @staticmethod
    def jvp(ctx: Any, x_dot: None, w_dot: Tensor) -> Tensor:
        return _Apply.apply(ctx.x, w_dot)


class _PullBack(torch.autograd.Function):
    """`a -> a^T x`, the transpose of `_Apply`."""

    @staticmethod
    def forward(x: Tensor, a: Tensor) -> Tensor:
        return _pull_back(x, a)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        _keep_x(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, w_bar: Tensor) -> tuple[None, Tensor]:
        return None, _Apply.apply(ctx.saved_tensors[0], w_bar)

    @staticmethod
    def jvp(ctx: Any, x_dot: None, a_dot: Tensor) -> Tensor:
        return _PullBack.apply(ctx.x, a_dot)


def _keep_x(ctx: Any, inputs: tuple[Tensor, Tensor]) -> None:
    ctx.x = inputs[0]
    ctx.save_for_backward(inputs[0])


@dataclass(frozen=True)
class _Compressed:
    """x and its transpose by rows (CSR), or None where x is not sparse."""

    rows: Tensor | None
    columns: Tensor | None


_recent: OrderedDict[int, tuple[weakref.ref, int, _Compressed]] = OrderedDict()
_NUM_RECENT = 8


def _compressed(x: Tensor) -> _Compressed:
    """Compress x, or return what was made of it: a solve multiplies with the same x many times."""
    found = _recent.get(id(x))
    if found is not None and found[0]() is x and found[1] == x._version:
        return found[2]
    made = _compress(x)
    _recent[id(x)] = (weakref.ref(x), x._version, made)
    _recent.move_to_end(id(x))
    while len(_recent) > _NUM_RECENT:
        _recent.popitem(last=False)
    return made


def _compress(x: Tensor) -> _Compressed:
    if torch.count_nonzero(x).item() > MAX_DENSITY * x.numel():
        return _Compressed(None, None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return _Compressed(x.to_sparse_csr(), x.T.contiguous().to_sparse_csr())
