"""Every Triton kernel at several shapes, beside its reference: what `bench_kernels.py` times."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is imported

from ispen_kernels import (
    attention,
    energies,
    gelu_passes,
    layer_norm_passes,
    norms,
    solver,
)

Results = Sequence[Tensor]
Function = Callable[..., Results]
Shapes = Sequence[tuple[int, ...]]

EPS = 1e-5
# In units of F, see the top of `bench_kernels.py`.
COUNTED = {"forward": 1.0, "forward_tangent": 2.0, "backward": 3.5, "backward_tangent": 7.0}
MADE = {"forward": 1.0, "forward_tangent": 3.0, "backward": 4.5, "backward_tangent": 12.0}

# B, N, T, H and type of attention; B, L, U; B, T, K, D; rows and width; blocks and width.
Sizes = dict[str, list[tuple[Any, ...]]]
TINY: Sizes = {
    "attention": [(1, 2, 40, 16, torch.float32), (1, 1, 33, 16, torch.bfloat16)],
    "label_interaction": [(3, 17, 5)],
    "skip_chain": [(2, 19, 5, 2)],
    "layer_norm": [(9, 33)],
    "gelu": [(9, 33)],
    "tree": [(1, 16)],
}
QUICK: Sizes = {
    "attention": [(4, 16, 2048, 64, torch.bfloat16), (1, 16, 8192, 64, torch.bfloat16)],
    "label_interaction": [(256, 159, 64)],
    "skip_chain": [(256, 40, 25, 2)],
    "layer_norm": [(16384, 768)],
    "gelu": [(16384, 3072)],
    "tree": [(12, 768)],
}
FULL: Sizes = {
    "attention": [
        *QUICK["attention"],
        (4, 16, 2048, 128, torch.bfloat16),
        (64, 12, 40, 64, torch.float32),
        (4, 16, 512, 64, torch.float32),
    ],
    "label_interaction": [*QUICK["label_interaction"], (1024, 983, 128)],
    "skip_chain": [*QUICK["skip_chain"], (1024, 128, 50, 3)],
    "layer_norm": [*QUICK["layer_norm"], (640, 256), (16384, 4096)],
    "gelu": [*QUICK["gelu"], (640, 1024)],
    "tree": QUICK["tree"],
}


@dataclass(frozen=True)
class Case:
    """A kernel at one shape.

    Attributes:
        what: name of the kernel.
        problem: the shape in words.
        shapes: of the inputs, all of `dtype`; random and seeded.
        reference: from inputs to results. Inputs that it changes are among its results.
        prepare: from inputs to what is timed; what an earlier pass saves is computed here.
        check_shapes: of the inputs that are compared with float64, where smaller.
        others: further systems by name, as functions of the inputs.
        counted: floating point operations that the result is worth, 0 where memory is the limit.
        made: floating point operations of matrix products that the kernel makes.
    """

    what: str
    problem: str
    shapes: Shapes
    reference: Function
    prepare: Callable[..., Callable[[], Results]]
    dtype: torch.dtype = torch.float32
    check_shapes: Shapes | None = None
    others: dict[str, Function] = field(default_factory=dict)
    counted: float = 0.0
    made: float = 0.0

    def inputs(self, device: torch.device, check: bool = False) -> list[Tensor]:
        """Draw the inputs; scalars stay below 1, so that repeated updates do not overflow."""
        shapes = self.check_shapes if check and self.check_shapes else self.shapes
        draw = torch.Generator(device).manual_seed(0)
        tensors = [torch.randn(shape, generator=draw, device=device) for shape in shapes]
        return [(x if x.dim() else 0.5 * x.tanh()).to(self.dtype) for x in tensors]


def direct(kernel: Function) -> Callable[..., Callable[[], Results]]:
    """Return the `prepare` of a kernel that needs nothing from an earlier pass."""
    return lambda *inputs: lambda: kernel(*inputs)


def gradient_of(function: Callable[..., Tensor]) -> Function:
    """Return (output's cotangent, inputs) -> gradients of a function with one output."""
    return lambda y_bar, *inputs: torch.func.vjp(function, *inputs)[1](y_bar)


def tangent_of(function: Function, num: int) -> Function:
    """Return (inputs, directions) -> tangents of a function's results; both are `num` tensors."""
    return lambda *both: torch.func.jvp(function, both[:num], both[num:])[1]


def with_tangent(function: Callable[..., Tensor], num: int) -> Function:
    """Return (inputs, directions) -> value and tangent of a function with one output."""
    return lambda *both: torch.func.jvp(function, both[:num], both[num:])


def attention_cases(B: int, N: int, T: int, H: int, dtype: torch.dtype) -> list[Case]:
    """Attend to as many keys as queries, without a bias, which flash attention does not take."""
    shape, few_heads, scale = (B, N, T, H), (1, min(N, 2), T, H), H**-0.5
    a = attention

    def forward_tangent(*x: Tensor) -> Results:
        return a.attention_forward_tangent(*x[:3], None, *x[3:], scale)[::2]

    def backward(o_bar: Tensor, *point: Tensor) -> Results:
        o, lse2 = a.attention_forward(*point, None, scale)
        return a.attention_backward(*point, None, o, lse2, o_bar, scale)

    def backward_tangent(*x: Tensor) -> Results:
        o_bar, point, o_bar_dot, dots = x[0], x[1:4], x[4], x[5:]
        o, lse2, o_dot, lse_dot = a.attention_forward_tangent(*point, None, *dots, scale)
        D, D_dot = a.attention_row_dot(o_bar, o), a.attention_row_dot(o_bar, o_dot, o_bar_dot, o)
        rows_dot = lse_dot, D_dot
        return a.attention_backward_tangent(
            *point, None, lse2, D, o_bar, *dots, o_bar_dot, *rows_dot, scale
        )

    def forward(*point: Tensor) -> Results:
        return a.attention_forward(*point, None, scale)[:1]

    reference = a.attention_reference
    kinds: dict[str, tuple[int, Function, Function]] = {
        "forward": (3, forward, lambda *x: (reference(*x),)),
        "forward_tangent": (6, forward_tangent, with_tangent(reference, 3)),
        "backward": (4, backward, gradient_of(reference)),
        "backward_tangent": (8, backward_tangent, tangent_of(gradient_of(reference), 4)),
    }
    unit = 4.0 * B * N * T * T * H
    others: dict[str, dict[str, Function]] = {
        "forward": {"sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION)},
        "forward_tangent": {"sdpa math": sdpa_tangent},
    }
    name = f"B={B} N={N} T={T} H={H} {str(dtype)[6:]}"
    return [
        Case(
            f"attention_{kind}", name, [shape] * num, function, direct(kernel), dtype,
            [few_heads] * num, others.get(kind, {}), COUNTED[kind] * unit, MADE[kind] * unit,
        )
        for kind, (num, kernel, function) in kinds.items()
    ]  # fmt: skip


def sdpa(backend: SDPBackend) -> Function:
    """Return PyTorch's attention, made to use one of its implementations."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Results:
        with sdpa_kernel(backend):
            return (F.scaled_dot_product_attention(q, k, v),)

    return attend


def sdpa_tangent(*both: Tensor) -> Results:
    """Return value and tangent of the only implementation in PyTorch that has forward mode."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(F.scaled_dot_product_attention, both[:3], both[3:])


def energy_and_derivatives(energy: Callable[..., Tensor]) -> Function:
    """Return (y, y_dot, parameters) -> energy, gradient and Hessian-vector product in y."""

    def function(y: Tensor, y_dot: Tensor, *parameters: Tensor) -> Results:
        def gradient(x: Tensor) -> tuple[Tensor, Tensor]:
            pulled: Any = torch.func.vjp(lambda x: energy(x, *parameters), x)
            value, pull_back = pulled
            return pull_back(torch.ones_like(value))[0], value

        pushed: Any = torch.func.jvp(gradient, (y,), (y_dot,), has_aux=True)
        g, product, value = pushed
        return value, g, product

    return function


def label_interaction_cases(B: int, L: int, U: int) -> list[Case]:
    """Energy, gradient and product over labels."""
    return [
        Case(
            "label_interaction_all",
            f"B={B} L={L} U={U}",
            [(B, L), (B, L), (U, L), (U,)],
            energy_and_derivatives(energies.label_interaction_reference),
            direct(energies.label_interaction_all),
        )
    ]


def skip_chain_cases(B: int, T: int, K: int, D: int) -> list[Case]:
    """Energy, gradient and product over tags."""
    return [
        Case(
            "skip_chain_all",
            f"B={B} T={T} K={K} D={D}",
            [(B, T, K), (B, T, K), (D, K, K)],
            energy_and_derivatives(energies.skip_chain_reference),
            direct(energies.skip_chain_all),
        )
    ]


def layer_norm_cases(num_rows: int, width: int) -> list[Case]:
    """The four passes of layer norm."""
    reference = norms.layer_norm_reference
    rows, vector = (num_rows, width), (width,)
    point: list[tuple[int, ...]] = [rows, vector, vector]

    def backward(y_bar: Tensor, x: Tensor, w: Tensor, b: Tensor) -> Callable[[], Results]:
        _, *saved = layer_norm_passes.forward(x, w, b, EPS)
        return lambda: layer_norm_passes.backward(y_bar, x, w, *saved)

    def backward_tangent(
        y_bar: Tensor, x: Tensor, w: Tensor, b: Tensor, y_bar_dot: Tensor, x_dot: Tensor,
        w_dot: Tensor, b_dot: Tensor,
    ) -> Callable[[], Results]:  # fmt: skip
        _, *saved = layer_norm_passes.forward(x, w, b, EPS)
        return lambda: layer_norm_passes.backward_tangent(
            y_bar, y_bar_dot, x, x_dot, w, w_dot, *saved
        )

    kinds: dict[str, tuple[Shapes, Function, Callable[..., Callable[[], Results]]]] = {
        "forward": (
            point,
            lambda *x: (reference(*x),),
            direct(lambda *x: layer_norm_passes.forward(*x, EPS)[:1]),
        ),
        "forward_tangent": (
            2 * point,
            with_tangent(reference, 3),
            direct(norms.layer_norm_with_tangent),
        ),
        "backward": ([rows, *point], gradient_of(reference), backward),
        "backward_tangent": (
            2 * [rows, *point],
            tangent_of(gradient_of(reference), 4),
            backward_tangent,
        ),
    }
    name = f"rows={num_rows} width={width}"
    return [
        Case(f"layer_norm_{kind}", name, shapes, function, prepare)
        for kind, (shapes, function, prepare) in kinds.items()
    ]


def gelu_cases(num_rows: int, width: int) -> list[Case]:
    """The four passes of GELU."""
    reference, x = norms.gelu_reference, (num_rows, width)
    kinds: dict[str, tuple[int, Function, Function]] = {
        "forward": (1, lambda x: (reference(x),), lambda x: (gelu_passes.forward(x),)),
        "forward_tangent": (2, with_tangent(reference, 1), norms.gelu_with_tangent),
        "backward": (2, gradient_of(reference), lambda g, x: (gelu_passes.backward(g, x),)),
        "backward_tangent": (
            4,
            tangent_of(gradient_of(reference), 2),
            lambda g, x, g_dot, x_dot: (gelu_passes.backward_tangent(g, g_dot, x, x_dot),),
        ),
    }
    return [
        Case(f"gelu_{kind}", f"rows={num_rows} width={width}", [x] * num, function, direct(kernel))
        for kind, (num, function, kernel) in kinds.items()
    ]


def tree_shapes(num_blocks: int, width: int) -> list[tuple[int, ...]]:
    """Return the shapes of the parameters of transformer blocks."""
    d = width
    matrices = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)]
    biases = [(3 * d,), (d,), (4 * d,), (d,)]
    return [*matrices, *biases, *[(d,)] * 4] * num_blocks


