"""What a curvature product and a hypergradient cost, in gradients of the same inner loss.

    python profiling/bench_hypergradient.py --problem bibtex --peers
    python profiling/bench_hypergradient.py --problem transformer --peers --output FILE.csv

Systems: `reference` is plain eager PyTorch with the graph of the gradient kept, and its gradient
the unit of all ratios; `ispen_dist` is the compiled path (`compile.curvature=true`); the others
are in `peers.py`. What is compiled or traced happens once per shape and is not timed. All systems
run side by side, repetition by repetition, and figures are medians. Nothing is timed before it has
been compared with float64; a wrong result of ours ends the program, one of a peer is marked.

`peak_bytes`: most bytes allocated at a time beyond those before the call, by the allocator's events
(CPU: torch.profiler, so none for JAX). For a product it includes building the operator.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from bench_problems import PROBLEMS, Problem, TransformerSizes, build_problem
from csv_rows import append_rows
from peers import PEERS
from rich.console import Console
from rich.table import Table

import ispen_dist
from ispen_dist.graphs.compiler import Compiler
from ispen_dist.graphs.operators import CompiledFunction, CompiledOperator
from ispen_dist.implicit import staged_hypergradient
from ispen_dist.linalg import trees
from ispen_dist.linalg.operators import CurvatureOperator, build_operator
from ispen_dist.linalg.trees import Tree
from ispen_dist.ops import using_kernels

ROOT = Path(__file__).resolve().parent.parent
MAX_ERROR = 1e-4
"""Of products and hypergradients in float32. A wrong second derivative is off by 1e-2 or more."""
MAX_PEER_ERROR = 1e-3
COLUMNS = (
    "system", "what", "problem", "device", "threads", "median_s", "p20_s", "p80_s",
    "ratio_to_gradient", "error", "peak_bytes", "versions", "commit",
)  # fmt: skip
CURVATURES = {"hessian_product": "hessian", "gauss_newton_product": "gauss_newton"}


@dataclass(frozen=True)
class Work:
    """One thing that is timed.

    Attributes:
        system: whose.
        what: one of the names in the CSV.
        run: does it and returns the result.
        whole: the same with all that is done once per solve, for memory; None where it is `run`.
        versions: of the packages.
    """

    system: str
    what: str
    run: Callable[[], Tree]
    whole: Callable[[], Tree] | None = None
    versions: str = f"torch {torch.__version__}"


Result = TypeVar("Result")


# -- the systems ---------------------------------------------------------------------------------


def plainly(run: Callable[[], Result]) -> Callable[[], Result]:
    """Return work that runs on plain PyTorch operations alone."""

    def told() -> Result:
        with using_kernels("reference"):
            return run()

    return told


def reference(problem: Problem, steps: Sequence[int]) -> list[Work]:
    """Return the work of plain PyTorch."""
    v = problem.direction()
    result = [Work("reference", "gradient", plainly(problem.gradient))]
    for what, curvature in CURVATURES.items():

        def build(curvature: str = curvature) -> CurvatureOperator:
            return build_operator(curvature, problem.inner(), problem.theta, problem.phi)

        run, whole = product_of(plainly(build), v)
        result.append(Work("reference", what, plainly(run), plainly(whole)))
    for n in steps:
        run = plainly(partial(_value_of, partial(problem.hypergradient, n)))
        result.append(Work("reference", f"hypergradient_{n}", run))
    return result


def product_of(
    build: Callable[[], CurvatureOperator], v: Tree
) -> tuple[Callable[[], Tree], Callable[[], Tree]]:
    """Return a product with an operator that is there, and one that builds it first."""
    operator = build()
    return lambda: operator.matvec(v), lambda: build().matvec(v)


def _value_of(solve: Callable[[], ispen_dist.Hypergradient]) -> Tree:
    return solve().value


def compiled_reference(problem: Problem) -> Work:
    """Return the gradient of the inner loss by torch.compile of the network."""
    network = problem.players.inference_net
    model = torch.compile(network, dynamic=False)
    losses, batch = problem.losses, problem.batch

    def run() -> Tree:
        network.train()
        parameters = dict(network.named_parameters())
        b = problem.players.potentials(batch, problem.phi)
        total, count = losses.inner_output(batch, model(batch.inputs), b, problem.phi)
        grads = torch.autograd.grad(total / count, list(parameters.values()))
        return dict(zip(parameters, grads, strict=True))

    return Work("reference", "gradient_compiled", plainly(run))


def ours(problem: Problem, steps: Sequence[int], compiler: Compiler) -> list[Work]:
    """Return the work of the compiled path."""
    v = problem.direction()

    def gradient() -> Tree:
        loss = problem.inner_staged()
        function = CompiledFunction(loss.model, compiler, "gradient")
        return function.pull_back(loss.at(function.z, create_graph=False).z_bar)

    result = [Work("ispen_dist", "gradient_compiled", gradient)]
    for what, curvature in CURVATURES.items():

        def build(curvature: str = curvature) -> CompiledOperator:
            return CompiledOperator(problem.inner_staged(), compiler, curvature)

        result.append(Work("ispen_dist", what, *product_of(build, v)))

    def solve(num_steps: int) -> ispen_dist.Hypergradient:
        return staged_hypergradient(
            problem.inner_staged(),
            problem.outer_staged(),
            solver=ispen_dist.CG(num_steps, 0.0),
            damping=problem.damping,
            compiler=compiler,
        )

    result += [
        Work("ispen_dist", f"hypergradient_{n}", partial(_value_of, partial(solve, n)))
        for n in steps
    ]
    return result


def peers(problem: Problem, steps: Sequence[int], console: Console) -> list[Work]:
    """Return the work of every peer that is installed; says which are not."""
    result = []
    for name, peer in PEERS.items():
        reason = peer.available()
        if reason is not None:
            console.print(f"{name}: not measured, {reason}", markup=False)
            continue
        gradient, product = peer.gradient(problem), peer.product(problem, problem.direction())
        if gradient is not None:
            result.append(Work(name, "gradient_compiled", gradient, versions=peer.versions()))
        if product is not None:
            result.append(Work(name, "hessian_product", product, versions=peer.versions()))
        result += [
            Work(
                name, f"hypergradient_{n}", peer.hypergradient(problem, n), versions=peer.versions()
            )
            for n in steps
        ]
    return result


# -- measuring -----------------------------------------------------------------------------------


def relative_error(value: Tree, reference: Tree) -> float:
    """Return |value - reference| / |reference| over the whole tree, in float64."""
    wide = {k: value[k].to(reference[k]) for k in reference}
    return (trees.norm(trees.add_scaled(wide, -1.0, reference)) / trees.norm(reference)).item()


def time_side_by_side(
    work: dict[str, Callable[[], Tree]],
    repetitions: int,
    device: torch.device,
    warmups: int = 2,
) -> dict[str, list[float]]:
    """Return seconds by name; every repetition runs each piece of work in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for repetition in range(repetitions + warmups):
        for name, function in work.items():
            begin = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repetition >= warmups:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def peak_bytes(function: Callable[[], Tree], device: torch.device) -> int:
    """Return the most bytes of one call beyond what was allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        function()
    held = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def commit() -> str:
    """Return the commit of this checkout, with a mark where it has changes."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def float64_results(
    name: str, device: torch.device, sizes: TransformerSizes | None, steps: Sequence[int]
) -> dict:
    """Return every result of plain PyTorch in float64, by name."""
    problem = build_problem(name, device, torch.float64, sizes)
    results = {work.what: work.run() for work in reference(problem, steps)}
    return results | {"gradient_compiled": results["gradient"]}


