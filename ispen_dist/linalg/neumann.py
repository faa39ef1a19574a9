"""The truncated Neumann series, and its first term."""

import math
from dataclasses import dataclass

from ispen_dist.linalg.solution import Solution, Status
from ispen_dist.linalg.solver import (
    MatVec,
    begin_solve,
    require_positive,
    shifted,
    without_work,
)
from ispen_dist.linalg.trees import Tree, add_scaled, scaled
from ispen_dist.linalg.vectors import Vectors


@dataclass(frozen=True)
class Neumann:
    """Truncated Neumann series, the solver of the paper (arXiv 2211.11649).

        q = (1/c) sum_{k<K} (I - A/c)^k b

    computed as the equivalent Richardson iteration q += r/c, r -= A r / c, whose `r` is the true
    residual, so divergence is seen. Converges where every eigenvalue of A lies in (0, 2c).

    Attributes:
        max_steps: number of terms K.
        scale: the divisor c.
        rtol: stop early when `|b - A q| <= rtol |b|`; 0 takes all terms, as the paper does.
    """

    max_steps: int = 20
    scale: float = 10.0
    rtol: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self, max_steps=self.max_steps, scale=self.scale)

    def solve(
        self,
        matvec: MatVec,
        rhs: Tree,
        *,
        shift: float = 0.0,
        vectors: Vectors | None = None,
        start: Tree | None = None,
    ) -> Solution:
        """See `Solver.solve`."""
        vectors, A = vectors or Vectors(), shifted(matvec, shift)
        begin = begin_solve(A, rhs, vectors, start)
        if begin.ended is not None:
            return begin.ended
        q, r, bb = begin.q, begin.r, begin.bb
        history = [math.sqrt(begin.rr / bb)]
        while history[-1] > self.rtol and len(history) <= self.max_steps:
            q = add_scaled(q, 1.0 / self.scale, r)
            r = add_scaled(r, -1.0 / self.scale, A(r))
            rr = vectors.dots([(r, r)]).item()
            history.append(math.sqrt(rr / bb) if rr >= 0.0 else math.nan)
            if not math.isfinite(rr):
                break
        status, num_steps = self._status(history), len(history) - 1
        combination = (*begin.of_start, *[1.0 / self.scale] * num_steps)
        return Solution(q, status, num_steps, history[-1], tuple(history), combination)

    def _status(self, history: list[float]) -> Status:
        if not math.isfinite(history[-1]):
            # A residual that grew before is too large by now; a first product is not finite itself.
            return Status.DIVERGED if history[-2] > history[0] else Status.NOT_FINITE
        if history[-1] <= self.rtol:
            return Status.CONVERGED
        return Status.DIVERGED if history[-1] > history[0] else Status.MAX_STEPS


@dataclass(frozen=True)
class Identity:
    """Replace the inverse by a multiple of the identity, `q = b / scale`.

    The one-step approximation of Luketina et al. (2016) and DARTS; costs no product.

    Attributes:
        scale: the divisor.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, scale=self.scale)

    def solve(
        self,
        matvec: MatVec,
        rhs: Tree,
        *,
        shift: float = 0.0,
        vectors: Vectors | None = None,
        start: Tree | None = None,
    ) -> Solution:
        """See `Solver.solve`; `matvec`, `shift` and `start` are not used."""
        bb = (vectors or Vectors()).dots([(rhs, rhs)]).item()
        if (ended := without_work(rhs, bb)) is not None:
            return ended
        return Solution(scaled(rhs, 1.0 / self.scale), Status.APPROXIMATE, 0, math.nan)
