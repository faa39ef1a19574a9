"""The inverse replaced by one step of the adaptive optimizer that solves the inner problem.

Choe et al. (2023), "Making scalable meta learning practical", arXiv 2310.05674: one inner step
moves theta by `- u(g)`, g the inner gradient, so theta answers a change of g with `- du/dg`, and
`q = (du/dg) b` takes the place of `A^{-1} b`. For Adam, `u = rate m_hat / D` with the metric
`D = sqrt(v_hat) + eps`. Simplified: D is held constant, and the share of g in m_hat is left out:

    q = b / (scale D)

which is the response to one step of Adam where `scale = 1 / learning_rate`. Without a metric it is
the `Identity`, the response to one step of gradient descent.
"""

from dataclasses import dataclass, field

from ispen_dist.linalg.neumann import Identity
from ispen_dist.linalg.solution import Solution
from ispen_dist.linalg.solver import MatVec
from ispen_dist.linalg.trees import Tree, divided
from ispen_dist.linalg.vectors import Vectors


@dataclass(frozen=True)
class Sama:
    """See the top of the file; costs no product.

    Attributes:
        scale: the divisor.
        metric: D, own parts, positive; without it this is `Identity`.
    """

    scale: float = 1.0
    metric: Tree | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        Identity(self.scale)

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
        adapted = rhs if self.metric is None else divided(rhs, self.metric)
        return Identity(self.scale).solve(matvec, adapted, shift=shift, vectors=vectors)
