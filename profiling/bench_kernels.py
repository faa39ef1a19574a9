"""How fast every Triton kernel is beside plain and compiled PyTorch, and beside the device's limit.

    python profiling/bench_kernels.py
    python profiling/bench_kernels.py --shapes full --output profiling/results/bench_kernels.csv
    python profiling/bench_kernels.py --only layer_norm

Every kernel is first compared with its reference in float64: an error above twice that of eager
PyTorch in the same type, plus one rounding of the result, ends the program before anything is
timed. `reference` is the plain PyTorch of `ispen_kernels`, `compiled` its trace by make_fx under
torch.compile, compilation excluded; a derivative is that of the reference by torch.func. The
verdict compares with `compiled`, and the CSV column `ratio_to_gradient`, shared with the other
benchmarks, holds here the ratio to `compiled`.

All timings of a repetition run side by side, on a GPU between two events and after a write that
empties the L2 cache; figures are medians. `limit` is measured in the same run: a large copy, in
bytes read and written, and for attention a large matrix product of the same type. A kernel of
known traffic is rated by the bytes of its inputs and results, each once.

Attention is rated in units of F = 4 B N T S H, the two products of a forward pass. TFLOP/s count
1 F for the value, 2 F for value and tangent, 3.5 F for value and gradient (five more products), and
7 F for the gradient with its tangent: a tangent doubles. `made` counts the products that our
kernels make, 1, 3, 4.5 and 12 F, as they rebuild the weights instead of keeping them: their share
of the limit is that of products made. Derivatives start from q, k and v alone, in every system.
Memory is linear in T where its bytes per entry of q are the same at two lengths.

On a CPU the kernels run in Triton's interpreter: they are checked at tiny shapes and not timed, as
the time of an interpreter says nothing; the references are. No other flag changes this.
"""

import argparse
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_hypergradient import COLUMNS, append_rows, commit, time_side_by_side
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is imported

from ispen_kernels import attention, energies, norms, solver

Results = Sequence[Tensor]
Function = Callable[..., Results]
Shapes = Sequence[tuple[int, ...]]

