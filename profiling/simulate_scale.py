"""What one solver iteration sends and holds on 8, 64 or 1024 ranks, counted in one process.

    python profiling/simulate_scale.py
    python profiling/simulate_scale.py --ranks 8 4096 --blocks 48 --width 2048 --output rows.csv

The shards, the products and the solvers are those of training; only the process group is torch's
fake one, in which this process is rank 0 of N and every other rank is assumed to hold the same
piece. Collectives are counted where the code calls them: an iteration is the difference between a
solve of three steps and one of two. Parameters of the whole network are never allocated, only rank
0's parts. Arithmetic is counted on shapes alone, at the stated batch.

Predicted times are a model, not a measurement: a collective over N ranks takes
`(N - 1) / N * bytes / bandwidth` (twice that for an all-reduce) plus `log2 N` latencies, with the
bandwidth of the slowest link it crosses; arithmetic takes its operations over the stated rate. "in
turn" adds both, "overlapped" hides all gathers behind arithmetic or the other way round.
"""

import argparse
import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_hypergradient import commit
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ispen_dist import CG
from ispen_dist.distributed import shards
from ispen_dist.distributed.shards import Cut, Shards
from ispen_dist.linalg.conjugate_gradients import SingleReductionCG
from ispen_dist.linalg.layout import Layout, Replicas
from ispen_dist.linalg.reduction import OneProcess
from ispen_dist.linalg.solver import Solver
from ispen_dist.linalg.staged import StagedFunction
from ispen_dist.linalg.staged_operators import StagedLoss, build_staged_operator
from ispen_dist.linalg.trees import Tree, num_elements
from ispen_dist.models.stages import parts_of, stages_at
from ispen_dist.models.taggers import TransformerTagger

SOLVERS: dict[str, Callable[..., Solver]] = {"cg": CG, "cg_single_reduction": SingleReductionCG}
NUM_VECTORS = {"cg": 5, "cg_single_reduction": 6}
NUM_TAGS, NUM_FEATURES = 25, 8
COLUMNS = (
    "ranks", "curvature", "solver", "parameters", "parameter_bytes", "vector_bytes",
    "largest_stage_bytes", "all_gathers", "reduce_scatters", "all_reduces", "sent_bytes",
    "teraflop", "communication_ms", "arithmetic_ms", "in_turn_ms", "overlapped_ms",
    "assumptions", "versions", "commit",
)  # fmt: skip


@dataclass
class Traffic:
    """Collectives that were called.

    Attributes:
        calls: (kind, bytes of the whole tensor) in order.
    """

    calls: list[tuple[str, int]] = field(default_factory=list)

    def count(self, kind: str) -> int:
        """Return the number of collectives of a kind."""
        return sum(name == kind for name, _ in self.calls)

    def since(self, earlier: "Traffic") -> "Traffic":
        """Return what a longer run called beyond a shorter one."""
        rest = list(self.calls)
        for call in earlier.calls:
            rest.remove(call)
        return Traffic(rest)

    def sent(self, num_ranks: int) -> float:
        """Return the bytes that one rank of a ring sends."""
        share = (num_ranks - 1) / num_ranks
        return sum(size * share * (2 if kind == "all_reduce" else 1) for kind, size in self.calls)


class _Done:
    def wait(self) -> None:
        pass


@contextmanager
def fake_ranks(num_ranks: int) -> Iterator[Traffic]:
    """Be rank 0 of N ranks that all hold the same, and count what is called."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    traffic = Traffic()
    places = ((shards, "all_gather"), (shards, "reduce_scatter"), (dist, "all_reduce"))
    real: dict[str, Callable[..., Any]] = {name: getattr(place, name) for place, name in places}

    def all_gather(output: Tensor, own: Tensor, **_: Any) -> _Done:
        real["all_gather"](output, own)
        output.view(num_ranks, -1).copy_(own)
        traffic.calls.append(("all_gather", output.nbytes))
        return _Done()

    def reduce_scatter(own: Tensor, whole: Tensor, **_: Any) -> None:
        real["reduce_scatter"](own, whole)
        own.copy_(whole.view(num_ranks, -1)[0])
        traffic.calls.append(("reduce_scatter", whole.nbytes))

    def all_reduce(tensor: Tensor, **_: Any) -> None:
        real["all_reduce"](tensor)
        traffic.calls.append(("all_reduce", tensor.nbytes))

    try:
        stand_ins = (all_gather, reduce_scatter, all_reduce)
        for (place, name), stand_in in zip(places, stand_ins, strict=True):
            setattr(place, name, stand_in)
        yield traffic
    finally:
        for place, name in places:
            setattr(place, name, real[name])
        dist.destroy_process_group()


@dataclass(frozen=True)
class Model:
    """A transformer tagger, as shapes.

    Attributes:
        blocks: number of blocks.
        width: d.
        vocabulary: rows of the embedding table.
    """

    blocks: int
    width: int
    vocabulary: int

    def network(self) -> TransformerTagger:
        """Return the definition on the meta device."""
        heads = max(1, self.width // 64)
        with torch.device("meta"):
            return TransformerTagger(
                self.vocabulary, NUM_TAGS, self.width, self.width, self.blocks, heads
            )


class _NoEnergy:
    """The solve's products do not depend on how psi is made; the model alone is simulated."""

    psi: Tree = {}  # noqa: RUF012

    def pull_back(self, psi_bar: Tree) -> Tree:
        return {}


