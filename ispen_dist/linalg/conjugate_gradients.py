"""Conjugate gradients, with two reductions per iteration and with one."""

import math
from dataclasses import dataclass

import torch

from ispen_dist.linalg.solution import Solution, Status
from ispen_dist.linalg.solver import MatVec, begin_solve, read, require_positive, shifted
from ispen_dist.linalg.trees import Tree, copied, zeros_like
from ispen_dist.linalg.vectors import Vectors


@dataclass(frozen=True)
class CG:
    """Conjugate gradients (Hestenes and Stiefel 1952), stopping on negative curvature.

    Departures from the textbook: (1) `p.Ap <= 0` ends the solve with the last good iterate, as
    Steihaug (1983) does, and is reported; (2) a warm start worse than zero is dropped; (3) the
    scalars of an iteration are read by the host once, after its vector updates are queued; (4) the
    shift enters the passes over vectors, which read p anyway, and not the product.

    Attributes:
        max_steps: limit on products with `A`.
        rtol: stop when `|b - A q| <= rtol |b|`; 0 runs to `max_steps`.
    """

    max_steps: int = 20
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        require_positive(self, max_steps=self.max_steps)
        if not 0.0 <= self.rtol < 1.0:
            raise ValueError(f"CG.rtol: expected a number in [0, 1), got {self.rtol}")

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
        q, r, rr, bb = begin.q, begin.r, begin.rr, begin.bb
        p, history, coefficients = copied(r), [math.sqrt(rr / bb)], [*begin.of_start]
        damping = next(iter(rhs.values())).new_tensor(shift)

        def end(status: Status) -> Solution:
            steps = (len(history) - 1, history[-1], tuple(history))
            return Solution(q, status, *steps, tuple(coefficients))

        while history[-1] > self.rtol and len(history) <= self.max_steps:
            Hp = matvec(p)
            pAp_device = vectors.curvature(p, Hp, damping)
            # A step of zero where there must be none: q stays the last good iterate.
            alpha = torch.where(pAp_device > 0.0, rr / pAp_device, 0.0)
            pAp, rr_next = read(pAp_device, vectors.cg_update(q, r, p, Hp, alpha, damping))
            del Hp
            coefficients.append(rr / pAp if pAp > 0.0 else 0.0)
            if not math.isfinite(pAp):
                return end(Status.NOT_FINITE)
            if pAp <= 0.0:
                return end(Status.NEGATIVE_CURVATURE)
            if not math.isfinite(rr_next):
                return end(Status.NOT_FINITE)
            vectors.direction_update(p, r, pAp_device.new_tensor(rr_next / rr))
            rr = rr_next
            history.append(math.sqrt(rr / bb))
        return end(Status.CONVERGED if history[-1] <= self.rtol else Status.MAX_STEPS)


@dataclass(frozen=True)
class SingleReductionCG:
    """Conjugate gradients with all inner products of an iteration in one reduction.

    Chronopoulos and Gear (1989): the product is taken of the residual instead of the direction,
    and `s = A p` follows by recurrence, so that all scalars of an iteration are known together:

        beta = (r, r) / (r, r)_old,    p.Ap = (r, A r) - beta^2 (p.Ap)_old,    alpha = (r, r) / p.Ap
        (s, s) = (A r, A r) + 2 beta (A r, s_old) + beta^2 (s, s)_old
        (r, r)_new = alpha^2 (s, s) - (r, r),   which the next iteration replaces by the true one.

    Where so little of (r, r) is left that the difference is rounding, it is measured, for one
    reduction more. In exact arithmetic the iterates of `CG`, at half the all-reduces and for one
    more vector; in rounding it loses orthogonality somewhat earlier. It stops on negative curvature
    at the same iteration.

    Attributes:
        max_steps: limit on products with `A`.
        rtol: stop when `|b - A q| <= rtol |b|`; 0 runs to `max_steps`.
    """

    max_steps: int = 20
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        CG(self.max_steps, self.rtol)

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
        q, r, rr, bb = begin.q, begin.r, begin.rr, begin.bb
        history = [math.sqrt(rr / bb)]
        steps: list[tuple[float, float]] = []
        p, s = zeros_like(rhs), zeros_like(rhs)
        rr_old, pAp_old, ss_old = math.inf, 0.0, 0.0
        least = 100.0 * torch.finfo(next(iter(rhs.values())).dtype).eps

        def end(status: Status) -> Solution:
            combination = (*begin.of_start, *_of_residuals(steps))
            return Solution(q, status, len(history) - 1, history[-1], tuple(history), combination)

        while history[-1] > self.rtol and len(history) <= self.max_steps:
            Ar = A(r)
            products = vectors.dots([(r, r), (r, Ar), (Ar, Ar), (Ar, s)])
            rr, rAr, ArAr, Ars = products.tolist()
            beta = rr / rr_old
            pAp = rAr - beta * beta * pAp_old
            steps.append((rr / pAp if pAp > 0.0 else 0.0, beta))
            if not math.isfinite(pAp):
                return end(Status.NOT_FINITE)
            if pAp <= 0.0:
                return end(Status.NEGATIVE_CURVATURE)
            alpha, ss = rr / pAp, ArAr + 2.0 * beta * Ars + beta * beta * ss_old
            rr_next = max(alpha * alpha * ss - rr, 0.0)
            if not math.isfinite(rr_next):
                return end(Status.NOT_FINITE)
            scalars = products.new_tensor([alpha, beta])
            vectors.single_reduction_update(q, r, p, s, Ar, scalars[0], scalars[1])
            del Ar
            if rr_next < least * rr:
                rr_next = vectors.dots([(r, r)]).item()  # nothing of the difference is left
            rr_old, pAp_old, ss_old = rr, pAp, ss
            history[-1] = math.sqrt(rr / bb)
            history.append(math.sqrt(rr_next / bb))
        return end(Status.CONVERGED if history[-1] <= self.rtol else Status.MAX_STEPS)


def _of_residuals(steps: list[tuple[float, float]]) -> list[float]:
    """Return the coefficients of `sum_k alpha_k p_k` in r_k, where `p_k = r_k + beta_k p_{k-1}`."""
    result: list[float] = []
    after = 0.0  # beta_{k+1} c_{k+1}
    for alpha, beta in reversed(steps):
        result.append(alpha + after)
        after = beta * result[-1]
    return result[::-1]
