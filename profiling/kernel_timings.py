"""Timings of a kernel beside its reference, compiled and eager, and beside the device's limit."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bench_hypergradient import COLUMNS, commit, time_side_by_side
from kernel_cases import Case, Function, Results
from kernel_errors import copies, error_of
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

SYSTEMS = ("ispen_dist", "reference", "compiled", "limit")
BACKEND = "inductor"
REPETITIONS = {"cuda": 30, "cpu": 11}
# Far beyond any L2 cache, and 0.3 ms of an H100, in which the host prepares the launch.
FLUSH_BYTES = 2**30
COPY_ELEMENTS = {"cuda": 2**28, "cpu": 2**22}
PRODUCT_SIZE = {"cuda": 8192, "cpu": 256}


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
