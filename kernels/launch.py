"""What launches of all kernels share: the device, the types, the checks, the end of derivatives."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

INTERPRETED = bool(triton.knobs.runtime.interpret)
# Of all kernels but attention, which also takes 16 bits.
DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
# The width of a tensor core's tile, and the least that a matrix product of Triton takes.
MIN_BLOCK = 16


def part(function: Callable) -> Callable:
    """Mark a function that kernels call; in the interpreter a call of a jit function costs 5 ms."""
    return function if INTERPRETED else triton.jit(function)


def launch(kernel, grid: tuple[int, ...], device: torch.device, *args, **constants) -> None:
    """Launch a kernel on a device; refuse a CPU where the kernel is not interpreted.

    Raises:
        ValueError: for a device that cannot run the kernel.
    """
    on_gpu = device.type == "cuda"
    if not on_gpu and isinstance(kernel, triton.JITFunction):
        raise ValueError(
            f"expected tensors on a GPU, got {device}; move them, call the reference, or set "
            "TRITON_INTERPRET=1 before Triton is imported"
        )
    # Triton launches on the current device, whatever its arguments are on.
    with torch.cuda.device(device) if on_gpu else nullcontext():
        kernel[grid](*args, **constants)


def padded(size: int) -> int:
    """Return the block that holds a row of this size."""
    return max(MIN_BLOCK, triton.next_power_of_2(size))


def contiguous_like(x: Tensor) -> Tensor:
    """Return contiguous memory; `empty_like` alone would keep the strides of a view."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def check_operands(tensors: dict[str, Tensor], shapes: dict[str, tuple[int | None, ...]]) -> None:
    """Raise unless every tensor has its shape (None: any size), and all one type and device.

    Raises:
        ValueError: for the first tensor that does not fit.
    """
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        expected = tuple(shapes[name])
        fits = tensor.dim() == len(expected) and all(
            size in (None, got) for size, got in zip(expected, tensor.shape, strict=True)
        )
        if not fits:
            wanted = f"{expected} (None: any)" if None in expected else f"{expected}"
            raise ValueError(
                f"{name}: expected shape {wanted}, got {tuple(tensor.shape)}; "
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


class LastDerivative(torch.autograd.Function):
    """Run an operator whose own derivative would be one too many: taking it raises.

    An operator without an autograd formula raises in reverse mode but drops tangents silently.
    """

    @staticmethod
    def forward(op: Callable, name: str, *args: object) -> Tensor | tuple[Tensor, ...]:
        """Call the operator; `name` is that of the derivative that would follow."""
        return op(*args)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: object) -> None:
        """Keep the name alone."""
        ctx.name = inputs[1]

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> None:
        """Raise, in reverse and in forward mode."""
        raise RuntimeError(
            f"{ctx.name}: expected no further derivative, got a request for one; differentiate "
            "fewer times or call the reference"
        )

    jvp = backward
