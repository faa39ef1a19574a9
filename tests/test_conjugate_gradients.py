"""Conjugate gradients in three forms: how they end, their iterates, and their reductions."""

import pytest
import torch
from linear_systems import METRIC, ONES, counting_vectors, diagonal, positive_like, spectrum

from ispen_dist.linalg.solution import Status
from ispen_dist.linalg.solvers import CG, PreconditionedCG, SingleReductionCG

pytestmark = pytest.mark.usefixtures("float64")


def preconditioned(max_steps, rtol):
    return PreconditionedCG(max_steps, rtol, METRIC)


CGS = pytest.mark.parametrize("cg", [CG, SingleReductionCG])
THREE = pytest.mark.parametrize("cg", [CG, SingleReductionCG, preconditioned])


@THREE
def test_cg_stops_on_negative_curvature_with_the_last_good_iterate(cg):
    solution = cg(20, 1e-10).solve(diagonal(1.0, 2.0, -5.0), ONES)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert not solution.status.usable
    assert solution.num_steps == 0
    assert solution.value["w"].abs().max() == 0.0


@THREE
def test_cg_reports_a_limit_that_came_too_early(cg):
    solution = cg(1, 1e-10).solve(diagonal(1.0, 2.0, 3.0), ONES)
    assert solution.status is Status.MAX_STEPS
    assert solution.status.usable
    assert solution.num_steps == 1
    assert solution.residuals[0] == 1.0
    assert 0.0 < solution.residual < 1.0


@CGS
def test_cg_reports_the_true_residual_in_float32_and_ill_conditioned(cg):
    A, b = spectrum(1e4)
    A, b = A.float(), {"w": b["w"].float()}
    solution = cg(400, 1e-4).solve(lambda v: {"w": A @ v["w"]}, b)
    assert solution.status is Status.CONVERGED
    true = (b["w"] - A @ solution.value["w"]).norm() / b["w"].norm()
    assert true < 1e-3


@THREE
def test_a_start_worse_than_zero_is_dropped(cg):
    bad = {"w": torch.full((3,), 1e6)}
    cold = cg(2, 0.0).solve(diagonal(1.0, 2.0, 3.0), ONES)
    warm = cg(2, 0.0).solve(diagonal(1.0, 2.0, 3.0), ONES, start=bad)
    assert torch.equal(cold.value["w"], warm.value["w"])


@THREE
def test_the_combination_of_a_failed_solve_is_that_of_its_last_iterate(cg):
    solution = cg(20, 1e-10).solve(diagonal(1.0, 2.0, -5.0), ONES)
    assert solution.combination == (0.0,)


def test_single_reduction_cg_takes_the_iterates_of_cg():
    A, b = spectrum(1e3)
    for num_steps in (1, 2, 5, 12):
        pair = [
            cg(num_steps, 0.0).solve(lambda v: {"w": A @ v["w"]}, b)
            for cg in (CG, SingleReductionCG)
        ]
        torch.testing.assert_close(pair[0].value, pair[1].value, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(pair[0].residuals, pair[1].residuals, rtol=1e-9, atol=0.0)
        assert pair[0].num_steps == pair[1].num_steps == num_steps


def test_single_reduction_cg_asks_for_its_inner_products_once_per_step():
    A, b = spectrum(10.0)
    vectors, calls = counting_vectors()
    SingleReductionCG(6, 0.0).solve(lambda v: {"w": A @ v["w"]}, b, vectors=vectors)
    assert calls == [1] + [4] * 6


def test_preconditioned_cg_takes_the_iterates_of_cg_in_other_coordinates():
    """Of q = P^(-1/2) x, conjugate gradients on P^(-1/2) A P^(-1/2) x = P^(-1/2) b."""
    A, b = spectrum(1e3)
    shift, metric = 0.7, positive_like(b)
    root = (metric["w"] + shift).sqrt()
    A_shifted = A + shift * torch.eye(40)
    for num_steps in (1, 2, 5, 12):
        pcg = PreconditionedCG(num_steps, 0.0, metric)
        q = pcg.solve(lambda v: {"w": A @ v["w"]}, b, shift=shift).value["w"]
        inside = {"w": b["w"] / root}
        x = CG(num_steps, 0.0).solve(lambda v: {"w": A_shifted @ (v["w"] / root) / root}, inside)
        torch.testing.assert_close(q, x.value["w"] / root, rtol=1e-9, atol=1e-12)


def test_the_right_diagonal_saves_steps_and_none_is_plain_cg():
    scale = torch.logspace(0, 4, 40)
    A, b = spectrum(3.0)
    A = A * scale.sqrt() * scale.sqrt()[:, None]

    def solve(solver):
        return solver.solve(lambda v: {"w": A @ v["w"]}, b)

    plain, without = solve(CG(400, 1e-8)), solve(PreconditionedCG(400, 1e-8))
    assert torch.equal(plain.value["w"], without.value["w"])
    assert plain.residuals == without.residuals
    found = solve(PreconditionedCG(400, 1e-8, {"w": scale}))
    assert found.status is Status.CONVERGED
    assert found.num_steps < plain.num_steps / 3


def test_preconditioned_cg_asks_for_its_inner_products_twice_per_step():
    A, b = spectrum(10.0)
    vectors, calls = counting_vectors()
    PreconditionedCG(6, 0.0, positive_like(b)).solve(
        lambda v: {"w": A @ v["w"]}, b, vectors=vectors
    )
    assert len(calls) == 2 + 2 * 6