def solver_cases(num_blocks: int, width: int) -> list[Case]:
    """The passes of a solver over the whole tree of a transformer."""
    tree = tree_shapes(num_blocks, width)

    def over_trees(function: Callable[..., Any], num_trees: int, num_written: int) -> Function:
        def flat(*x: Tensor) -> Results:
            split = [x[i * len(tree) : (i + 1) * len(tree)] for i in range(num_trees)]
            value = function(*split, *x[num_trees * len(tree) :])
            return (*x[: num_written * len(tree)], *(() if value is None else (value,)))

        return flat

    # Trees read, trees written (the first ones), scalars: alpha and the shift, beta, both.
    updates: dict[str, tuple[Callable[..., Any], Callable[..., Any], int, int, int]] = {
        "cg_update": (solver.cg_update_, solver.cg_update_reference, 4, 2, 2),
        "direction_update": (solver.direction_update_, solver.direction_update_reference, 2, 1, 1),
        "single_reduction_update": (
            solver.single_reduction_update_, solver.single_reduction_update_reference, 5, 4, 2,
        ),
        "dots": (
            lambda a, b: solver.dots([(a, a), (a, b)]),
            lambda a, b: solver.dots_reference([(a, a), (a, b)]),
            2, 0, 0,
        ),
    }  # fmt: skip
    return [
        Case(
            name,
            f"blocks={num_blocks} width={width}",
            tree * num_trees + [()] * num_scalars,
            over_trees(reference, num_trees, num_written),
            direct(over_trees(kernel, num_trees, num_written)),
        )
        for name, (kernel, reference, num_trees, num_written, num_scalars) in updates.items()
    ]


BUILDERS: dict[str, Callable[..., list[Case]]] = {
    "attention": attention_cases,
    "label_interaction": label_interaction_cases,
    "skip_chain": skip_chain_cases,
    "layer_norm": layer_norm_cases,
    "gelu": gelu_cases,
    "tree": solver_cases,
}


def build_cases(sizes: Sizes, only: str) -> list[Case]:
    """Return all cases whose kernel has `only` in its name."""
    cases = [case for name, build in BUILDERS.items() for s in sizes[name] for case in build(*s)]
    return [case for case in cases if only in case.what]
