"""What the products of a solve have shown of J, for the mixed derivative at its end.

A solution of conjugate gradients or of a series is a combination of the vectors that were
multiplied, `q = sum_k c_k v_k`, and every product has computed `J v_k` on its way. So
`J q = sum_k c_k (J v_k)` costs no pass through the model, and no communication where that is
sharded, for the memory of one tensor of outputs per product.
"""

from collections.abc import Sequence

from torch import Tensor


class Tangents:
    """The tangents `J v` of the products with one operator, in order."""

    def __init__(self) -> None:
        self._z_dots: list[Tensor] = []

    def seen(self, z_dot: Tensor) -> Tensor:
        """Remember the tangent of a product, and return it."""
        self._z_dots.append(z_dot.detach())
        return z_dot

    def combined(self, coefficients: Sequence[float]) -> Tensor:
        """Return `sum_k c_k (J v_k)`, with a coefficient for every product so far."""
        assert len(coefficients) == len(self._z_dots) > 0
        first, *rest = zip(coefficients, self._z_dots, strict=True)
        total = first[1] * first[0]
        for c, z_dot in rest:
            total.add_(z_dot, alpha=c)
        return total
