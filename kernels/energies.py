"""Energies in output space: value, gradient and Hessian-vector product in y, in one pass.

Label interaction, y (B, L), M (U, L), v (U,), with z = M y and s = sigmoid(z):

    E = v . softplus(z),   g = dE/dy = M^T (v s),   (d2E/dy2) y' = M^T (v s (1 - s) (M y'))

Skip chain, y (B, T, K), W (D, K, K), offsets d = 1..D; a pair that reaches over an end is absent:

    E = - sum_d sum_t y_{t-d}^T W_d y_t,   g_t = - sum_d (W_d^T y_{t-d} + W_d y_{t+d})

The second is quadratic: its Hessian-vector product is its gradient taken at the direction.

Both are autograd functions with the two outputs E and g, so that the gradient which backward
multiplies with is itself a node of the graph: a first derivative in y needs no kernel beyond the
forward one, and the derivative of g in y is the product kernel. Derivatives in M, v and W are plain
PyTorch. Order of differentiability: `label_interaction` 2 in all its arguments, by reverse mode,
forward mode, reverse over reverse and forward over reverse; a third derivative in y raises, and so
does forward over forward. `skip_chain` any order. The references: any order, any mode.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.library import custom_op

DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

# A tile of M in registers, 8 values per thread, so that float64 does not spill. One row of y per
# program: batches are small beside the 132 SMs of an H100, and M is read again from the cache.
TILE = 2048
NUM_WARPS = 8
MAX_BLOCK_UNITS = 128
MIN_BLOCK = 16
# Tokens per program; the smallest block that a matrix product of Triton takes in any version.
BLOCK_TOKENS = 16
# W_d is held in one block, twice (as it is and transposed); one stage, as a second copy of both in
# flight would cost more registers than the few offsets gain.
MAX_TAGS = 64


def label_interaction_reference(y: Tensor, M: Tensor, v: Tensor) -> Tensor:
    """See `label_interaction`."""
    return _softplus(y @ M.mT) @ v


def skip_chain_reference(y: Tensor, W: Tensor) -> Tensor:
    """See `skip_chain`."""
    energy = y.new_zeros(y.shape[:-2])
    for d, W_d in enumerate(W, start=1):
        energy = energy - ((y[..., :-d, :] @ W_d) * y[..., d:, :]).sum((-1, -2))
    return energy


def _softplus(z: Tensor) -> Tensor:
    """Return log(1 + exp(z)) without the threshold of `F.softplus`, which costs 2e-9 at z = 20."""
    return torch.logaddexp(z, z.new_zeros(()))


@triton.jit
def _project(row, M, units, num_units, num_labels, DTYPE: tl.constexpr, BLOCK_L: tl.constexpr):
    """Return M[units] row, with one reduction over threads at the end of the row."""
    acc = tl.zeros((units.shape[0], BLOCK_L), DTYPE)
    for start in range(0, num_labels, BLOCK_L):
        label = start + tl.arange(0, BLOCK_L)
        inside = (units < num_units)[:, None] & (label < num_labels)[None, :]
        tile = tl.load(M + units[:, None] * num_labels + label[None, :], mask=inside, other=0.0)
        acc += tile * tl.load(row + label, mask=label < num_labels, other=0.0)[None, :]
    return tl.sum(acc, axis=1)


@triton.jit
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


@triton.jit
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


def _on(x: Tensor) -> AbstractContextManager:
    """Make the device of `x` current, where Triton launches; refuse a CPU without interpreter."""
    if x.is_cuda:
        return torch.cuda.device(x.device)
    if isinstance(_skip_chain_kernel, triton.JITFunction):
        raise ValueError(
            f"expected tensors on a GPU, got {x.device}; move them, call the reference, or set "
            "TRITON_INTERPRET=1 before Triton is imported"
        )
    return nullcontext()


def _launch_label_interaction(
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
    block_units = min(MAX_BLOCK_UNITS, max(MIN_BLOCK, triton.next_power_of_2(num_units)))
    widest = max(MIN_BLOCK, triton.next_power_of_2(max(num_labels, 1)))
    with _on(y):
        _label_interaction_kernel[(len(y),)](
            y, tangent, M, v, energy, gradient, product, num_units, num_labels,
            WITH_FIRST=first, WITH_PRODUCT=y_dot is not None, DTYPE=DTYPES[y.dtype],
            BLOCK_U=block_units, BLOCK_L=min(TILE // block_units, widest),
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return energy, gradient, product


def _launch_skip_chain(y: Tensor, y_dot: Tensor | None, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, num_tokens, num_tags = y.shape
    if not y.numel():
        return y.new_zeros(batch), torch.zeros_like(y), torch.zeros_like(y)
    y, W = y.contiguous(), W.contiguous()
    tangent = y if y_dot is None else y_dot.contiguous()
    num_blocks = triton.cdiv(num_tokens, BLOCK_TOKENS)
    energy = torch.empty((batch, num_blocks), dtype=y.dtype, device=y.device)
    gradient = torch.empty_like(y)
    product = energy if y_dot is None else torch.empty_like(y)
    with _on(y):
        _skip_chain_kernel[(batch, num_blocks)](
            y, tangent, W, energy, gradient, product, len(W), num_tokens, num_tags,
            WITH_PRODUCT=y_dot is not None, DTYPE=DTYPES[y.dtype],
            BLOCK_T=BLOCK_TOKENS, BLOCK_K=max(MIN_BLOCK, triton.next_power_of_2(num_tags)),
            num_warps=NUM_WARPS, num_stages=1,
        )  # fmt: skip
    return energy.sum(1), gradient, product


@custom_op("ispen::label_interaction_gradient", mutates_args=())
def _label_interaction_gradient(y: Tensor, M: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _launch_label_interaction(y, None, M, v)[:2]


@custom_op("ispen::label_interaction_product", mutates_args=())
def _label_interaction_product(y: Tensor, y_dot: Tensor, M: Tensor, v: Tensor) -> Tensor:
    return _launch_label_interaction(y, y_dot, M, v, first=False)[2]


@custom_op("ispen::label_interaction_all", mutates_args=())
def _label_interaction_all(
    y: Tensor, y_dot: Tensor, M: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_label_interaction(y, y_dot, M, v)


@custom_op("ispen::skip_chain_gradient", mutates_args=())
def _skip_chain_gradient(y: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    return _launch_skip_chain(y, None, W)[:2]


@custom_op("ispen::skip_chain_all", mutates_args=())
def _skip_chain_all(y: Tensor, y_dot: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_skip_chain(y, y_dot, W)


def _like(y: Tensor) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@_label_interaction_gradient.register_fake
def _(y: Tensor, M: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape[0]), _like(y)


@_label_interaction_product.register_fake
def _(y: Tensor, y_dot: Tensor, M: Tensor, v: Tensor) -> Tensor:
    return _like(y)


@_label_interaction_all.register_fake
def _(y: Tensor, y_dot: Tensor, M: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape[0]), _like(y), _like(y)


@_skip_chain_gradient.register_fake
def _(y: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape[0]), _like(y)


@_skip_chain_all.register_fake
def _(y: Tensor, y_dot: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape[0]), _like(y), _like(y)


class _LastDerivative(torch.autograd.Function):
    """Run an operator whose own derivative would be one too many: taking it raises.

    An operator without an autograd formula raises in reverse mode but drops tangents silently.
    """

    @staticmethod
    def forward(op: Callable, name: str, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        return op(*tensors)

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


class _LabelInteraction(torch.autograd.Function):
    """(y, M, v) -> (energy, gradient in y)."""

    @staticmethod
    def forward(y: Tensor, M: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return _label_interaction_gradient(y, M, v)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.save_for_forward(*inputs, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: FunctionCtx, e_bar: Tensor | None, g_bar: Tensor | None) -> tuple:
        y, M, v, gradient = ctx.saved_tensors
        y_bar = M_bar = v_bar = None
        if ctx.needs_input_grad[0]:
            parts = [] if e_bar is None else [e_bar[:, None] * gradient]
            parts += [] if g_bar is None else [_product(y, g_bar, M, v)]
            y_bar = _sum(parts)
        if any(ctx.needs_input_grad[1:]):
            M_bar, v_bar = _label_parameter_gradients(y, M, v, e_bar, g_bar)
        return y_bar, M_bar, v_bar

    @staticmethod
    def jvp(
        ctx: FunctionCtx, y_dot: Tensor | None, M_dot: Tensor | None, v_dot: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        y, M, v, gradient = ctx.saved_tensors
        z = y @ M.mT
        s = torch.sigmoid(z)
        energies, gradients = [], []
        if y_dot is not None:
            energies.append((gradient * y_dot).sum(1))
            gradients.append(_product(y, y_dot, M, v))
        if M_dot is not None:
            z_dot = y @ M_dot.mT
            energies.append((s * z_dot) @ v)
            gradients.append((v * s) @ M_dot + (v * s * (1.0 - s) * z_dot) @ M)
        if v_dot is not None:
            energies.append(_softplus(z) @ v_dot)
            gradients.append((s * v_dot) @ M)
        return _sum(energies), _sum(gradients)


def _product(y: Tensor, y_dot: Tensor, M: Tensor, v: Tensor) -> Tensor:
    return _LastDerivative.apply(
        _label_interaction_product, "third derivative of label_interaction", y, y_dot, M, v
    )


def _label_parameter_gradients(
    y: Tensor, M: Tensor, v: Tensor, e_bar: Tensor | None, g_bar: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of <e_bar, E> + <g_bar, g> in M and v; <g_bar, g> = v . (s M g_bar).

    Differentiable further, being plain PyTorch.
    """
    z = y @ M.mT
    s = torch.sigmoid(z)
    parts_M, parts_v = [], []
    if e_bar is not None:
        parts_M.append((e_bar[:, None] * v * s).mT @ y)
        parts_v.append(e_bar @ _softplus(z))
    if g_bar is not None:
        z_bar = g_bar @ M.mT
        parts_M.append((v * s).mT @ g_bar + (v * s * (1.0 - s) * z_bar).mT @ y)
        parts_v.append((s * z_bar).sum(0))
    return _sum(parts_M), _sum(parts_v)


