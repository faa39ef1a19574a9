"""The interface of a linear solver, and how an iterative one begins.

A solver of `A q = b`, A = H + shift I, is a frozen dataclass of its settings with one method,
`solve`. It sees a matrix-vector product with a symmetric H, a right-hand side and an arithmetic of
vectors; where these live (one process, replicas, shards) is none of its business. Every decision is
taken from the scalars that the inner products return, which are the same on every rank, so all
ranks stop together. A solver writes into vectors of its own only: never into the right-hand side,
the start or a product.

To add one: write the dataclass in a file of its own, and add a row to `linalg/solvers.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ispen_dist.linalg.solution import Solution, Status
from ispen_dist.linalg.trees import Tree, add_scaled, copied, zeros_like
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


def require_positive(owner: object, **values: float) -> None:
    """Raise ValueError for a setting of a solver that is not a finite number above 0."""
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(
                f"{type(owner).__name__}.{name}: expected a positive number, got {value}"
            )


@dataclass(frozen=True)
class Begin:
    """First iterate, its residual, and their squared norms; `ended` where there is no work.

    `of_start` is the coefficient of a start in the first iterate, where a start was multiplied.
    """

    q: Tree
    r: Tree
    rr: float
    bb: float
    ended: Solution | None
    of_start: tuple[float, ...] = ()


def begin_solve(matvec: MatVec, rhs: Tree, vectors: Vectors, start: Tree | None) -> Begin:
    """Return the better of zero and a start; `matvec` multiplies with A."""
    q, r = zeros_like(rhs), copied(rhs)
    of_start: tuple[float, ...] = ()
    if start is None:
        bb = rr = vectors.dots([(rhs, rhs)]).item()
    else:
        # Laid out as the right-hand side is, whether it was kept or read from a checkpoint: a
        # product can round otherwise where a matrix lies by columns.
        start = {k: torch.empty_like(x).copy_(start[k]) for k, x in rhs.items()}
        r_start = add_scaled(rhs, -1.0, matvec(start))
        bb, rr = vectors.dots([(rhs, rhs), (r_start, r_start)]).tolist()
        of_start = (1.0,) if rr < bb else (0.0,)
        if rr < bb:
            q, r = start, r_start
        else:
            rr = bb
    return Begin(q, r, rr, bb, without_work(rhs, bb), of_start)


def without_work(rhs: Tree, bb: float) -> Solution | None:
    """Return how a solve ends at once, where `bb = |rhs|^2` is zero or not finite."""
    if not math.isfinite(bb):
        return Solution(zeros_like(rhs), Status.NOT_FINITE, 0, math.nan)
    return Solution(zeros_like(rhs), Status.ZERO_RHS, 0, 0.0) if bb == 0.0 else None


def read(*scalars: Tensor) -> list[float]:
    """Bring device scalars to the host in one transfer."""
    return torch.stack(scalars).tolist()
