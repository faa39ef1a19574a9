"""Every kernel compiles for Hopper without a GPU: no TF32, no local memory but where it is known.

As a program (`python tests/test_kernel_compile.py`) this file runs the launchers on CPU tensors,
with every kernel replaced by one that compiles for sm_90 where it would be launched, and prints a
JSON line per kernel: block sizes, types and specialisations are those of the launchers. The test
starts it as its own process, as Triton decides at import whether it interprets.
"""

import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TARGET = ("cuda", 90, 32)
# 128 is a multiple of every block and of the 16 that pointers and lengths are specialised on; 100
# of neither. B, N, T, S, H of attention, with the types it is launched in at that shape.
EVEN, RAGGED = (1, 2, 128, 128), (2, 1, 100, 100)
ATTENTION = [
    ("bfloat16", (*EVEN, 64)),
    ("bfloat16", (*EVEN, 128)),
    ("bfloat16", (*RAGGED, 80)),
    ("float16", (*EVEN, 64)),
    ("float32", (*EVEN, 32)),
    ("float32", (*EVEN, 64)),
]
# Bytes of local memory per thread that may be stored. IEEE products of float32 hold whole rows of
# both operands in registers, see `TILES_32_BITS`: only their tangents at heads from 64 spill.
WIDTHS = (768, 8192)
KNOWN_SPILLS: dict[tuple[str, str], int] = {}


class CompiledAtLaunch:
    """Stands in for a kernel: compiles it for the arguments of a launch, and launches nothing."""

    def __init__(self, kernel, launched) -> None:
        self._kernel, self._launched = kernel, launched

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self._launched.add(self._kernel.__name__)
            with contextlib.redirect_stdout(io.StringIO()) as log:
                compiled = self._kernel.warmup(*args, grid=grid, **constants)
            # Without a log it was compiled before, for an earlier launch of the same kinds.
            if log.getvalue():
                fact = described(self._kernel.__name__, args, constants, compiled, log.getvalue())
                print(json.dumps(fact), flush=True)

        return launch


def described(name, args, constants, compiled, log):
    """Return what the tests ask about one compiled kernel."""
    first = next(str(x.dtype)[6:] for x in args if hasattr(x, "dtype"))
    dtype = {"fp32": "float32", "fp64": "float64"}.get(str(constants.get("DTYPE")), first)
    constants = {key: str(value) for key, value in constants.items()}
    texts = [str(compiled.asm[stage]) for stage in ("ttir", "ttgir", "ptx")]
    return {
        "kernel": name,
        "dtype": dtype,
        "constants": constants,
        "spills": max(map(int, re.findall(r"(\d+) bytes spill stores", log))),
        "tf32": any("tf32" in text.lower() for text in texts),
        "wide_products": "wgmma.mma_async" in texts[-1],
        "target": re.findall(r"^\.target (\w+)", texts[-1], re.MULTILINE)[0],
        "cubin_bytes": len(compiled.asm["cubin"]),
    }


class Hopper:
    """As much of a driver of Triton as a compilation asks for."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGET)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling(module):
    """Have the launchers of a module compile what they launch, all its kernels."""
    kernels = {name: x for name, x in vars(module).items() if name.endswith("_kernel")}
    launched: set[str] = set()
    for name, kernel in kernels.items():
        setattr(module, name, CompiledAtLaunch(kernel, launched))
    yield
    assert launched == set(kernels), f"never launched: {set(kernels) - launched}"


def launch_attention(module):
    for dtype, (B, N, T, S, H) in ATTENTION:
        q, o_bar, q_dot, o_bar_dot = torch.zeros(4, B, N, T, H, dtype=getattr(torch, dtype))
        k, v, k_dot, v_dot = torch.zeros(4, B, N, S, H, dtype=q.dtype)
        point, dots, scale = (q, k, v, torch.zeros(B, S)), (q_dot, k_dot, v_dot), H**-0.5
        o, lse2 = module.attention_forward(*point, scale)
        module.attention_forward_tangent(*point, *dots, scale)
        o_dot, lse_dot = module.attention_tangent(*point, o, lse2, *dots, scale)
        module.attention_backward(*point, o, lse2, o_bar, scale)
        D_dot = module.attention_row_dot(o_bar, o_dot, o_bar_dot, o)
        module.attention_backward_tangent(
            *point, lse2, D_dot, o_bar, *dots, o_bar_dot, lse_dot, D_dot, scale
        )


def launch_energies(module):
    for dtype in (torch.float32, torch.float64):
        y, M, v = (torch.zeros(shape, dtype=dtype) for shape in ((4, 159), (64, 159), (64,)))
        module._label_interaction_gradient(y, M, v)
        module._label_interaction_product(y, y, M, v)
        module._label_interaction_all(y, y, M, v)
        for tags in (25, module.MAX_TAGS):
            y, W = torch.zeros(4, 40, tags, dtype=dtype), torch.zeros(2, tags, tags, dtype=dtype)
            module._skip_chain_gradient(y, W)
            module._skip_chain_all(y, y, W)


def launch_norms(module):
    for width in WIDTHS:
        x, w = torch.zeros(64, width), torch.zeros(width)
        rows = x[:, 0], x[:, 0]
        module._layer_norm(x, w, w, 1e-5)
        module._layer_norm_with_tangent(x, w, w, x, w, w, 1e-5)
        module._layer_norm_tangent(x, w, w, x, w, w, 1e-5)
        module._layer_norm_backward(x, x, w, *rows)
        module._layer_norm_backward_tangent(x, None, x, x, w, w, *rows)
        module._layer_norm_backward_tangent(x, x, x, x, w, w, *rows)
    module._gelu(x)
    module._gelu_with_tangent(x, x)
    module._gelu_backward(x, x)
    module._gelu_backward_tangent(x, None, x, x)
    module._gelu_backward_tangent(x, x, x, x)


def launch_solver(module):
    for dtype in (torch.float32, torch.float64):
        for offset in (0, 1):  # a view that starts anywhere has no wide loads
            trees = [[torch.zeros(module.CHUNK + 4, dtype=dtype)[offset:]] for _ in range(5)]
            one = torch.ones((), dtype=dtype)
            module.dots([(trees[0], trees[1])])
            module.cg_update_(*trees[:4], one)
            module.direction_update_(*trees[:2], one)
            module.single_reduction_update_(*trees, one, one)


LAUNCHES = {
    "attention": launch_attention,
    "energies": launch_energies,
    "norms": launch_norms,
    "solver": launch_solver,
}


def main() -> None:
    """Compile the kernels of one module, and print a line for each."""
    import triton

    triton.runtime.driver.set_active(Hopper())
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    module = importlib.import_module(f"ispen_kernels.{sys.argv[1]}")
    with compiling(module):
        LAUNCHES[sys.argv[1]](module)


if __name__ == "__main__":
    main()
