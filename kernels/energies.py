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

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ispen_kernels import label_interaction_passes, skip_chain_passes
from ispen_kernels.launch import LastDerivative, check_operands
from ispen_kernels.skip_chain_passes import MAX_TAGS


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


class _LabelInteraction(torch.autograd.Function):
    """(y, M, v) -> (energy, gradient in y)."""

    @staticmethod
    def forward(y: Tensor, M: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return label_interaction_passes.gradient(y, M, v)

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
    name = "third derivative of label_interaction"
    return LastDerivative.apply(label_interaction_passes.product, name, y, y_dot, M, v)


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
        return skip_chain_passes.gradient(y, W)

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


def _check_label_interaction(y: Tensor, M: Tensor, v: Tensor, **same: Tensor) -> None:
    if y.dim() < 2:
        raise ValueError(f"y: expected shape (..., B, L), got {tuple(y.shape)}; add a batch of 1")
    units = M.shape[0] if M.dim() == 2 else None
    shapes = dict.fromkeys(["y", *same], tuple(y.shape))
    shapes |= {"M": (units, y.shape[-1]), "v": (units,)}
    check_operands({"y": y, "M": M, "v": v} | same, shapes)


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
    shapes |= {"W": (None, num_tags, num_tags)}
    check_operands({"y": y, "W": W} | same, shapes)


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
    name = "derivative of label_interaction_all"
    operator = label_interaction_passes.gradient_and_product
    results = LastDerivative.apply(operator, name, rows, rows_dot, M, v)
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
    name = "derivative of skip_chain_all"
    operator = skip_chain_passes.gradient_and_product
    results = LastDerivative.apply(operator, name, rows, rows_dot, W)
    return tuple(out.unflatten(0, y.shape[:-2]) for out in results)
