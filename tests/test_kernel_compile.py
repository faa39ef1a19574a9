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
# B, N, T, H of attention: 128 is a multiple of every block, and of the 16 that pointers and lengths
# are specialised on; 100 of neither.
ATTENTION = [
    ("bfloat16", (1, 2, 128, 64)),
    ("bfloat16", (2, 1, 100, 80)),
    ("float32", (1, 2, 128, 64)),
]
WIDTHS = (768, 8192)
# Bytes of local memory that a thread may store, by kernel, type and head size or block; a kernel
# that is not here stores none. The larger of Triton 3.6 and 3.9 each, which differ. IEEE products
# hold whole rows of both operands in registers (see `TILES_32_BITS`), so tangents in float32 spill.
KNOWN_SPILLS = {
    ("_forward_kernel/tangent", "float32", "64"): 552,
    ("_q_bar_kernel/tangent", "float32", "64"): 3848,
    ("_kv_bar_kernel/tangent", "float32", "64"): 4656,
    # Heads that are padded to 128, at lengths that do not divide.
    ("_forward_kernel/tangent", "bfloat16", "80"): 56,
    ("_kv_bar_kernel", "bfloat16", "80"): 12,
    ("_kv_bar_kernel/tangent", "bfloat16", "80"): 20,
    # The widest row, four vectors of 16 values per thread and the sums of w and b.
    ("_layer_norm_backward_tangent_kernel", "float32", "8192"): 124,
}


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
    # An operand of attention is a tensor with its strides; rows of heads carry the head size.
    tensors = [getattr(x, "pointer", x) for x in args]
    first = next(str(x.dtype)[6:] for x in tensors if hasattr(x, "dtype"))
    rows = [x for x in args if hasattr(x, "ROWS")]
    constants |= {"H": rows[0].H.value} if rows else {}
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
def compiling(modules, whole):
    """Have the launchers of modules compile what they launch; with `whole`, all their kernels."""
    names, launched = set(), set()
    for module in modules:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            names.add(name)
            setattr(module, name, CompiledAtLaunch(getattr(module, name), launched))
    yield
    assert not whole or launched == names, f"never launched: {names - launched}"


def launch_attention(forward, backward):
    for dtype, (B, N, T, H) in ATTENTION:
        x = torch.zeros(B, N, T, H, dtype=getattr(torch, dtype))
        point, scale = (x, x, x, torch.zeros(B, T)), H**-0.5
        o, lse2 = forward.attention_forward(*point, scale)
        forward.attention_forward_tangent(*point, x, x, x, scale)
        _, lse_dot = forward.attention_tangent(*point, o, lse2, x, x, x, scale)
        backward.attention_backward(*point, o, lse2, x, scale)
        D = backward.attention_row_dot(x, x, x, x)
        backward.attention_backward_tangent(*point, lse2, D, *[x] * 5, lse_dot, D, scale)


def launch_narrow(forward):
    """Launch what Triton 3.9 cannot compile, apart: it ends the process."""
    x = torch.zeros(1, 2, 128, 32)
    forward.attention_forward_tangent(x, x, x, None, x, x, x, 32**-0.5)


def launch_energies(label_interaction, skip_chain):
    for dtype in (torch.float32, torch.float64):
        y, M, v = (torch.zeros(shape, dtype=dtype) for shape in ((4, 159), (64, 159), (64,)))
        label_interaction.gradient(y, M, v)
        label_interaction.product(y, y, M, v)
        label_interaction.gradient_and_product(y, y, M, v)
        for tags in (25, skip_chain.MAX_TAGS) if dtype == torch.float32 else (25,):
            y, W = torch.zeros(4, 40, tags, dtype=dtype), torch.zeros(2, tags, tags, dtype=dtype)
            skip_chain.gradient(y, W)
            skip_chain.gradient_and_product(y, y, W)


def launch_norms(layer_norm, gelu):
    for width in WIDTHS:
        x, w = torch.zeros(64, width), torch.zeros(width)
        rows = x[:, 0], x[:, 0]
        layer_norm.forward(x, w, w, 1e-5)
        layer_norm.forward_with_tangent(x, w, w, x, w, w, 1e-5)
        layer_norm.tangent(x, w, w, x, w, w, 1e-5)
        layer_norm.backward(x, x, w, *rows)
        layer_norm.backward_tangent(x, None, x, x, w, w, *rows)
        layer_norm.backward_tangent(x, x, x, x, w, w, *rows)
    gelu.forward(x)
    gelu.forward_with_tangent(x, x)
    gelu.backward(x, x)
    gelu.backward_tangent(x, None, x, x)
    gelu.backward_tangent(x, x, x, x)


def launch_solver(solver):
    from ispen_kernels.trees import CHUNK

    for dtype in (torch.float32, torch.float64):
        for offset in (0, 1):  # a view that starts anywhere has no wide loads
            trees = [[torch.zeros(CHUNK + 4, dtype=dtype)[offset:]] for _ in range(5)]
            one = torch.ones((), dtype=dtype)
            solver.dots([(trees[0], trees[1])])
            solver.cg_update_(*trees[:4], one)
            solver.direction_update_(*trees[:2], one)
            solver.single_reduction_update_(*trees, one, one)


LAUNCHES = {
    "attention": (launch_attention, ("attention_forward", "attention_backward")),
    "energies": (launch_energies, ("label_interaction_passes", "skip_chain_passes")),
    "norms": (launch_norms, ("layer_norm_passes", "gelu_passes")),
    "solver": (launch_solver, ("solver",)),
    "narrow": (launch_narrow, ("attention_forward",)),
}
# Launches of a part of a module.
PARTS = ("narrow",)


def main(name: str) -> None:
    """Compile the kernels of some modules, and print a line for each."""
    import triton

    triton.runtime.driver.set_active(Hopper())
    triton.knobs.compilation.always_compile = True
    triton.knobs.nvidia.dump_ptxas_log = True
    launches, names = LAUNCHES[name]
    modules = [importlib.import_module(f"ispen_kernels.{each}") for each in names]
    with compiling(modules, whole=name not in PARTS):
        launches(*modules)


def missing() -> str | None:
    """Return why nothing can be compiled here."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    try:
        return None if Path(triton.knobs.nvidia.ptxas.path).is_file() else "no ptxas"
    except (AttributeError, RuntimeError) as error:
        return f"no ptxas: {error}"


def compiled_facts(name):
    """Compile the kernels of some modules in a process of its own."""
    reason = missing()
    if reason:
        pytest.skip(f"cannot compile for a GPU: {reason}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def known_spill(fact):
    """Return the bytes that this kernel is known to spill."""
    constants = fact["constants"]
    name = fact["kernel"] + ("/tangent" if constants.get("TANGENT") == "True" else "")
    size = constants.get("H") or constants.get("BLOCK", "")
    return KNOWN_SPILLS.get((name, fact["dtype"], size), 0)


@pytest.mark.parametrize("name", [name for name in LAUNCHES if name not in PARTS])
def test_kernels_compile_for_hopper(name):
    facts = compiled_facts(name)
    assert facts
    for fact in facts:
        assert fact["target"] == "sm_90a", fact
        assert fact["cubin_bytes"], fact
        assert not fact["tf32"], fact
        assert fact["spills"] <= known_spill(fact), fact
        if fact["dtype"] == "bfloat16" and fact["kernel"] != "_row_dot_kernel":
            assert fact["wide_products"], fact


def test_value_and_tangent_in_float32_compile_at_head_size_32():
    assert compiled_facts("narrow")


if __name__ == "__main__":
    main(sys.argv[1])
