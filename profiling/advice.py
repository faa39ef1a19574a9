"""The largest costs of a run, each with the setting that changes it.

A rule looks at the settings of the run and says what to set, but for what is set already.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from phases import OTHER, Breakdown

from ispen_dist import ranges
from ispen_dist.config import Config

NUM_COSTS = 3


@dataclass(frozen=True)
class Cost:
    """A phase, its share of the time, and what to change."""

    phase: str
    share: float
    advice: str


def largest_costs(breakdowns: list[Breakdown], config: Config) -> list[Cost]:
    """Return the largest costs over ranks; all collectives are one."""
    total = sum(b.traced for b in breakdowns)
    seconds: dict[str, float] = {}
    for b in breakdowns:
        for phase, own in b.phases.items():
            name = COMMUNICATION if phase in ranges.COLLECTIVES else phase
            seconds[name] = seconds.get(name, 0.0) + own
    ranked = sorted(seconds.items(), key=lambda item: -item[1])[:NUM_COSTS]
    return [
        Cost(phase, own / total, "; or ".join(_advice(phase, config, breakdowns)))
        for phase, own in ranked
    ]


COMMUNICATION = "communication"


def _advice(phase: str, config: Config, breakdowns: list[Breakdown]) -> Iterator[str]:
    found = list(_RULES.get(phase, _nothing)(config, breakdowns))
    yield from found or ["no setting changes it; look at the trace in Perfetto for its operators"]


def _nothing(config: Config, breakdowns: list[Breakdown]) -> Iterator[str]:
    yield from ()


def _curvature_compiles(config: Config) -> bool:
    return config.inference_net.name != "bilstm" and not config.compile.curvature


def _product(config: Config, breakdowns: list[Breakdown]) -> Iterator[str]:
    if _curvature_compiles(config):
        yield "set compile.curvature=true: what depends on the solve point alone is kept"
    if config.solver.memory == "recompute":
        yield "set solver.memory=states: nothing is computed twice"
    number = max(b.products_per_outer_step for b in breakdowns)
    yield (
        f"lower solver.max_steps={config.solver.max_steps} or raise "
        f"solver.rtol={config.solver.rtol:g}: {number:.1f} products are taken per outer step, see "
        "the residuals for what they gain"
    )
    if config.solver.curvature == "hessian":
        yield "try solver.curvature=gauss_newton, whose products are cheaper"
    yield f"lower outer.batch_size={config.outer.batch_size}, the examples in a product"


def _solve(config: Config, breakdowns: list[Breakdown]) -> Iterator[str]:
    if config.compile.kernels == "reference":
        yield "set compile.kernels=auto: on a GPU the vector updates are one pass each"
    yield f"lower solver.max_steps={config.solver.max_steps}"


def _curvature(config: Config, breakdowns: list[Breakdown]) -> Iterator[str]:
    if _curvature_compiles(config):
        yield "set compile.curvature=true"
    yield f"lower outer.batch_size={config.outer.batch_size}"


def _outer_gradient(config: Config, breakdowns: list[Breakdown]) -> Iterator[str]:
    yield from _curvature(config, breakdowns)
    if config.outer.objective in ("cd", "nce"):
        yield f"lower outer.num_samples={config.outer.num_samples}"


def _inner_step(config: Config, breakdowns: list[Breakdown]) -> Iterator[str]:
    compiles = "bilstm" not in (config.inference_net.name, config.energy.features.name)
    if compiles and not config.compile.inner:
        yield "set compile.inner=true (not under DeepSpeed and FSDP2)"
    elif compiles and not config.compile.whole_round:
        yield "set compile.whole_round=true: all steps of a round become one function"
    busy = max(b.flops / b.wall for b in breakdowns)
    size, steps = config.inner.batch_size, config.inner.steps
    yield (
        f"raise inner.batch_size={size} and lower inner.steps={steps} by as much: "
        f"{busy / 1e9:.3g} GFLOP/s are achieved, and few large operators reach more"
    )


def _data(config: Config, breakdowns: list[Breakdown]) -> Iterator[str]:
    if len(config.compile.buckets) > 4:
        yield f"have fewer compile.buckets than {len(config.compile.buckets)}"
    yield f"raise inner.batch_size={config.inner.batch_size}: a batch costs more than its examples"


def _communication(config: Config, breakdowns: list[Breakdown]) -> Iterator[str]:
    slowest, fastest = (f(_waiting(b) / b.traced for b in breakdowns) for f in (max, min))
    if slowest - fastest > 0.1:
        yield (
            f"even out the work: ranks wait between {fastest:.0%} and {slowest:.0%} of the time "
            "for each other, so one of them is slower or has longer examples"
        )
    if not config.solver.prefetch:
        yield "set solver.prefetch=true: the next stage is gathered during the present one"
    if config.solver.name == "cg":
        yield "set solver.name=cg_single_reduction: one all-reduce per product in place of two"
    yield f"raise inner.batch_size={config.inner.batch_size}: fewer all-reduces per example"


def _waiting(breakdown: Breakdown) -> float:
    return sum(breakdown.phases.get(name, 0.0) for name in ranges.COLLECTIVES)


def _evaluation(config: Config, breakdowns: list[Breakdown]) -> Iterator[str]:
    yield f"raise train.eval_every={config.train.eval_every}"


def _checkpoint(config: Config, breakdowns: list[Breakdown]) -> Iterator[str]:
    yield f"raise train.checkpoint_every={config.train.checkpoint_every}"


def _compile(config: Config, breakdowns: list[Breakdown]) -> Iterator[str]:
    yield "have fewer compile.buckets, so that there are fewer shapes to compile"
    yield "raise profile.first_round, so that compilation is over"


def _records(config: Config, breakdowns: list[Breakdown]) -> Iterator[str]:
    yield f"raise train.log_every={config.train.log_every}"


_RULES: dict[str, Callable[[Config, list[Breakdown]], Iterator[str]]] = {
    "product": _product,
    "solve": _solve,
    "curvature": _curvature,
    "outer gradient": _outer_gradient,
    "inner step": _inner_step,
    "data": _data,
    COMMUNICATION: _communication,
    "evaluation": _evaluation,
    "checkpoint": _checkpoint,
    "compile": _compile,
    "records": _records,
    OTHER: _nothing,
}
