"""Linear solvers for `A q = b` on trees, given only products with a symmetric `H`, A = H + shift I.

A solver is a frozen dataclass of its settings with one method, `solve`. It sees a matrix-vector
product, a right-hand side and an arithmetic of vectors; where these live (one process,
replicas, shards) is none of its business. Every decision is taken from the scalars that the
inner products return, which are the same on every rank, so all ranks stop together. A solver
writes into vectors of its own only: never into the right-hand side, the start or a product.

To add one: write the dataclass here or in a file of its own, and add a row to `SOLVERS`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ispen_dist.linalg.solution import Solution, Status
from ispen_dist.linalg.trees import Tree, add_scaled, copied, scaled, zeros_like
from ispen_dist.linalg.vectors import Vectors

MatVec = Callable[[Tree], Tree]


class Solver(Protocol):
    """The interface of every linear solver."""

    def solve(
        self,
        matvec: MatVec,
        rhs: Tree,
        *,
        shift: float = 0.0,
        vectors: Vectors | None = None,
        start: Tree | None = None,
    ) -> Solution:
        """Solve `A q = rhs` with `A = H + shift I`.

        Args:
            matvec: returns `H v` for a tree `v` like `rhs`, identical on every rank.
            rhs: the right-hand side `b`.
            shift: the damping, added to the diagonal of H.
            vectors: arithmetic of own parts, and sums over ranks; default plain, one process.
            start: initial guess, for instance the solution of the previous outer step; dropped
                where zero is the better start.
        """
        ...


def shifted(matvec: MatVec, shift: float) -> MatVec:
    """Return the product with `H + shift I`."""
    if shift == 0.0:
        return matvec
    return lambda v: add_scaled(matvec(v), shift, v)


def _require_positive(owner: object, **values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(
                f"{type(owner).__name__}.{name}: expected a positive number, got {value}"
            )


@dataclass(frozen=True)
class _Begin:
    """First iterate, its residual, and their squared norms; `ended` where there is no work.

    `of_start` is the coefficient of a start in the first iterate, where a start was multiplied.
    """

    q: Tree
    r: Tree
    rr: float
    bb: float
    ended: Solution | None
    of_start: tuple[float, ...] = ()


def _begin(matvec: MatVec, rhs: Tree, vectors: Vectors, start: Tree | None) -> _Begin:
    q, r = zeros_like(rhs), copied(rhs)
    of_start: tuple[float, ...] = ()
    if start is None:
        bb = rr = vectors.dots([(rhs, rhs)]).item()
    else:
        r_start = add_scaled(rhs, -1.0, matvec(start))
        bb, rr = vectors.dots([(rhs, rhs), (r_start, r_start)]).tolist()
        of_start = (1.0,) if rr < bb else (0.0,)
        if rr < bb:
            q, r = copied(start), r_start
        else:
            rr = bb
    ended = None
    if not math.isfinite(bb):
        ended = Solution(zeros_like(rhs), Status.NOT_FINITE, 0, math.nan)
    elif bb == 0.0:
        ended = Solution(zeros_like(rhs), Status.ZERO_RHS, 0, 0.0)
    return _Begin(q, r, rr, bb, ended, of_start)


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
        _require_positive(self, max_steps=self.max_steps)
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
        begin = _begin(A, rhs, vectors, start)
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
            pAp, rr_next = _read(pAp_device, vectors.cg_update(q, r, p, Hp, alpha, damping))
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

    In exact arithmetic the iterates of `CG`, at half the all-reduces and for one more vector; in
    rounding it loses orthogonality somewhat earlier. It stops on negative curvature at the same
    iteration.

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
        begin = _begin(A, rhs, vectors, start)
        if begin.ended is not None:
            return begin.ended
        q, r, rr, bb = begin.q, begin.r, begin.rr, begin.bb
        history = [math.sqrt(rr / bb)]
        steps: list[tuple[float, float]] = []
        p, s = zeros_like(rhs), zeros_like(rhs)
        rr_old, pAp_old, ss_old = math.inf, 0.0, 0.0

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


def _read(*scalars: Tensor) -> list[float]:
    """Bring device scalars to the host in one transfer."""
    return torch.stack(scalars).tolist()


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
        _require_positive(self, max_steps=self.max_steps, scale=self.scale)

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
        begin = _begin(A, rhs, vectors, start)
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
            return Status.NOT_FINITE
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
        _require_positive(self, scale=self.scale)

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
        if not math.isfinite(bb):
            return Solution(zeros_like(rhs), Status.NOT_FINITE, 0, math.nan)
        status = Status.APPROXIMATE if bb > 0.0 else Status.ZERO_RHS
        return Solution(scaled(rhs, 1.0 / self.scale), status, 0, math.nan)


SOLVERS: dict[str, type[CG] | type[SingleReductionCG] | type[Neumann] | type[Identity]] = {
    "cg": CG,
    "cg_single_reduction": SingleReductionCG,
    "neumann": Neumann,
    "identity": Identity,
}