def errors_of(work: list[Work], wanted: dict[str, Tree]) -> list[float]:
    """Compare every result with float64; ends the program where one of ours is wrong."""
    errors = [relative_error(w.run(), wanted[w.what]) for w in work]
    own = {"reference", "ispen_dist"}
    wrong = {
        f"{w.system} {w.what}": error
        for w, error in zip(work, errors, strict=True)
        if w.system in own and not error < MAX_ERROR
    }
    if wrong:
        sys.exit(f"error: expected errors below {MAX_ERROR:g} against float64, got {wrong}")
    return errors


def rows(
    problem: Problem,
    work: list[Work],
    errors: list[float],
    repetitions: tuple[int, int],
    *,
    peak_of_solves: bool,
) -> list[list]:
    """Time the work and return one CSV row each.

    Args:
        problem: what is worked on.
        work: of all systems.
        errors: against float64.
        repetitions: of gradients and products, and of hypergradients; the unit runs beside both.
        peak_of_solves: measure the memory of whole hypergradients too, one more run of each.
    """
    device = problem.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine() + " cpu"
    unit = next(w for w in work if w.what == "gradient")
    seconds: dict[int, tuple[list[float], list[float]]] = {}
    for is_long, number in enumerate(repetitions):
        part = [
            i for i, w in enumerate(work) if w.what.startswith("hypergradient") == bool(is_long)
        ]
        # What was compared with float64 has run once; that was the warm-up.
        timed = time_side_by_side(
            {str(i): work[i].run for i in part} | {"unit": unit.run}, number, device, 0
        )
        seconds |= {i: (timed[str(i)], timed["unit"]) for i in part}
    result = []
    for i, w in enumerate(work):
        times, units = seconds[i]
        # The ratio within each repetition, since what else runs on the machine slows both.
        ratio = statistics.median(t / unit for t, unit in zip(times, units, strict=True))
        middle = statistics.median(times)
        spread = statistics.quantiles(times, n=5) if len(times) > 1 else [middle] * 4
        seen = w.system != "jax" and (peak_of_solves or not w.what.startswith("hypergradient"))
        peak = peak_bytes(w.whole or w.run, device) if seen else ""
        versions = f"{w.versions} python {platform.python_version()}"
        result.append(
            [w.system, w.what, problem.name, name, torch.get_num_threads(), f"{middle:.6f}",
             f"{spread[0]:.6f}", f"{spread[3]:.6f}", f"{ratio:.2f}", f"{errors[i]:.1e}",
             peak, versions, commit()]
        )  # fmt: skip
    return result