def staged_loss(
    network: nn.Module, layout: Layout, own: Tree, batch: tuple[int, int], device: str
) -> StagedLoss:
    """Return an inner loss on a batch of (sentences, tokens)."""
    inputs = {
        "features": torch.ones((*batch, NUM_FEATURES), dtype=torch.int64, device=device),
        "mask": torch.ones(batch, dtype=torch.bool, device=device),
    }

    def output_loss(z: Tensor, psi: Tree, data: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        total = -torch.log_softmax(z, -1)[..., 0].sum()
        return total, torch.full_like(total, batch[0]).detach()

    model = StagedFunction(stages_at(network, inputs, False), layout, own)
    return StagedLoss(model, output_loss, _NoEnergy())


def own_parts(network: nn.Module, num_ranks: int) -> tuple[Shards, Tree]:
    """Return the layout of FSDP2, which cuts by rows, and rank 0's parts."""
    draw = torch.Generator().manual_seed(0)
    cuts, own = {}, {}
    for name, p in network.named_parameters():
        rows = -(-p.shape[0] // num_ranks)
        cuts[name] = Cut(p.shape, rows * (p.numel() // p.shape[0]))
        own[name] = 0.02 * torch.randn(cuts[name].size(0), generator=draw)
    return Shards(cuts), own


def iteration(model: Model, num_ranks: int, curvature: str, solver: str) -> tuple[Traffic, int]:
    """Return what one solver iteration calls, and the bytes of rank 0's parameters."""
    network = model.network()
    with fake_ranks(num_ranks) as traffic:
        layout, own = own_parts(network, num_ranks)
        loss = staged_loss(network, layout, own, (1, 4), "cpu")
        operator = build_staged_operator(curvature, loss)
        spectrum = {name: torch.linspace(1.0, 9.0, x.numel()) for name, x in own.items()}

        def matvec(v: Tree) -> Tree:
            # Called for its collectives. Ranks that all hold the same make no Hessian, so the
            # solver gets a product of a known spectrum and takes all its steps.
            operator.matvec(v)
            return {name: spectrum[name] * x for name, x in v.items()}

        rhs = {name: torch.ones_like(x) for name, x in own.items()}
        runs = []
        for num_steps in (2, 3):
            traffic.calls.clear()
            solution = SOLVERS[solver](num_steps, 0.0).solve(matvec, rhs, vectors=layout.vectors())
            if solution.num_steps != num_steps:
                raise RuntimeError(f"the solve ended early: {solution.status}")
            runs.append(Traffic(list(traffic.calls)))
        return runs[1].since(runs[0]), 4 * num_elements(own)


def teraflop(model: Model, curvature: str, batch: tuple[int, int]) -> float:
    """Count the arithmetic of one product on shapes alone."""
    network = model.network()
    own = {name: p.detach() for name, p in network.named_parameters()}
    loss = staged_loss(network, Replicas(OneProcess()), own, batch, "meta")
    operator = build_staged_operator(curvature, loss)
    with _Arithmetic() as counter:
        operator.matvec(own)
    return counter.flop / 1e12


class _Arithmetic(TorchDispatchMode):
    """Sums torch's own formulas; its FlopCounterMode cannot watch autograd.grad of a leaf."""

    flop = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        if formula is not None:
            self.flop += formula(*args, **(kwargs or {}), out_val=result)
        return result


def predicted_ms(traffic: Traffic, num_ranks: int, arguments: argparse.Namespace) -> float:
    """Return the time of the collectives under the stated links."""
    inside = num_ranks <= arguments.ranks_per_node
    bandwidth = (arguments.intra_node_gb_per_s if inside else arguments.inter_node_gb_per_s) * 1e9
    latency = math.ceil(math.log2(max(num_ranks, 2))) * arguments.latency_us * 1e-6
    return 1e3 * (traffic.sent(num_ranks) / bandwidth + latency * len(traffic.calls))


def rows_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Count and predict every combination."""
    model = Model(arguments.blocks, arguments.width, arguments.vocabulary)
    network = model.network()
    num_parameters = sum(p.numel() for p in network.parameters())
    largest = 4 * max(sum(p.numel() for p in part.parameters()) for part in parts_of(network))
    batch = (arguments.batch, arguments.tokens)
    rows = []
    for curvature in ("hessian", "gauss_newton"):
        work = teraflop(model, curvature, batch)
        arithmetic = 1e3 * work / arguments.tflops
        for num_ranks in arguments.ranks:
            for solver in SOLVERS:
                traffic, parameter_bytes = iteration(model, num_ranks, curvature, solver)
                communication = predicted_ms(traffic, num_ranks, arguments)
                rows.append(
                    {
                        "ranks": num_ranks,
                        "curvature": curvature,
                        "solver": solver,
                        "parameters": num_parameters,
                        "parameter_bytes": parameter_bytes,
                        "vector_bytes": NUM_VECTORS[solver] * parameter_bytes,
                        "largest_stage_bytes": largest,
                        "all_gathers": traffic.count("all_gather"),
                        "reduce_scatters": traffic.count("reduce_scatter"),
                        "all_reduces": traffic.count("all_reduce"),
                        "sent_bytes": round(traffic.sent(num_ranks)),
                        "teraflop": round(work, 4),
                        "communication_ms": round(communication, 3),
                        "arithmetic_ms": round(arithmetic, 3),
                        "in_turn_ms": round(communication + arithmetic, 3),
                        "overlapped_ms": round(max(communication, arithmetic), 3),
                        "assumptions": assumptions(arguments),
                        "versions": f"torch {torch.__version__}",
                        "commit": commit(),
                    }
                )
    return rows


def assumptions(arguments: argparse.Namespace) -> str:
    """Return the stated link speeds, rate and batch."""
    return (
        f"blocks {arguments.blocks} width {arguments.width} vocabulary {arguments.vocabulary}; "
        f"batch {arguments.batch} x {arguments.tokens} tokens per rank; float32; "
        f"{arguments.ranks_per_node} ranks a node at {arguments.intra_node_gb_per_s:g} GB/s, "
        f"{arguments.inter_node_gb_per_s:g} GB/s between nodes; {arguments.latency_us:g} us; "
        f"{arguments.tflops:g} TFLOP/s"
    )


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the table."""
    table = Table(title=rows[0]["assumptions"])
    for name in (
        "ranks", "curvature", "solver", "parameters MB", "vectors MB", "stage MB", "gathers",
        "scatters", "all-reduces", "sent MB", "in turn ms", "overlapped ms",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row["ranks"]),
            row["curvature"],
            row["solver"],
            *(
                f"{row[k] / 1e6:.1f}"
                for k in ("parameter_bytes", "vector_bytes", "largest_stage_bytes")
            ),
            *(str(row[k]) for k in ("all_gathers", "reduce_scatters", "all_reduces")),
            f"{row['sent_bytes'] / 1e6:.0f}",
            f"{row['in_turn_ms']:.1f}",
            f"{row['overlapped_ms']:.1f}",
        )
    console.print(table)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[8, 64, 1024], help="numbers of ranks")
    add("--blocks", type=int, default=24, help="blocks of the transformer (default 24)")
    add("--width", type=int, default=1024, help="its width (default 1024)")
    add("--vocabulary", type=int, default=32768, help="rows of the embedding (default 32768)")
    add("--batch", type=int, default=8, help="sentences per rank (default 8)")
    add("--tokens", type=int, default=128, help="tokens per sentence (default 128)")
    add("--ranks-per-node", type=int, default=8, help="ranks joined by the fast link (default 8)")
    add("--intra-node-gb-per-s", type=float, default=300.0, help="NVLink, per rank (default 300)")
    add("--inter-node-gb-per-s", type=float, default=50.0, help="400 Gb/s per rank (default 50)")
    add("--latency-us", type=float, default=10.0, help="of one step (default 10)")
    add("--tflops", type=float, default=60.0, help="arithmetic rate in float32 (default 60)")
    add("--output", type=Path, help="CSV file that is written")
    return parser.parse_args(argv)


def main() -> None:
    """Run the command line."""
    arguments = parse()
    rows = rows_of(arguments)
    show(rows, Console(width=150))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with arguments.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
