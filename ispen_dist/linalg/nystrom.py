"""The inverse of a low-rank approximation of H, with the damping as the rest of its spectrum.

Hataya and Yamada (2023), "Nystrom method for accurate and scalable implicit differentiation",
arXiv 2302.09726. With random directions O = (o_1, ..., o_k) and Y = H O,

    H ~ H_k = Y M^+ Y^T,    M = O^T Y,                exact where O spans the range of H

    (H_k + shift I)^{-1} b = (b - Y (shift M + Y^T Y)^+ Y^T b) / shift         (Woodbury)

Departures: (1) directions are Gaussian and not columns of the identity, which sees every part of H
and needs no entry of a vector that may lie on another rank. (2) One more product, with q, measures
the residual; and since q has then been multiplied, its tangent is known as well. The k products do
not wait for each other's inner products, which all come in one reduction.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ispen_dist.linalg.solution import Solution, Status
from ispen_dist.linalg.solver import MatVec, require_positive, shifted, without_work
from ispen_dist.linalg.trees import Tree, add_scaled, random_like, scaled, zeros_like
from ispen_dist.linalg.vectors import Vectors


@dataclass(frozen=True)
class Nystrom:
    """See the top of the file. Holds 2 k vectors.

    H_k + shift I is positive definite where H is positive semidefinite. Of an indefinite H it may
    fail to be, also where H + shift I is: this is reported as negative curvature. Where b has a
    share in a direction that H_k misses, with an eigenvalue h, q is (h + shift) / shift times too
    long there: a residual above 1 says that h is above the shift, and that the rank is too low.

    Attributes:
        max_steps: the rank k, one product each.
        rtol: the solve has converged where `|b - A q| <= rtol |b|`.
        seed: of the directions; alike on ranks with the same parts, different where parts differ.
    """

    max_steps: int = 20
    rtol: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, max_steps=self.max_steps)

    def solve(
        self,
        matvec: MatVec,
        rhs: Tree,
        *,
        shift: float = 0.0,
        vectors: Vectors | None = None,
        start: Tree | None = None,
    ) -> Solution:
        """See `Solver.solve`; the shift must be positive, `start` is not used."""
        if not shift > 0.0:
            raise ValueError(
                f"shift: expected a number above 0 for a Nystrom approximation, got {shift}; "
                "raise the damping"
            )
        vectors, k = vectors or Vectors(), self.max_steps
        bb = vectors.dots([(rhs, rhs)]).item()
        if (ended := without_work(rhs, bb)) is not None:
            return ended
        generator = torch.Generator().manual_seed(self.seed)
        directions = [random_like(rhs, generator) for _ in range(k)]
        Y = [_by_rows(matvec(direction)) for direction in directions]
        M, G, Yb = _products(directions, Y, _by_rows(rhs), vectors)
        if not bool((M.isfinite() & G.isfinite() & Yb.isfinite()).all()):
            return Solution(zeros_like(rhs), Status.NOT_FINITE, k, math.nan)
        precision = torch.finfo(next(iter(rhs.values())).dtype).eps
        weights, positive = _woodbury(M, G, Yb, shift, precision)
        q = scaled(rhs, 1.0 / shift)
        for y, weight in zip(Y, weights.tolist(), strict=True):
            q = add_scaled(q, -weight / shift, y)
        del directions, Y
        return self._measured(matvec, rhs, q, shift, vectors, positive)

    def _measured(
        self, matvec: MatVec, rhs: Tree, q: Tree, shift: float, vectors: Vectors, positive: bool
    ) -> Solution:
        r = add_scaled(rhs, -1.0, shifted(matvec, shift)(q))
        bb, rr = vectors.dots([(rhs, rhs), (r, r)]).tolist()
        residual = math.sqrt(rr / bb) if math.isfinite(rr) else math.nan
        if not math.isfinite(rr):
            status = Status.NOT_FINITE
        elif not positive:
            status = Status.NEGATIVE_CURVATURE
        else:
            status = Status.CONVERGED if residual <= self.rtol else Status.MAX_STEPS
        combination = (*[0.0] * self.max_steps, 1.0)
        return Solution(q, status, self.max_steps + 1, residual, (1.0, residual), combination)


def _by_rows(x: Tree) -> Tree:
    """Return a tree that lies by rows, as random vectors do: each meets k others in a product."""
    return {key: value.contiguous() for key, value in x.items()}


def _products(
    directions: list[Tree], Y: list[Tree], rhs: Tree, vectors: Vectors
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `O^T Y` and `Y^T Y`, (k, k) and symmetric, and `Y^T b`, (k,), on the host."""
    k = len(Y)
    i, j = torch.triu_indices(k, k)
    upper = list(zip(i.tolist(), j.tolist(), strict=True))
    pairs = [(directions[a], Y[b]) for a, b in upper] + [(Y[a], Y[b]) for a, b in upper]
    products = vectors.dots([*pairs, *((y, rhs) for y in Y)]).to("cpu", torch.float64)
    *squares, Yb = products.split([len(upper), len(upper), k])
    M, G = torch.zeros(2, k, k, dtype=torch.float64)
    for matrix, entries in zip((M, G), squares, strict=True):
        matrix[i, j] = matrix[j, i] = entries
    return M, G, Yb


def _woodbury(
    M: Tensor, G: Tensor, Yb: Tensor, shift: float, precision: float
) -> tuple[Tensor, bool]:
    """Return `(shift M + G)^+ Y^T b`, and whether H_k + shift I is positive definite.

    The second by Sylvester's law of inertia: the block matrix [[-M, Y^T], [Y, shift I]] reduces to
    -M and H_k + shift I, and also to shift I and -(shift M + G) / shift, so the former is positive
    definite exactly where M and shift M + G have as many negative eigenvalues.

    Args:
        M: `O^T H O`, (k, k).
        G: `Y^T Y`, (k, k).
        Yb: `Y^T b`, (k,).
        shift: above 0.
        precision: of the inner products, below which an eigenvalue is zero.
    """
    k = len(M)
    values, basis = torch.linalg.eigh(shift * M + G)
    present = values.abs() > k * precision * values.abs().max()
    inverse = torch.where(present, 1.0 / torch.where(present, values, 1.0), 0.0)
    of_M = torch.linalg.eigvalsh(M)
    num_negative = (of_M < -k * precision * of_M.abs().max()).sum()
    positive = bool(num_negative == (present & (values < 0.0)).sum())
    return basis @ (inverse * (basis.T @ Yb)), positive
