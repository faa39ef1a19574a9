"""What one implicit solve with sharded parameters holds in memory on every rank, measured.

    python profiling/bench_solve_memory.py
    python profiling/bench_solve_memory.py --blocks 8 --ranks 4 --output rows.csv

The problem is a transformer tagger whose blocks hold almost all parameters, sharded by FSDP2, with
a likelihood as inner loss, on random seeded sentences. A solve builds the operator and takes two
steps of conjugate gradients. `naive` gathers all parameters on every rank and differentiates the
whole graph twice, with the solver's vectors sharded as in the others.

On a CPU every storage is followed from the operation that makes it until it is freed, whichever
thread frees it; on a GPU the allocator's own statistics are read. Figures are maxima over ranks.
`vectors` are the five trees of own parts that the solver holds during a product (b, q, r, p and
A p); `beyond` is the peak without them, and without the parameters themselves. The program stops if
an exact variant and `naive` disagree, or if the measurement misses a known pattern.
"""

import argparse
import csv
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_hypergradient import commit
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ispen_dist import CG
from ispen_dist.distributed import Session
from ispen_dist.engine import Engine
from ispen_dist.linalg.layout import norms
from ispen_dist.linalg.operators import HessianOperator
from ispen_dist.linalg.solution import Solution
from ispen_dist.linalg.staged_operators import StagedLoss, build_staged_operator
from ispen_dist.linalg.trees import Tree, add_scaled, num_elements
from ispen_dist.models.taggers import TransformerTagger
from ispen_dist.players import groups_of

WIDTH, HEADS, VOCABULARY, TAGS = 256, 4, 512, 25
BATCH, TOKENS, FEATURES = 4, 64, 4
NUM_VECTORS = 5
DAMPING, MAX_ERROR = 10.0, 1e-4
VARIANTS = (
    "naive", "hessian/states", "hessian/states/prefetch", "hessian/recompute",
    "gauss_newton/states",
)  # fmt: skip
COLUMNS = (
    "variant", "blocks", "ranks", "parameter_bytes", "vector_bytes", "peak_bytes", "beyond_bytes",
    "share_of_naive", "error", "device", "versions", "commit",
)  # fmt: skip