SYSTEMS = ("ispen_dist", "reference", "compiled", "limit")
BACKEND = "inductor"
REPETITIONS = {"cuda": 30, "cpu": 11}
# No case is begun after this, so that a run with all its compilations ends within ten minutes.
BUDGET_S = 480.0
# Far beyond any L2 cache, and 0.3 ms of an H100, in which the host prepares the launch.
FLUSH_BYTES = 2**30
COPY_ELEMENTS = {"cuda": 2**28, "cpu": 2**22}
PRODUCT_SIZE = {"cuda": 8192, "cpu": 256}
EPS = 1e-5
# In units of F, see the top of the file.
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
        _, *saved = norms._layer_norm(x, w, b, EPS)
        return lambda: norms._layer_norm_backward(y_bar, x, w, *saved)

    def backward_tangent(
        y_bar: Tensor, x: Tensor, w: Tensor, b: Tensor, y_bar_dot: Tensor, x_dot: Tensor,
        w_dot: Tensor, b_dot: Tensor,
    ) -> Callable[[], Results]:  # fmt: skip
        _, *saved = norms._layer_norm(x, w, b, EPS)
        return lambda: norms._layer_norm_backward_tangent(
            y_bar, y_bar_dot, x, x_dot, w, w_dot, *saved
        )

    kinds: dict[str, tuple[Shapes, Function, Callable[..., Callable[[], Results]]]] = {
        "forward": (
            point,
            lambda *x: (reference(*x),),
            direct(lambda *x: norms._layer_norm(*x, EPS)[:1]),
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
        "forward": (1, lambda x: (reference(x),), lambda x: (norms._gelu(x),)),
        "forward_tangent": (2, with_tangent(reference, 1), norms.gelu_with_tangent),
        "backward": (2, gradient_of(reference), lambda g, x: (norms._gelu_backward(g, x),)),
        "backward_tangent": (
            4,
            tangent_of(gradient_of(reference), 2),
            lambda g, x, g_dot, x_dot: (norms._gelu_backward_tangent(g, g_dot, x, x_dot),),
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


def copies(inputs: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return copies, as some functions change their inputs."""
    return [x.to(dtype or x.dtype, copy=True) for x in inputs]


def error_of(results: Results, exact: Results) -> float:
    """Return the largest relative error of a result, in the Euclidean norm; infinite if not finite.

    A norm of zero counts as one.
    """
    worst = 0.0
    for got, truth in zip(results, exact, strict=True):
        size = truth.norm().item() or 1.0
        error = (got.double() - truth).norm().item() / size
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def check(case: Case, device: torch.device) -> dict[str, float]:
    """Return the errors of kernel and reference against float64."""
    inputs = case.inputs(device, check=True)
    exact = case.reference(*copies(inputs, torch.float64))
    return {
        "ispen_dist": error_of(case.prepare(*copies(inputs))(), exact),
        "reference": error_of(case.reference(*copies(inputs)), exact),
    }


def check_all(cases: list[Case], device: torch.device) -> list[dict[str, float]]:
    """Check every case; refuse to go on where a kernel is worse than it may be.

    A result is rounded by at most half an eps, and so may be that of a reference that is exact
    otherwise: the floor is twice that.
    """
    errors = [check(case, device) for case in cases]
    wrong = [
        f"{case.what} {case.problem}: error {e['ispen_dist']:.1e}, eager {e['reference']:.1e}"
        for case, e in zip(cases, errors, strict=True)
        if not e["ispen_dist"] <= 2 * e["reference"] + torch.finfo(case.dtype).eps
    ]
    if wrong:
        sys.exit("error: expected errors of at most twice eager's, got " + "; ".join(wrong))
    return errors


def compiled_reference(case: Case, inputs: Sequence[Tensor]) -> Function:
    """Trace the reference, compile it for such inputs and run it once on copies."""
    torch._dynamo.reset()
    # Traced without memory: eager derivatives at the largest shapes may not fit.
    graph = make_fx(case.reference, tracing_mode="fake")(*inputs)
    # Forward mode leaves questions about storage in a trace, which the compiler refuses.
    graph.graph.eliminate_dead_code()
    graph.recompile()
    function = torch.compile(graph, backend=BACKEND, fullgraph=True, dynamic=False)

    def run(*x: Tensor) -> Results:
        with torch.no_grad():
            return function(*x)

    run(*copies(inputs))
    return run


def systems_of(
    case: Case, device: torch.device, errors: dict[str, float], left_out: dict[str, str]
) -> dict[str, Callable[[], Results]]:
    """Return what is timed by name; what cannot run is left out, with the reason.

    The error of the compiled reference is entered where its inputs are small enough for float64.
    """
    inputs = case.inputs(device)
    works: dict[str, Callable[[], Results]] = {"reference": lambda: case.reference(*inputs)}
    if device.type == "cuda":
        works["ispen_dist"] = case.prepare(*inputs)
        works |= {name: partial(function, *inputs) for name, function in case.others.items()}
    kept = {name: work for name, work in works.items() if _runs(name, work, left_out)}
    try:
        # From fresh inputs, as the others have changed theirs.
        compiled = compiled_reference(case, case.inputs(device))
        if case.check_shapes in (None, case.shapes):
            exact = case.reference(*copies(case.inputs(device), torch.float64))
            errors["compiled"] = error_of(compiled(*case.inputs(device)), exact)
        kept["compiled"] = partial(compiled, *inputs)
    except Exception as error:
        # Whatever the compiler cannot do is a finding about it, not the end of the benchmark.
        left_out["compiled"] = _reason(error)
    return kept


def _runs(name: str, work: Callable[[], Results], left_out: dict[str, str]) -> bool:
    try:
        work()
    except (torch.OutOfMemoryError, RuntimeError, NotImplementedError) as error:
        if name == "ispen_dist":
            raise
        left_out[name] = _reason(error)
        return False
    return True


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"


def time_all(
    works: Mapping[str, Callable[[], Any]], device: torch.device
) -> dict[str, list[float]]:
    """Return seconds by name, side by side; on a GPU by events and with a cold L2 cache."""
    repetitions = REPETITIONS[device.type]
    if device.type != "cuda":
        return time_side_by_side(dict(works), repetitions, device)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in works}
    for _ in range(repetitions + 2):
        for name, work in works.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            begin.record()
            work()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {n: [b.elapsed_time(e) / 1e3 for b, e in pairs[2:]] for n, pairs in events.items()}


def peak_bytes(work: Callable[[], Results], device: torch.device) -> int | None:
    """Return the peak of one call beyond what was allocated before, results included; GPU only."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def moved_bytes(case: Case, device: torch.device) -> int:
    """Return the bytes of inputs and results, each once."""
    inputs = case.inputs(device)
    return sum(x.numel() * x.element_size() for x in (*inputs, *case.reference(*inputs)))


@dataclass(frozen=True)
class Measured:
    """One timing: a row of the table and of the CSV file.

    Attributes:
        rate: TFLOP/s or GB/s as counted.
        share: of the limit, by products made or bytes.
    """

    system: str
    what: str
    problem: str
    seconds: list[float]
    error: float | None = None
    peak: int | None = None
    ratio: float | None = None
    rate: float | None = None
    unit: str = "GB/s"
    share: float | None = None

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def row(self, device: str) -> list[object]:
        """Return the row of the CSV file, see `COLUMNS`."""
        p20, p80 = (statistics.quantiles(self.seconds, n=5)[i] for i in (0, 3))
        times = [f"{t:.3e}" for t in (self.median, p20, p80)]
        ratio = "" if self.ratio is None else f"{self.ratio:.3f}"
        error = "" if self.error is None else f"{self.error:.1e}"
        peak = "" if self.peak is None else self.peak
        row: list[object] = [
            self.system, self.what, self.problem, device, torch.get_num_threads(), *times, ratio,
            error, peak, versions(), commit(),
        ]  # fmt: skip
        assert len(row) == len(COLUMNS)
        return row


def versions() -> str:
    """Return what was measured with."""
    import triton

    return f"torch {torch.__version__} triton {triton.__version__}"


def measure_limits(cases: list[Case], device: torch.device) -> dict[str, Measured]:
    """Time a large copy, and a large product in every type of attention."""
    source = torch.ones(COPY_ELEMENTS[device.type], device=device)
    work: Callable[[], Any] = partial(torch.empty_like(source).copy_, source)
    seconds = time_all({"copy": work}, device)["copy"]
    moved = 8.0 * source.numel()
    rate = moved / statistics.median(seconds) / 1e9
    limits = {"copy": Measured("limit", "copy", f"{moved:.0f} bytes", seconds, rate=rate)}
    n = PRODUCT_SIZE[device.type]
    for dtype in {case.dtype for case in cases if case.made}:
        a = torch.randn(n, n, device=device).to(dtype)
        work = partial(torch.matmul, a, a)
        seconds = time_all({"product": work}, device)["product"]
        rate = 2.0 * n**3 / statistics.median(seconds) / 1e12
        name = str(dtype)[6:]
        limits[name] = Measured(
            "limit", "matrix product", f"{n} {name}", seconds, rate=rate, unit="TFLOP/s"
        )
    return limits


def measure(
    case: Case,
    errors: dict[str, float],
    limits: dict[str, Measured],
    device: torch.device,
    left_out: dict[str, str],
) -> list[Measured]:
    """Time all systems on one case."""
    works = systems_of(case, device, errors, left_out)
    seconds = time_all(works, device)
    peaks = {name: peak_bytes(work, device) for name, work in works.items()}
    unit = statistics.median(seconds["compiled"]) if "compiled" in seconds else None
    limit = limits[str(case.dtype)[6:] if case.made else "copy"].rate or 1.0
    amount = case.counted / 1e12 if case.made else moved_bytes(case, device) / 1e9
    result = []
    for name, times in seconds.items():
        median = statistics.median(times)
        system, what = (
            (name, case.what) if name in SYSTEMS else ("reference", f"{case.what}, {name}")
        )
        made = case.made / case.counted if case.made and name == "ispen_dist" else 1.0
        result.append(
            Measured(
                system,
                what,
                case.problem,
                times,
                errors.get(name),
                peaks[name],
                None if unit is None else median / unit,
                amount / median,
                "TFLOP/s" if case.made else "GB/s",
                made * amount / median / limit,
            )
        )
    return result


def verdict(case: Case, result: list[Measured], left_out: dict[str, str]) -> str:
    """Say whether the door should use the kernel at this shape."""
    median = {m.system: m.median for m in result if m.what == case.what}
    if "ispen_dist" not in median:
        said = "checked, not timed: no GPU"
    elif "compiled" not in median:
        said = f"use (compiled: {left_out.get('compiled', 'left out')})"
    elif median["ispen_dist"] < median["compiled"]:
        said = "use"
    else:
        said = "slower than compiled: not used"
    return f"{case.what} {case.problem}: {said}"


def goals(result: list[Measured]) -> list[str]:
    """Say what attention reaches, beside math mode and by itself, and its memory per entry of q."""
    lines = []
    ours = {(m.what, m.problem): m for m in result if m.system == "ispen_dist"}
    for m in result:
        if m.what.endswith(", sdpa math"):
            own = ours[m.what.removesuffix(", sdpa math"), m.problem]
            ratio = m.median / own.median
            lines.append(f"{own.what} {own.problem}: {ratio:.2f} times as fast as math mode")
    for (what, problem), m in ours.items():
        if what.startswith("attention") and m.peak and m.rate:
            kind = what.removeprefix("attention_")
            made = m.rate * MADE[kind] / COUNTED[kind]
            each = m.peak / math.prod(int(part.split("=")[1]) for part in problem.split()[:4])
            lines.append(
                f"{what} {problem}: {m.rate:.0f} TFLOP/s, {made:.0f} by products made, "
                f"peak {m.peak / 1e6:.0f} MB, {each:.2f} bytes per entry of q"
            )
    return lines


def show(result: list[Measured], device: str, console: Console) -> None:
    """Print the table."""
    table = Table(title=f"medians on {device}, {versions()}")
    for i, column in enumerate(
        ("what", "problem", "system", "median ms", "to compiled", "rate", "of limit", "peak MB",
         "error")
    ):  # fmt: skip
        table.add_column(column, justify="left" if i < 3 else "right", no_wrap=i == 0)
    for m in result:
        table.add_row(
            m.what,
            m.problem,
            m.system,
            f"{1e3 * m.median:.4f}",
            "" if m.ratio is None else f"{m.ratio:.2f}",
            "" if m.rate is None else f"{m.rate:.4g} {m.unit}",
            "" if m.share is None else f"{100 * m.share:.0f}%",
            "" if m.peak is None else f"{m.peak / 1e6:.1f}",
            "" if m.error is None else f"{m.error:.1e}",
        )
    console.print(table)


def run(
    cases: list[Case], device: torch.device, console: Console
) -> tuple[list[Measured], list[str]]:
    """Check everything, then time everything; return the measurements and lines to print last."""
    begin = time.perf_counter()
    all_errors = check_all(cases, device)
    console.print(f"{len(cases)} kernels and shapes are as exact as eager PyTorch")
    limits = measure_limits(cases, device)
    result, lines = list(limits.values()), []
    for case, errors in zip(cases, all_errors, strict=True):
        if time.perf_counter() - begin > BUDGET_S:
            lines.append(f"{case.what} {case.problem}: left out, out of time; use --only")
            continue
        left_out: dict[str, str] = {}
        measured = measure(case, errors, limits, device, left_out)
        result += measured
        lines.append(verdict(case, measured, left_out))
        lines += [f"  without {name}: {reason}" for name, reason in left_out.items()]
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return result, [*goals(result), *lines]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="CSV file the rows are appended to")
    parser.add_argument("--shapes", choices=("quick", "full"), default="quick", help="on a GPU")
    parser.add_argument("--only", default="", help="kernels with this in their name")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    cases = build_cases({"quick": QUICK, "full": FULL}[options.shapes] if on_gpu else TINY,
                        options.only)  # fmt: skip
    if not cases:
        names = sorted({case.what for case in build_cases(TINY, "")})
        parser.error(f"--only: expected part of one of {', '.join(names)}, got {options.only!r}")
    console = Console(width=None if sys.stdout.isatty() else 160)
    if not on_gpu:
        console.print("no GPU: kernels run in Triton's interpreter, checked and not timed")
    result, lines = run(cases, device, console)
    name = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} cpu"
    show(result, name, console)
    for line in lines:
        console.print(line, highlight=False, markup=False)
    if options.output:
        append_rows(options.output, [m.row(name) for m in result])


if __name__ == "__main__":
    main()
