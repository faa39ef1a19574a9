"""The linear solve."""

from dataclasses import dataclass
from typing import Literal

from ispen_dist.config.checks import ANY, check, check_ranges


@dataclass(frozen=True)
class SolverConfig:
    """The inverse-Hessian-vector product."""

    name: Literal["cg", "cg_single_reduction", "pcg", "neumann", "nystrom", "identity", "sama"] = (
        "cg"
    )
    """Solver; cg_single_reduction is cg with half the all-reduces, for many ranks; pcg is cg
    preconditioned by the second moments of the inner optimizer; nystrom inverts a low-rank
    approximation; identity and sama, which divides by the inner optimizer's metric, take no
    products."""
    max_steps: int = 10
    """Products per solve; of nystrom the rank, and one product more measures the residual."""
    rtol: float = 1e-3
    """Relative residual at which a solve stops, or of nystrom counts as converged."""
    scale: float = 10.0
    """Divisor of neumann, identity and sama; there 1 / inner learning rate is a step of Adam."""
    curvature: Literal["hessian", "gauss_newton"] = "hessian"
    """Exact Hessian, or its Gauss-Newton part."""
    damping: float = 0.3
    """Added to the diagonal of the curvature."""
    memory: Literal["auto", "graph", "states", "recompute"] = "auto"
    """What a solve keeps between its products: the graph of the whole gradient (fastest, needs all
    parameters on every rank), the states at stage boundaries, or nothing, everything being computed
    again for every product. auto is graph, and states where parameters are sharded."""
    prefetch: bool = True
    """Gather the parameters of the next stage while one is computed: hides communication, holds
    two stages in memory; sharded parameters only."""
    warm_start: bool = True
    """Start from the solution of the previous outer step."""
    on_failure: Literal["skip", "damp", "stop"] = "skip"
    """On negative curvature, divergence or NaN: leave the implicit part out of this step, repeat
    with larger damping, or stop the run."""
    damping_factor: float = 4.0
    """Factor of each repeat under `damp`; the raised damping falls back by its square root after
    every successful solve."""
    max_repeats: int = 5
    """Repeats under `damp` before the implicit part is left out."""

    def __post_init__(self) -> None:
        check_ranges(
            "solver",
            self,
            max_steps=(1, ANY),
            rtol=(0.0, 0.999),
            scale=(1e-30, ANY),
            damping=(0.0, ANY),
            damping_factor=(1.001, ANY),
            max_repeats=(0, ANY),
        )
        if self.name == "nystrom":
            check(
                self.damping > 0.0,
                "solver.damping",
                "a number above 0 for solver.name=nystrom",
                self.damping,
                "a low-rank approximation has no inverse without it",
            )
        if self.on_failure == "damp":
            check(
                self.damping > 0.0,
                "solver.damping",
                "a number above 0 for solver.on_failure=damp",
                self.damping,
            )
            check(
                self.name != "neumann",
                "solver.on_failure",
                "skip or stop for solver.name=neumann",
                self.on_failure,
                "it diverges where solver.scale is too small, which more damping makes worse",
            )
