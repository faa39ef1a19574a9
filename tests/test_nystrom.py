"""The inverse of a low-rank approximation: where it is exact, and what it says where it is not."""

import pytest
import torch
from linear_systems import counting_vectors, spectrum

from ispen_dist.linalg.solution import Status
from ispen_dist.linalg.solvers import Nystrom

pytestmark = pytest.mark.usefixtures("float64")


def low_rank(*eigenvalues):
    draw = torch.Generator().manual_seed(6)
    Q, _ = torch.linalg.qr(torch.randn(40, len(eigenvalues), generator=draw))
    return (Q * torch.tensor(eigenvalues)) @ Q.T, {"w": torch.randn(40, generator=draw)}


def solve_low_rank(H, b, rank, shift=0.3, rtol=1e-6):
    return Nystrom(rank, rtol).solve(lambda v: {"w": H @ v["w"]}, b, shift=shift)


@pytest.mark.parametrize("rank", [3, 4, 7])
def test_nystrom_is_exact_where_its_rank_reaches_that_of_the_curvature(rank):
    H, b = low_rank(9.0, 2.0, 0.5)
    solution = solve_low_rank(H, b, rank)
    exact = torch.linalg.solve(H + 0.3 * torch.eye(40), b["w"])
    assert solution.status is Status.CONVERGED
    assert solution.num_steps == rank + 1
    torch.testing.assert_close(solution.value["w"], exact, rtol=1e-9, atol=1e-10)


def test_nystrom_of_a_lower_rank_is_the_formula_with_a_dense_inverse():
    H, b = low_rank(9.0, 2.0, 0.5)
    solution = solve_low_rank(H, b, 2)
    draw = torch.Generator().manual_seed(0)
    O = torch.stack([torch.randn(40, generator=draw) for _ in range(2)], 1)  # noqa: E741
    H_k = H @ O @ torch.linalg.inv(O.T @ H @ O) @ O.T @ H
    q = torch.linalg.solve(H_k + 0.3 * torch.eye(40), b["w"])
    torch.testing.assert_close(solution.value["w"], q, rtol=1e-10, atol=1e-12)
    assert solution.status is Status.MAX_STEPS
    true = (b["w"] - H @ q - 0.3 * q).norm() / b["w"].norm()
    assert solution.residual == pytest.approx(true.item(), rel=1e-10)


@pytest.mark.parametrize(("shift", "status"), [(0.3, "negative_curvature"), (2.5, "converged")])
def test_nystrom_sees_a_damping_below_the_most_negative_eigenvalue(shift, status):
    H, b = low_rank(9.0, -2.0, 0.5)
    solution = solve_low_rank(H, b, 5, shift)
    assert solution.status is Status(status)
    assert solution.status.usable == (status == "converged")


def test_nystrom_asks_for_its_inner_products_once():
    A, b = spectrum(10.0)
    vectors, calls = counting_vectors()
    Nystrom(4).solve(lambda v: {"w": A @ v["w"]}, b, shift=0.3, vectors=vectors)
    assert calls == [1, 10 + 10 + 4, 2]


def test_nystrom_holds_in_float32():
    """Also beyond the rank of the curvature: the small system is singular but for rounding."""
    H, b = low_rank(9.0, 2.0, 0.5)
    exact = torch.linalg.solve(H + 0.3 * torch.eye(40), b["w"])
    for rank in (3, 6):
        solution = solve_low_rank(H.float(), {"w": b["w"].float()}, rank, rtol=1e-4)
        assert solution.status is Status.CONVERGED
        assert (solution.value["w"].double() - exact).norm() / exact.norm() < 1e-4
