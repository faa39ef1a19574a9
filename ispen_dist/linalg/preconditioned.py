"""Conjugate gradients preconditioned by the metric of an adaptive optimizer.

With a diagonal P > 0, conjugate gradients on `P^{-1/2} A P^{-1/2}`, written without the square root
(Saad, Iterative Methods for Sparse Linear Systems, algorithm 9.1):

    z = P^{-1} r,    alpha = (r, z) / p.Ap,    beta = (r, z)_new / (r, z),    p = z + beta p

P is D + shift, with D the metric of the inner optimizer, for Adam `sqrt(v_hat) + eps`. It is known
without a product, lies as the parameters lie, and enters entry by entry, whatever the layout.
Only the ratios of its entries matter: where the damping dwarfs D, P is a multiple of the identity
and the iterates are those of plain conjugate gradients.
"""

import math
from dataclasses import dataclass, field

import torch

from ispen_dist.linalg.conjugate_gradients import CG
from ispen_dist.linalg.solution import Solution, Status
from ispen_dist.linalg.solver import MatVec, begin_solve, read, shifted
from ispen_dist.linalg.trees import Tree, add_scaled, copied, divided
from ispen_dist.linalg.vectors import Vectors


@dataclass(frozen=True)
class PreconditionedCG:
    """See the top of the file; departs from the textbook as `CG` does, and stops by the same `|r|`.

    Attributes:
        max_steps: limit on products with `A`.
        rtol: stop when `|b - A q| <= rtol |b|`; 0 runs to `max_steps`.
        metric: D, own parts, positive; without it this is `CG`.
    """

    max_steps: int = 20
    rtol: float = 1e-6
    metric: Tree | None = field(default=None, repr=False, compare=False)

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
        if self.metric is None:
            plain = CG(self.max_steps, self.rtol)
            return plain.solve(matvec, rhs, shift=shift, vectors=vectors, start=start)
        vectors = vectors or Vectors()
        begin = begin_solve(shifted(matvec, shift), rhs, vectors, start)
        if begin.ended is not None:
            return begin.ended
        P = {key: self.metric[key] + shift for key in rhs}
        q, r, bb = begin.q, begin.r, begin.bb
        history, coefficients = [math.sqrt(begin.rr / bb)], [*begin.of_start]
        z = divided(r, P)
        p, rz = copied(z), vectors.dots([(r, z)]).item()
        damping = next(iter(rhs.values())).new_tensor(shift)

        def end(status: Status) -> Solution:
            steps = (len(history) - 1, history[-1], tuple(history))
            return Solution(q, status, *steps, tuple(coefficients))

        while history[-1] > self.rtol and len(history) <= self.max_steps:
            Hp = matvec(p)
            pAp_device = vectors.curvature(p, Hp, damping)
            # A step of zero where there must be none: q stays the last good iterate.
            alpha = torch.where(pAp_device > 0.0, rz / pAp_device, 0.0)
            q = add_scaled(q, alpha, p)
            r = add_scaled(add_scaled(r, -alpha, Hp), -alpha * damping, p)
            del Hp
            z = divided(r, P)
            pAp, rr, rz_next = read(pAp_device, *vectors.dots([(r, r), (r, z)]))
            coefficients.append(rz / pAp if pAp > 0.0 else 0.0)
            if not math.isfinite(pAp):
                return end(Status.NOT_FINITE)
            if pAp <= 0.0:
                return end(Status.NEGATIVE_CURVATURE)
            if not math.isfinite(rr + rz_next):
                return end(Status.NOT_FINITE)
            vectors.direction_update(p, z, pAp_device.new_tensor(rz_next / rz))
            rz = rz_next
            history.append(math.sqrt(rr / bb))
        return end(Status.CONVERGED if history[-1] <= self.rtol else Status.MAX_STEPS)
