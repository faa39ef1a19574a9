"""What a linear solver returns: the vector, how it ended, and what it cost."""

from dataclasses import dataclass
from enum import StrEnum

from ispen_dist.linalg.trees import Tree


class Status(StrEnum):
    """How a solve ended. `status.help` says what it means and what to change."""

    CONVERGED = "converged"
    MAX_STEPS = "max_steps"
    APPROXIMATE = "approximate"
    ZERO_RHS = "zero_rhs"
    NEGATIVE_CURVATURE = "negative_curvature"
    DIVERGED = "diverged"
    NOT_FINITE = "not_finite"

    @property
    def help(self) -> str:
        """A sentence for the user."""
        return _HELP[self]

    @property
    def usable(self) -> bool:
        """Whether the vector may be used as the inverse-Hessian-vector product."""
        return self in (Status.CONVERGED, Status.MAX_STEPS, Status.APPROXIMATE, Status.ZERO_RHS)


_HELP = {
    Status.CONVERGED: "The residual fell below the tolerance.",
    Status.MAX_STEPS: (
        "The step limit came before the tolerance; the truncated solution is used. Raise the "
        "number of solver steps or the damping for a smaller residual."
    ),
    Status.APPROXIMATE: (
        "The solver stands in for the inverse without solving; its residual is not measured."
    ),
    Status.ZERO_RHS: (
        "The outer loss does not depend on theta, so the implicit part is zero. Give the outer "
        "loss a term in the relaxed output, such as the task cost."
    ),
    Status.NEGATIVE_CURVATURE: (
        "A direction with p.Hp <= 0 was met: the damped Hessian is not positive definite at this "
        "theta, and conjugate gradients do not apply. Take more inner steps, raise the damping, "
        "or use Gauss-Newton curvature."
    ),
    Status.DIVERGED: (
        "The residual ended larger than it began. The Neumann series needs a scale above half "
        "of the largest eigenvalue of H + damping: raise the scale, or use conjugate gradients."
    ),
    Status.NOT_FINITE: (
        "A product or an inner product is NaN or infinite. Lower the learning rates, clip the "
        "gradients, or check the data."
    ),
}


@dataclass(frozen=True)
class Solution:
    """The outcome of one linear solve `A q = b`.

    Attributes:
        value: `q`, a tree like `b`. On a status that is not `usable` it is the last iterate
            before the failure.
        status: how the solve ended.
        num_steps: products with `A` inside the iteration; the product that a warm start costs is
            not counted.
        residual: `|b - A q| / |b|`, from the recursion of the solver, or measured; else NaN.
        residuals: the relative residual before each step and at the end, for plots.
        combination: coefficients of `q` in the vectors that were multiplied, in order, with that
            of a start first; empty where the solver does not know them.
    """

    value: Tree
    status: Status
    num_steps: int
    residual: float
    residuals: tuple[float, ...] = ()
    combination: tuple[float, ...] = ()
