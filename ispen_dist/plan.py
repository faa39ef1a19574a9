"""What a configuration will cost on a runtime, counted before anything is trained.

Counts, not measurements: activations come on top of memory, and the time of a transfer is not
known. `profiling/bench_solve_memory.py` measures.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ispen_dist.config import Config, SolverConfig
from ispen_dist.data.loading import Splits
from ispen_dist.distributed.runtime import Runtime
from ispen_dist.models.stages import StagedNetwork, parts_of
from ispen_dist.players import build_players
from ispen_dist.schedule import Schedule

_SOLVER_VECTORS = {
    "cg": 5,
    "cg_single_reduction": 6,
    "pcg": 8,  # z, the metric, and the metric with the damping
    "neumann": 4,
    "nystrom": 3,  # and two for every product
    "identity": 2,
    "sama": 3,  # the metric
}
"""Trees like theta that a solve holds at once, the warm start among them."""

_SHARDED = {
    "replicas": (False, False, False),
    "zero1": (False, False, True),
    "zero2": (False, True, True),
    "zero3": (True, True, True),
    "fsdp2": (True, True, True),
}
"""Whether a runtime cuts parameters, gradients and optimizer state among ranks."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of scalars.

    Attributes:
        theta: of the inference network.
        energy: of the energy network.
        phi: of the energy's learned parameters.
        stage: of the largest stage of the inference network; all of it where it has no stages.
    """

    theta: int
    energy: int
    phi: int
    stage: int


def sizes_of(config: Config, splits: Splits) -> Sizes:
    """Count parameters without allocating them."""
    players = build_players(config, splits.codec, torch.device("meta"))
    network = players.inference_net
    theta = _count(network)
    staged = isinstance(network, StagedNetwork)
    return Sizes(
        theta=theta,
        energy=_count(players.energy),
        phi=sum(p.numel() for p in players.phi.values()),
        stage=max(_count(part) for part in parts_of(network)) if staged else theta,
    )


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@dataclass(frozen=True)
class Cost:
    """Bytes per rank.

    Attributes:
        resting: parameters, gradients and optimizer state of both networks, and their average.
        vectors: the solver's vectors.
        gathered: what a product holds in whole tensors at once.
        inner_step: sent by one inner step.
        product: sent by one curvature product.
        outer_step: sent by one outer step with all its products.
    """

    resting: float
    vectors: float
    gathered: float
    inner_step: float
    product: float
    outer_step: float


def cost_of(config: Config, sizes: Sizes, num_ranks: int, runtime: Runtime) -> Cost:
    """Count memory and communication of one rank.

    A ring sends and receives `(n - 1) / n` of what it gathers or reduce-scatters, and twice that of
    what it all-reduces.
    """
    item = 8 if config.train.dtype == "float64" else 4
    share = 1.0 / num_ranks
    ring = 1.0 - share
    parameters, gradients, optimizer = (
        share if sharded else 1.0 for sharded in _SHARDED[runtime.name]
    )
    both = sizes.theta + sizes.energy
    solver = config.solver
    implicit = config.train.method == "implicit"
    vectors = _solver_vectors(solver) * sizes.theta if implicit else 0
    if runtime.shards_parameters:
        gathers, scatters = _passes(config)
        product = (gathers + scatters) * sizes.theta * ring
        # Value, pull-back and gradient of both losses; the tangent of the solution at the end.
        around = (2 * 3 + 2) * sizes.theta * ring
        inner_step = 3 * sizes.theta * ring + sizes.energy * ring
        held = 3 * sizes.stage * (2 if solver.prefetch else 1)
    else:
        product = inner_step = 2 * sizes.theta * ring
        around = 2 * (2 * sizes.theta + 2 * sizes.phi) * ring
        held = 0
    products = _num_products(solver) if implicit else 0
    learns = config.train.method != "mle"
    return Cost(
        resting=item * both * (_copies(config) * parameters + gradients + 2 * optimizer),
        vectors=item * vectors * parameters,
        gathered=item * held if implicit else 0,
        inner_step=item * inner_step,
        product=item * product if implicit else 0,
        outer_step=item * (products * product + around) if learns else 0,
    )


def _copies(config: Config) -> int:
    """Return how often both networks are held while a run trains."""
    return 2 if config.train.average_decay else 1


def _solver_vectors(solver: SolverConfig) -> int:
    directions = 2 * solver.max_steps if solver.name == "nystrom" else 0
    return _SOLVER_VECTORS[solver.name] + directions


def _num_products(solver: SolverConfig) -> int:
    """Return the limit on products of a solve, with the one of a warm start or of a check."""
    if solver.name in ("identity", "sama"):
        return 0
    return solver.max_steps + (1 if solver.warm_start or solver.name == "nystrom" else 0)


def _passes(config: Config) -> tuple[int, int]:
    """Return how often a product gathers a tree like theta, and how often it reduce-scatters."""
    if config.solver.curvature == "gauss_newton":
        return 3, 1
    return (4, 1) if config.solver.memory == "recompute" else (3, 2)


def describe(config: Config, splits: Splits, num_ranks: int, runtime: Runtime) -> str:
    """Return a few lines: examples, parameters, steps, memory, precision, communication.

    Args:
        config: all settings.
        splits: the data sets.
        num_ranks: processes of the run.
        runtime: what shards the networks.
    """
    sizes = sizes_of(config, splits)
    cost = cost_of(config, sizes, num_ranks, runtime)
    item = 8 if config.train.dtype == "float64" else 4
    train = config.train
    schedule = Schedule(config)
    rounds = schedule.num_rounds
    inner_steps, outer_steps = schedule.first_inner(rounds), schedule.first_outer(rounds)
    epochs = inner_steps * config.inner.batch_size / len(splits.train)
    products = outer_steps * _num_products(config.solver)
    test = len(splits.test) if splits.test is not None else 0
    dev = f"{len(splits.dev)}{', trained on' if config.data.train_on_dev else ''}"
    copies = _copies(config) + 3  # Two moments, and the best.
    first_order = "bfloat16" if runtime.low_precision else train.dtype
    lines = [
        ("examples", f"train {len(splits.train)}, dev {dev}, test {test}"),
        ("parameters", f"theta {sizes.theta:,}, phi {sizes.phi:,} learned of {sizes.energy:,}"),
        (
            "steps",
            f"{rounds} rounds: {inner_steps} inner ({epochs:.1f} epochs), "
            f"{outer_steps} outer, "
            f"at most {products if train.method == 'implicit' else 0} curvature products",
        ),
        (
            "runtime",
            f"{runtime.name} on {num_ranks} rank(s); first-order steps in {first_order}, "
            f"parameters, curvature and solver in {train.dtype}",
        ),
        (
            "memory per rank",
            f"{_bytes(cost.resting)} parameters, gradients and optimizers, "
            f"{_bytes(cost.vectors)} solver vectors, {_bytes(cost.gathered)} gathered at a time, "
            "activations besides",
        ),
        ("checkpoint", f"about {_bytes(item * copies * (sizes.theta + sizes.energy))} each"),
        (
            "sent per rank",
            f"{_bytes(cost.inner_step)} per inner step, {_bytes(cost.product)} per product, "
            f"{_bytes(cost.outer_step)} per outer step"
            if num_ranks > 1
            else "nothing, one process",
        ),
    ]
    return "\n".join(f"# {name:18s} {value}" for name, value in lines)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000.0:
            return f"{count:.3g} {unit}"
        count /= 1000.0
    return f"{count:.3g} TB"
