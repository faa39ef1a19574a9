"""Layer norm over the last dimension and exact GELU, each with its tangent.

Layer norm of a row x of width D, with weight w, bias b, m = mean(x), rho = (var(x) + eps)^(-1/2),
n = (x - m) rho, and P(a) = a - mean(a) - n mean(a n), the projection that differentiates n:

    y = w n + b                                  n' = rho P(x')
    y' = w n' + w' n + b'                        rho' = - rho^2 mean(n x')
    x_bar = rho P(h), h = w y_bar                w_bar = sum y_bar n,   b_bar = sum y_bar

and the tangent of the backward pass, along y_bar', x', w', with h' = w y_bar' + w' y_bar:

    x_bar' = rho' P(h) + rho (P(h') - n' mean(h n) - n mean(h n'))
    w_bar' = sum (y_bar' n + y_bar n'),          b_bar' = sum y_bar'

The backward of the backward needs no kernel of its own. With J the derivative of y in (x, w, b),
the backward is g = J^T y_bar, and for a cotangent u of g, <u, J^T y_bar> = <J u, y_bar>: its
gradient in y_bar is the forward tangent along u; in (x, w) it is the second derivative of
<y, y_bar> applied to u, which is symmetric, hence the tangent of g along u with y_bar' = 0.

GELU, with Phi and phi the normal distribution and its density, in the same scheme:

    f = x Phi(x),   f' = Phi + x phi,   f'' = phi (2 - x^2)

Order of differentiability of both: 2, by reverse mode, forward mode, reverse over reverse and
forward over reverse; reverse over forward, forward over forward and any third derivative raise.
The references: any order, any mode.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ispen_kernels import gelu_passes, layer_norm_passes
from ispen_kernels.launch import LastDerivative, check_operands
from ispen_kernels.layer_norm_passes import MAX_WIDTH


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """See `layer_norm`."""
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias


def gelu_reference(x: Tensor) -> Tensor:
    """See `gelu`."""
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class _LayerNorm(torch.autograd.Function):
    """(x, w, b, eps) -> (y, mean, rstd)."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return layer_norm_passes.forward(x, w, b, eps)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        x, w, b, ctx.eps = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, w, b, mean, rstd)
        ctx.save_for_forward(x, w, b)

    @staticmethod
    def backward(ctx: FunctionCtx, y_bar: Tensor, *_: Tensor) -> tuple:
        x, w, b, mean, rstd = ctx.saved_tensors
        return *_LayerNormBackward.apply(y_bar, x, w, b, mean, rstd, ctx.eps), None

    @staticmethod
    def jvp(
        ctx: FunctionCtx, x_dot: Tensor | None, w_dot: Tensor | None, b_dot: Tensor | None, _: None
    ) -> tuple:
        dots = (x_dot, w_dot, b_dot)
        return _tangent(*ctx.saved_tensors[:3], *dots, ctx.eps), None, None