class Storages(TorchDispatchMode):
    """Follows the bytes of every storage that operations make.

    Attributes:
        held: bytes now.
        peak: most bytes so far.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._seen = {x.untyped_storage()._cdata for x in known}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if isinstance(x, Tensor):
                self._follow(x.untyped_storage())
        self.peak = max(self.peak, self.held)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.held += size
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.held -= size


def check_measurement() -> None:
    """Refuse to go on where a known pattern does not give its known peak."""
    mega = 1 << 20
    x = torch.ones(mega, dtype=torch.uint8)
    with Storages([x]) as storages:
        y = x + x
        z = torch.cat([y, y, y])
        del y
        z = z.view(3, -1)[0].clone()
    if (storages.peak, storages.held) != (4 * mega, mega):
        sys.exit(f"error: expected a peak of 4 MiB and 1 MiB at the end, found {storages.peak}")


@contextmanager
def measured(engine: Engine, peaks: list[int]) -> Iterator[None]:
    """Append the peak of what runs inside, the most over all ranks."""
    own = list(engine.parameters().values())
    if own[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with Storages(own) as storages:
            yield
        peak = storages.peak
    most = torch.tensor(peak, device=own[0].device)
    if dist.get_world_size() > 1:
        dist.all_reduce(most, dist.ReduceOp.MAX)
    peaks.append(int(most))


class _NoEnergy:
    psi: Tree = {}  # noqa: RUF012

    def pull_back(self, psi_bar: Tree) -> Tree:
        return {}


def solves(engine: Engine, session: Session) -> dict[str, Callable[[], Solution]]:
    """Return every variant of one solve."""
    draw = torch.Generator().manual_seed(session.rank)
    ids = torch.randint(1, VOCABULARY, (BATCH, TOKENS, FEATURES), generator=draw)
    target = torch.randint(0, TAGS, (BATCH * TOKENS,), generator=draw).to(session.device)
    inputs = {"features": ids, "mask": torch.ones(BATCH, TOKENS, dtype=torch.bool)}
    inputs = {name: x.to(session.device) for name, x in inputs.items()}
    count = torch.tensor(float(BATCH), device=session.device)
    layout, solver = engine.layout, CG(2, 0.0)

    def likelihood(z: Tensor, psi: Tree, data: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return F.cross_entropy(z.flatten(0, 1), target, reduction="sum"), count

    def staged(curvature: str, memory: str, prefetch: bool) -> Solution:
        keep = memory == "states"
        model = engine.staged(inputs, training=True, keep_states=keep, prefetch=prefetch)
        operator = build_staged_operator(curvature, StagedLoss(model, likelihood, _NoEnergy()))
        return solver.solve(
            operator.matvec, operator.gradient, shift=DAMPING, vectors=layout.vectors()
        )

    def naive() -> Solution:
        whole = layout.gather([engine.parameters()])()[0]
        num_examples = BATCH * session.num_ranks
        operator = HessianOperator(
            lambda theta, phi: (
                likelihood(functional_call(engine.network, theta, (inputs,)), {}, {})[0]
                / num_examples
            ),
            whole,
            {},
        )

        def product(v: Tree) -> Tree:
            return layout.reduce(operator.matvec(layout.gather([v])()[0]))

        rhs = layout.reduce(operator.gradient)
        operator.gradient = {}
        return solver.solve(product, rhs, shift=DAMPING, vectors=layout.vectors())

    def variant(name: str) -> Callable[[], Solution]:
        if name == "naive":
            return naive
        curvature, memory, *prefetch = name.split("/")
        return lambda: staged(curvature, memory, bool(prefetch))

    return {name: variant(name) for name in VARIANTS}


def run_rank(num_blocks: int, output: Path) -> None:
    """Measure every variant on one rank; rank 0 writes."""
    torch.set_num_threads(1)
    check_measurement()
    session = Session()
    torch.manual_seed(0)
    network = TransformerTagger(VOCABULARY, TAGS, WIDTH, WIDTH, num_blocks, HEADS)
    engine = session.engine("inference_net", network, groups_of(network))
    own = max(num_elements(engine.parameters()), 1) * 4
    rows: list[dict[str, Any]] = []
    reference: Tree = {}
    beyond_naive = 0
    for name, solve in solves(engine, session).items():
        peaks: list[int] = []
        with measured(engine, peaks):
            value = solve().value
        beyond = peaks[0] - NUM_VECTORS * own
        if name == "naive":
            reference, beyond_naive = value, beyond
        error, size = norms(engine.layout, add_scaled(value, -1.0, reference), reference)
        if name.startswith("hessian") and error > MAX_ERROR * size:
            sys.exit(f"error: {name} is {error / size:.1e} from naive, expected {MAX_ERROR:g}")
        rows.append(
            {
                "variant": name,
                "blocks": num_blocks,
                "ranks": session.num_ranks,
                "parameter_bytes": own,
                "vector_bytes": NUM_VECTORS * own,
                "peak_bytes": peaks[0],
                "beyond_bytes": beyond,
                "share_of_naive": round(beyond / beyond_naive, 4),
                "error": "" if name.startswith("gauss") else f"{error / size:.1e}",
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "versions": f"torch {torch.__version__}",
                "commit": commit(),
            }
        )
        del value
    if session.is_main:
        with output.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)
    session.close()


def start_ranks(num_blocks: int, num_ranks: int, output: Path) -> None:
    """Run this program as ranks 0 to n-1 on this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    shared = {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks),
    }  # fmt: skip
    command = [sys.executable, __file__, "--as-rank", "--blocks", str(num_blocks)]
    command += ["--output", str(output)]
    ranks = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(num_ranks)
    ]
    if any([rank.wait() for rank in ranks]):
        sys.exit(f"error: a rank failed with {num_blocks} blocks on {num_ranks} ranks, see above")


def show(output: Path, console: Console) -> None:
    """Print the rows of a file."""
    table = Table(title="bytes per rank of one solve, in MB")
    names = ("parameter_bytes", "vector_bytes", "peak_bytes", "beyond_bytes")
    for title in ("variant", "blocks", "ranks", "parameters", "vectors", "peak", "beyond", "share"):
        table.add_column(title, justify="right")
    with output.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            figures = [f"{int(row[name]) / 1e6:.1f}" for name in names]
            table.add_row(
                row["variant"], row["blocks"], row["ranks"], *figures, row["share_of_naive"]
            )
    console.print(table)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--blocks", type=int, nargs="+", default=[8, 16], help="blocks (default 8 16)")
    add("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of ranks (default 1 2 4)")
    add("--output", type=Path, default=Path("solve_memory.csv"), help="CSV file, replaced")
    add("--as-rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_rank:
        run_rank(arguments.blocks[0], arguments.output)
        return
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.unlink(missing_ok=True)
    for num_blocks in arguments.blocks:
        for num_ranks in arguments.ranks:
            start_ranks(num_blocks, num_ranks, arguments.output)
    show(arguments.output, Console(width=120))


if __name__ == "__main__":
    main()
