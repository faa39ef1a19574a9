"""Every kernel compiles for Hopper without a GPU: no TF32, no local memory but where it is known.

As a program (`python tests/test_kernel_compile.py`) this file runs the launchers on CPU tensors,
with every kernel replaced by one that compiles for sm_90 where it would be launched, and prints a
JSON line per kernel: block sizes, types and specialisations are those of the launchers. The test
starts it as its own process, as Triton decides at import whether it interprets.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
KNOWN_SPILLS: dict[tuple[str, str], int] = {}


class CompiledAtLaunch:
    """Stands in for a kernel: compiles it for the arguments of a launch, and launches nothing."""

    def __init__(self, kernel, facts) -> None:
        self._kernel, self._facts = kernel, facts

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            with contextlib.redirect_stdout(io.StringIO()) as log:
                compiled = self._kernel.warmup(*args, grid=grid, **kwargs)
            self._facts.append(described(self._kernel.__name__, kwargs, compiled, log.getvalue()))

        return launch


def described(name, kwargs, compiled, log):
    """Return what the tests ask about one compiled kernel."""
    spills = re.findall(r"(\d+) bytes spill stores", log)
    assert spills, f"expected the log of ptxas, got {log!r}"
    texts = [str(compiled.asm[stage]) for stage in ("ttir", "ttgir", "ptx")]
    return {
        "kernel": name,
        "constants": {key: str(value) for key, value in kwargs.items()},
        "spills": max(map(int, spills)),
        "registers": max(map(int, re.findall(r"Used (\d+) registers", log))),
        "tf32": any("tf32" in text.lower() for text in texts),
        "wide_products": "wgmma.mma_async" in texts[-1],
        "target": re.findall(r"^\.target (\S+)", texts[-1], re.MULTILINE)[0].rstrip(","),
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
    """Have the launchers of a module compile; yield the growing list of facts."""
    facts = []
    names = [name for name in vars(module) if name.endswith("_kernel")]
    kernels = {name: getattr(module, name) for name in names}
    for name, kernel in kernels.items():
        setattr(module, name, CompiledAtLaunch(kernel, facts))
    yield facts
    assert {fact["kernel"] for fact in facts} == set(kernels), "a kernel was never launched"


def run_attention():
    import torch
    from ispen_kernels import attention

    with compiling(attention) as facts:
        for dtype, (B, N, T, S, H) in ATTENTION:
            q, o_bar, q_dot, o_bar_dot = torch.zeros(4, B, N, T, H, dtype=getattr(torch, dtype))
            k, v, k_dot, v_dot = torch.zeros(4, B, N, S, H, dtype=q.dtype)
            point, dots, scale = (q, k, v, torch.zeros(B, S)), (q_dot, k_dot, v_dot), H**-0.5
            begin = len(facts)
            o, lse2 = attention.attention_forward(*point, scale)
            attention.attention_forward_tangent(*point, *dots, scale)
            o_dot, lse_dot = attention.attention_tangent(*point, o, lse2, *dots, scale)
            attention.attention_backward(*point, o, lse2, o_bar, scale)
            D_dot = attention.attention_row_dot(o_bar, o_dot, o_bar_dot, o)
            attention.attention_backward_tangent(
                *point, lse2, D_dot, o_bar, *dots, o_bar_dot, lse_dot, D_dot, scale
            )
            for fact in facts[begin:]:
                fact |= {"dtype": dtype, "head_size": H, "ragged": T % 16 != 0}
    return facts


def run_energies():
    import torch
    from ispen_kernels import energies

    with compiling(energies) as facts:
        for dtype in (torch.float32, torch.float64):
            begin = len(facts)
            y, M, v = (torch.zeros(s, dtype=dtype) for s in ((4, 159), (64, 159), (64,)))
            energies._label_interaction_gradient(y, M, v)
            energies._label_interaction_product(y, y, M, v)
            energies._label_interaction_all(y, y, M, v)
            for tags in (25, energies.MAX_TAGS):
                y, W = torch.zeros(4, 40, tags, dtype=dtype), torch.zeros(2, tags, tags, dtype=dtype)
                energies._skip_chain_gradient(y, W)
                energies._skip_chain_all(y, y, W)
            for fact in facts[begin:]:
                fact["dtype"] = str(dtype)[6:]
    return facts


def run_norms():
    import torch
    from ispen_kernels import norms

    with compiling(norms) as facts:
        for width in (768, 200, norms.MAX_WIDTH):
            begin = len(facts)
            x, w = torch.zeros(64, width), torch.zeros(width)
            norms._layer_norm(x, w, w, 1e-5)
            norms._layer_norm_with_tangent(x, w, w, x, w, w, 1e-5)
            norms._layer_norm_tangent(x, w, w, x, w, w, 1e-5)
            norms._layer_norm_backward(x, x, w, x[:, 0], x[:, 0])
            for direction in (None, x):
                rows = x[:, 0], x[:, 0]
                norms._layer_norm_backward_tangent(x, direction, x, x, w, w, *rows)
            for fact in facts[begin:]:
                fact["width"] = width
        norms._gelu(x)
        norms._gelu_with_tangent(x, x)
        norms._gelu_backward(x, x)
        norms._gelu_backward_tangent(x, None, x, x)
        norms._gelu_backward_tangent(x, x, x, x)
    return [fact | {"dtype": "float32"} for fact in facts]


def run_solver():
    import torch
    from ispen_kernels import solver

    with compiling(solver) as facts:
        for dtype in (torch.float32, torch.float64):
            for offset in (0, 1):  # a view that starts anywhere has no wide loads
                begin = len(facts)
                trees = [[torch.zeros(solver.CHUNK + 4, dtype=dtype)[offset:]] for _ in range(5)]
                one = torch.ones((), dtype=dtype)
                solver.dots([(trees[0], trees[1])])
                solver.cg_update_(*trees[:4], one)
                solver.direction_update_(*trees[:2], one)
                solver.single_reduction_update_(*trees, one, one)
                for fact in facts[begin:]:
                    fact["dtype"] = str(dtype)[6:]
    return facts


RUNS = {"attention": run_attention, "energies": run_energies, "norms": run_norms,
        "solver": run_solver}  # fmt: skip


def main() -> None:
    import triton

    triton.runtime.driver.set_active(Hopper())
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    for module in sys.argv[1:] or RUNS:
        for fact in RUNS[module]():
            print(json.dumps(fact | {"module": module}), flush=True)


if __name__ == "__main__":
    main()