class _LayerNormBackward(torch.autograd.Function):
    """(y_bar, x, w) -> (x_bar, w_bar, b_bar). mean and rstd count as part of x, b for its shape."""

    @staticmethod
    def forward(
        y_bar: Tensor, x: Tensor, w: Tensor, b: Tensor, mean: Tensor, rstd: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return layer_norm_passes.backward(y_bar, x, w, mean, rstd)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: FunctionCtx, u_x: Tensor, u_w: Tensor, u_b: Tensor) -> tuple:
        y_bar, x, w, b, mean, rstd = ctx.saved_tensors
        y_bar_bar = x_bar = w_bar = None
        if ctx.needs_input_grad[0]:
            y_bar_bar = _tangent(x, w, b, u_x, u_w, u_b, ctx.eps)
        if any(ctx.needs_input_grad[1:3]):
            x_bar, w_bar, _ = _backward_tangent(y_bar, None, x, u_x, w, u_w, mean, rstd)
        return y_bar_bar, x_bar, w_bar, None, None, None, None

    @staticmethod
    def jvp(
        ctx: FunctionCtx, y_bar_dot: Tensor | None, x_dot: Tensor | None, w_dot: Tensor | None,
        *_: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        y_bar, x, w, _, mean, rstd = ctx.saved_tensors
        return _backward_tangent(y_bar, y_bar_dot, x, x_dot, w, w_dot, mean, rstd)


def _or_zeros(tangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tangent is None else tangent


def _tangent(
    x: Tensor, w: Tensor, b: Tensor,
    x_dot: Tensor | None, w_dot: Tensor | None, b_dot: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    dots = (_or_zeros(x_dot, x), _or_zeros(w_dot, w), _or_zeros(b_dot, b))
    name = "derivative of a tangent of layer_norm"
    return LastDerivative.apply(layer_norm_passes.tangent, name, x, w, b, *dots, eps)


def _backward_tangent(
    y_bar: Tensor, y_bar_dot: Tensor | None, x: Tensor, x_dot: Tensor | None,
    w: Tensor, w_dot: Tensor | None, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    operator, name = layer_norm_passes.backward_tangent, "third derivative of layer_norm"
    tensors = (y_bar, y_bar_dot, x, _or_zeros(x_dot, x), w, _or_zeros(w_dot, w), mean, rstd)
    return LastDerivative.apply(operator, name, *tensors)


class _Gelu(torch.autograd.Function):
    """x -> f(x)."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return gelu_passes.forward(x)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor) -> Tensor:
        return _GeluBackward.apply(g, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: FunctionCtx, x_dot: Tensor) -> Tensor:
        name = "derivative of a tangent of gelu"
        return LastDerivative.apply(gelu_passes.backward, name, x_dot, *ctx.saved_tensors)


class _GeluBackward(torch.autograd.Function):
    """(g, x) -> f'(x) g."""

    @staticmethod
    def forward(g: Tensor, x: Tensor) -> Tensor:
        return gelu_passes.backward(g, x)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: FunctionCtx, u: Tensor) -> tuple[Tensor | None, Tensor | None]:
        g, x = ctx.saved_tensors
        name = "third derivative of gelu"
        g_bar = x_bar = None
        if ctx.needs_input_grad[0]:
            g_bar = LastDerivative.apply(gelu_passes.backward, name, u, x)
        if ctx.needs_input_grad[1]:
            x_bar = LastDerivative.apply(gelu_passes.backward_tangent, name, g, None, x, u)
        return g_bar, x_bar

    @staticmethod
    def jvp(ctx: FunctionCtx, g_dot: Tensor | None, x_dot: Tensor | None) -> Tensor:
        g, x = ctx.saved_tensors
        name, x_dot = "third derivative of gelu", _or_zeros(x_dot, x)
        return LastDerivative.apply(gelu_passes.backward_tangent, name, g, g_dot, x, x_dot)


def _check_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, **dots: Tensor) -> None:
    if x.dim() < 1 or x.shape[-1] > MAX_WIDTH:
        raise ValueError(
            f"x: expected a last dimension of at most {MAX_WIDTH}, got {tuple(x.shape)}; "
            "call layer_norm_reference"
        )
    shapes = {"x": x.shape, "weight": x.shape[-1:], "bias": x.shape[-1:]}
    shapes |= {f"{name}_dot": shape for name, shape in shapes.items()}
    check_operands({"x": x, "weight": weight, "bias": bias} | dots, shapes)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise over the last dimension, `(x - mean) / sqrt(var + eps) * weight + bias`.

    Ba et al. (2016). Differentiable to order 2 in `x`, `weight` and `bias`, see the top of the
    file; beyond, it raises.

    Args:
        x: (..., D), D up to 8192; any strides.
        weight: (D,).
        bias: (D,).
        eps: added to the variance, in its unit.

    Returns:
        Tensor like `x`, contiguous.

    Raises:
        ValueError: where shapes, types (float32, float64) or devices do not fit.
        RuntimeError: on a third derivative, or a derivative of a forward-mode tangent.
    """
    _check_layer_norm(x, weight, bias)
    rows = x[None] if x.dim() == 1 else x.flatten(0, -2)
    y, _, _ = _LayerNorm.apply(rows, weight, bias, float(eps))
    return y.view(x.shape)


def layer_norm_with_tangent(
    x: Tensor, weight: Tensor, bias: Tensor,
    x_dot: Tensor, weight_dot: Tensor, bias_dot: Tensor, eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute the layer norm and its tangent in one pass.

    Args:
        x: (..., D), D up to 8192.
        weight: (D,).
        bias: (D,).
        x_dot: tangent of `x`, of its shape.
        weight_dot: tangent of `weight`.
        bias_dot: tangent of `bias`.
        eps: added to the variance.

    Returns:
        Value and tangent, both like `x`. Differentiable to order 0: a derivative raises.

    Raises:
        ValueError: where shapes, types or devices do not fit.
    """
    dots = {"x_dot": x_dot, "weight_dot": weight_dot, "bias_dot": bias_dot}
    _check_layer_norm(x, weight, bias, **dots)
    rows, rows_dot = (a[None] if a.dim() == 1 else a.flatten(0, -2) for a in (x, x_dot))
    y, y_dot = LastDerivative.apply(
        layer_norm_passes.forward_with_tangent, "derivative of layer_norm_with_tangent",
        rows, weight, bias, rows_dot, weight_dot, bias_dot, float(eps),
    )  # fmt: skip
    return y.view(x.shape), y_dot.view(x.shape)


def gelu(x: Tensor) -> Tensor:
    """Compute the exact GELU, `x Phi(x)` with the normal distribution function by `erf`.

    Hendrycks and Gimpel (2016). Differentiable to order 2; beyond, it raises.

    Args:
        x: any shape and strides.

    Returns:
        Tensor like `x`, contiguous.

    Raises:
        ValueError: where the type is neither float32 nor float64.
        RuntimeError: on a third derivative, or a derivative of a forward-mode tangent.
    """
    check_operands({"x": x}, {"x": x.shape})
    return _Gelu.apply(x)


def gelu_with_tangent(x: Tensor, x_dot: Tensor) -> tuple[Tensor, Tensor]:
    """Compute GELU and its tangent in one pass.

    Args:
        x: any shape and strides.
        x_dot: tangent, like `x`.

    Returns:
        Value and tangent, both like `x`. Differentiable to order 0: a derivative raises.

    Raises:
        ValueError: where shapes, types or devices do not fit.
    """
    check_operands({"x": x, "x_dot": x_dot}, {"x": x.shape, "x_dot": x.shape})
    name = "derivative of gelu_with_tangent"
    return LastDerivative.apply(gelu_passes.forward_with_tangent, name, x, x_dot)