class _SkipChain(torch.autograd.Function):
    """(y, W) -> (energy, gradient in y). The gradient is linear in y and W, hence any order."""

    @staticmethod
    def forward(y: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        return _skip_chain_gradient(y, W)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.save_for_forward(*inputs, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: FunctionCtx, e_bar: Tensor | None, g_bar: Tensor | None) -> tuple:
        y, W, gradient = ctx.saved_tensors
        y_parts, W_parts = [], []
        if e_bar is not None:
            y_parts.append(e_bar[:, None, None] * gradient)
            W_parts.append(_pair_sums(e_bar[:, None, None] * y, y, len(W)))
        if g_bar is not None:
            y_parts.append(_SkipChain.apply(g_bar, W)[1])
            W_parts.append(_pair_sums(g_bar, y, len(W)) + _pair_sums(y, g_bar, len(W)))
        return _sum(y_parts), _sum(W_parts) if ctx.needs_input_grad[1] else None

    @staticmethod
    def jvp(
        ctx: FunctionCtx, y_dot: Tensor | None, W_dot: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        y, W, gradient = ctx.saved_tensors
        energies, gradients = [], []
        if y_dot is not None:
            energies.append((gradient * y_dot).sum((1, 2)))
            gradients.append(_SkipChain.apply(y_dot, W)[1])
        if W_dot is not None:
            energy, gradient_W = _SkipChain.apply(y, W_dot)
            energies.append(energy)
            gradients.append(gradient_W)
        return _sum(energies), _sum(gradients)


def _pair_sums(left: Tensor, right: Tensor, num_offsets: int) -> Tensor:
    """Return - sum_b sum_t left_{t-d} right_t^T for every offset d: (D, K, K)."""
    offsets = range(1, num_offsets + 1)
    pairs = [torch.einsum("bti,btj->ij", left[:, :-d], right[:, d:]) for d in offsets]
    return -torch.stack(pairs) if pairs else left.new_zeros(0, left.shape[-1], left.shape[-1])


def _sum(parts: list[Tensor]) -> Tensor | None:
    return sum(parts[1:], parts[0]) if parts else None


def _check(tensors: dict[str, Tensor], shapes: dict[str, tuple[int | None, ...]]) -> None:
    """Raise unless every tensor has its shape (None: any size), and all one type and device."""
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        expected = shapes[name]
        fits = tensor.dim() == len(expected) and all(
            size in (None, got) for size, got in zip(expected, tensor.shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"{name}: expected shape {expected} (None: any), got {tuple(tensor.shape)}; "
                f"make it fit {first_name} {tuple(first.shape)}"
            )
        if tensor.dtype not in DTYPES or tensor.dtype != first.dtype:
            raise ValueError(
                f"{name}: expected float32 or float64, one for all, got {tensor.dtype}; cast it"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name}: expected device {first.device} of {first_name}, got {tensor.device}; "
                "move it there"
            )


def _check_label_interaction(y: Tensor, M: Tensor, v: Tensor, **same: Tensor) -> None:
    if y.dim() < 2:
        raise ValueError(f"y: expected shape (..., B, L), got {tuple(y.shape)}; add a batch of 1")
    units = M.shape[0] if M.dim() == 2 else None
    shapes = dict.fromkeys(["y", *same], tuple(y.shape))
    _check({"y": y, "M": M, "v": v} | same, shapes | {"M": (units, y.shape[-1]), "v": (units,)})


def _check_skip_chain(y: Tensor, W: Tensor, **same: Tensor) -> None:
    if y.dim() < 3:
        raise ValueError(
            f"y: expected shape (..., B, T, K), got {tuple(y.shape)}; add a batch of 1"
        )
    num_tags = y.shape[-1]
    if num_tags > MAX_TAGS:
        raise ValueError(
            f"y: expected at most {MAX_TAGS} tags, got {num_tags}; use skip_chain_reference"
        )
    shapes = dict.fromkeys(["y", *same], tuple(y.shape))
    _check({"y": y, "W": W} | same, shapes | {"W": (None, num_tags, num_tags)})


def label_interaction(y: Tensor, M: Tensor, v: Tensor) -> Tensor:
    """Compute the global multi-label energy `v . softplus(M y)` of every example.

    Belanger and McCallum (2016). Differentiable to order 2 in `y`, `M` and `v`, mixed derivatives
    included, see the top of the file; beyond, it raises.

    Args:
        y: relaxed labels, (B, L), or (S, B, L) with more leading dimensions; any strides.
        M: interaction of U units, (U, L).
        v: weights of the units, (U,).

    Returns:
        Energies (B,), or (S, B), without unit.

    Raises:
        ValueError: where shapes, types (float32, float64) or devices do not fit.
        RuntimeError: on a third derivative.
    """
    _check_label_interaction(y, M, v)
    energy, _ = _LabelInteraction.apply(y.flatten(0, -2), M, v)
    return energy.unflatten(0, y.shape[:-1])


def label_interaction_all(
    y: Tensor, y_dot: Tensor, M: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute energy, gradient in y and Hessian-vector product in y in one launch.

    Args:
        y: relaxed labels, (B, L), or with more leading dimensions.
        y_dot: direction, like `y`.
        M: (U, L).
        v: (U,).

    Returns:
        Energy (B,), gradient like `y`, product `d2E/dy2 y_dot` like `y`. Differentiable to order 0:
        a derivative of the results raises.

    Raises:
        ValueError: where shapes, types or devices do not fit.
    """
    _check_label_interaction(y, M, v, y_dot=y_dot)
    rows, rows_dot = y.flatten(0, -2), y_dot.flatten(0, -2)
    results = _LastDerivative.apply(
        _label_interaction_all, "derivative of label_interaction_all", rows, rows_dot, M, v
    )
    return tuple(out.unflatten(0, y.shape[:-1]) for out in results)


def skip_chain(y: Tensor, W: Tensor) -> Tensor:
    """Compute the energy `- sum_d sum_t y_{t-d}^T W_d y_t` of every sequence.

    The linear chain of Tu and Gimpel (2018) is D = 1. Padding needs no mask: `y` is zero there.
    Differentiable to any order in `y` and `W`.

    Args:
        y: relaxed tags, (B, T, K), or (S, B, T, K); any strides; K up to 64. A sequence shorter
            than an offset contributes nothing to it.
        W: scores, (D, K, K): `W[d - 1, i, j]` of tag j at a distance d after tag i.

    Returns:
        Energies (B,), or (S, B), without unit.

    Raises:
        ValueError: where shapes, types (float32, float64) or devices do not fit.
    """
    _check_skip_chain(y, W)
    energy, _ = _SkipChain.apply(y.flatten(0, -3), W)
    return energy.unflatten(0, y.shape[:-2])


def skip_chain_all(y: Tensor, y_dot: Tensor, W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute energy, gradient in y and Hessian-vector product in y in one launch.

    Args:
        y: relaxed tags, (B, T, K), or with more leading dimensions.
        y_dot: direction, like `y`.
        W: (D, K, K).

    Returns:
        Energy (B,), gradient like `y`, product `d2E/dy2 y_dot` like `y`. Differentiable to order 0:
        a derivative of the results raises.

    Raises:
        ValueError: where shapes, types or devices do not fit.
    """
    _check_skip_chain(y, W, y_dot=y_dot)
    rows, rows_dot = y.flatten(0, -3), y_dot.flatten(0, -3)
    results = _LastDerivative.apply(
        _skip_chain_all, "derivative of skip_chain_all", rows, rows_dot, W
    )
    return tuple(out.unflatten(0, y.shape[:-2]) for out in results)