def show(title: str, result: list[list], console: Console) -> None:
    """Print the rows as a table; results of peers that are wrong are marked."""
    table = Table(title=title)
    for column in ("system", "what", "median ms", "p20", "p80", "gradients", "error", "peak MB"):
        table.add_column(column, justify="left" if column in ("system", "what") else "right")
    for row in sorted(result, key=lambda r: (r[1], float(r[8]))):
        times = [f"{1e3 * float(t):.2f}" for t in row[5:8]]
        error = row[9] + (" WRONG" if float(row[9]) > MAX_PEER_ERROR else "")
        peak = f"{row[10] / 1e6:.0f}" if row[10] != "" else ""
        table.add_row(row[0], row[1], *times, row[8], error, peak)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", choices=sorted(PROBLEMS), default="bibtex")
    parser.add_argument("--peers", action="store_true", help="other systems beside ours")
    parser.add_argument(
        "--quick", action="store_true", help="few repetitions, no compiled reference"
    )
    parser.add_argument("--steps", type=int, nargs="*", help="solver steps, default by problem")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads, default 1")
    parser.add_argument("--output", type=Path, help="CSV file the rows are appended to")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console()
    small = arguments.problem == "bibtex" or device.type == "cuda"
    steps = arguments.steps if arguments.steps is not None else ([10, 20] if small else [10])
    sizes = None
    if arguments.problem == "transformer" and device.type == "cuda":
        sizes = TransformerSizes(num_blocks=12, width=768, num_heads=12, num_tokens=512)
    problem = build_problem(arguments.problem, device, torch.float32, sizes)
    compiler = Compiler()
    work = [*reference(problem, steps), *ours(problem, steps, compiler)]
    if not arguments.quick:
        work.append(compiled_reference(problem))
    if arguments.peers:
        work += peers(problem, steps, console)
    errors = errors_of(work, float64_results(arguments.problem, device, sizes, steps))
    compiled = f"compiled {len(compiler.names)} functions in {compiler.seconds:.0f} s"
    console.print(f"every result of ours agrees with float64; {compiled}, not timed")
    many = (
        ((15, 5) if arguments.quick else (51, 21))
        if small
        else ((3, 1) if arguments.quick else (7, 2))
    )
    result = rows(problem, work, errors, many, peak_of_solves=small)
    title = f"{problem.name}, {result[0][3]}, {arguments.threads} thread(s)"
    show(title, result, console)
    if arguments.output:
        append_rows(arguments.output, [dict(zip(COLUMNS, r, strict=True)) for r in result])


if __name__ == "__main__":
    main()
