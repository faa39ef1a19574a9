"""Every solver meets every operator; every way a solve can end is seen and named."""

import math

import problems
import pytest
import torch

from ispen_dist.linalg.operators import build_operator
from ispen_dist.linalg.solution import Status
from ispen_dist.linalg.solvers import CG, SOLVERS, Identity, Neumann, SingleReductionCG
from ispen_dist.linalg.vectors import Vectors

pytestmark = pytest.mark.usefixtures("float64")

TIGHT = {
    "cg": lambda largest: CG(2000, 1e-13),
    "cg_single_reduction": lambda largest: SingleReductionCG(2000, 1e-13),
    "neumann": lambda largest: Neumann(20000, largest, rtol=1e-12),
    "identity": lambda largest: Identity(largest),
}


def test_the_table_of_tight_solvers_is_complete():
    assert TIGHT.keys() == SOLVERS.keys()


@pytest.mark.parametrize("task", ["multilabel", "bilstm"])
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("solver_name", SOLVERS)
def test_every_solver_meets_every_operator(solver_name, curvature, task):
    batch = problems.random_batch(task, 5, 1)
    problem = problems.build_problem(task, batch, batch)
    operator = build_operator(curvature, problem.inner, problem.theta, problem.phi)
    eye = torch.eye(problems.flatten(problem.theta).numel())
    columns = [problems.flatten(operator.matvec(problems.unflatten(e, problem.theta))) for e in eye]
    H = torch.stack(columns)
    eigenvalues = torch.linalg.eigvalsh(H)
    damping = max(0.0, -eigenvalues[0].item()) + 0.05 * eigenvalues[-1].item()
    largest = eigenvalues[-1].item() + damping
    b = torch.randn(len(H), generator=torch.Generator().manual_seed(2))
    rhs = problems.unflatten(b, problem.theta)
    solution = TIGHT[solver_name](largest).solve(operator.matvec, rhs, shift=damping)
    value = problems.flatten(solution.value)
    if solver_name == "identity":
        torch.testing.assert_close(value, b / largest, rtol=1e-15, atol=0.0)
        assert solution.status is Status.APPROXIMATE
        return
    exact = torch.linalg.solve(H + damping * eye, b)
    assert solution.status is Status.CONVERGED
    assert (value - exact).norm() / exact.norm() < 1e-9
    true_residual = (b - (H + damping * eye) @ value).norm() / b.norm()
    assert solution.residual == pytest.approx(true_residual.item(), abs=1e-12)


def diagonal(*entries):
    d = torch.tensor(entries)
    return lambda v: {"w": d * v["w"]}


ONES = {"w": torch.ones(3, dtype=torch.float64)}


CGS = pytest.mark.parametrize("cg", [CG, SingleReductionCG])


@CGS
def test_cg_stops_on_negative_curvature_with_the_last_good_iterate(cg):
    solution = cg(20, 1e-10).solve(diagonal(1.0, 2.0, -5.0), ONES)
    assert solution.status is Status.NEGATIVE_CURVATURE
    assert not solution.status.usable
    assert solution.num_steps == 0
    assert solution.value["w"].abs().max() == 0.0


def spectrum(condition):
    """A symmetric positive definite matrix of size 40, and a right-hand side."""
    draw = torch.Generator().manual_seed(4)
    Q, _ = torch.linalg.qr(torch.randn(40, 40, generator=draw))
    A = (Q * torch.logspace(0, math.log10(condition), 40)) @ Q.T
    return (A + A.T) / 2, {"w": torch.randn(40, generator=draw)}


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
    calls = []

    def counted(products):
        calls.append(len(products))
        return products

    vectors = Vectors(reduce=counted)
    SingleReductionCG(6, 0.0).solve(lambda v: {"w": A @ v["w"]}, b, vectors=vectors)
    assert calls == [1] + [4] * 6


@CGS
def test_cg_reports_the_true_residual_in_float32_and_ill_conditioned(cg):
    A, b = spectrum(1e4)
    A, b = A.float(), {"w": b["w"].float()}
    solution = cg(400, 1e-4).solve(lambda v: {"w": A @ v["w"]}, b)
    assert solution.status is Status.CONVERGED
    true = (b["w"] - A @ solution.value["w"]).norm() / b["w"].norm()
    assert true < 1e-3


@CGS
def test_cg_reports_a_limit_that_came_too_early(cg):
    solution = cg(1, 1e-10).solve(diagonal(1.0, 2.0, 3.0), ONES)
    assert solution.status is Status.MAX_STEPS
    assert solution.status.usable
    assert solution.num_steps == 1
    assert solution.residuals[0] == 1.0
    assert 0.0 < solution.residual < 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "solver", [CG(5), SingleReductionCG(5), Neumann(5), Identity()], ids=list(SOLVERS)
)
def test_a_right_hand_side_that_is_not_finite_is_reported(solver, bad):
    solution = solver.solve(diagonal(1.0, 1.0, 1.0), {"w": torch.tensor([1.0, bad, 1.0])})
    assert solution.status is Status.NOT_FINITE


@pytest.mark.parametrize("solver", [CG(5), SingleReductionCG(5), Neumann(5)])
def test_a_product_that_is_not_finite_is_reported(solver):
    solution = solver.solve(diagonal(1.0, math.nan, 1.0), ONES)
    assert solution.status is Status.NOT_FINITE


def test_neumann_sees_that_its_scale_is_too_small():
    solution = Neumann(50, scale=1.0).solve(diagonal(1.0, 2.0, 3.0), ONES)
    assert solution.status is Status.DIVERGED
    assert "scale" in solution.status.help


def test_neumann_is_the_truncated_series_of_the_paper():
    c, num_terms, d = 4.0, 7, torch.tensor([1.0, 2.0, 3.0])
    series = sum((1.0 - d / c) ** k for k in range(num_terms)) / c
    solution = Neumann(num_terms, c).solve(diagonal(1.0, 2.0, 3.0), ONES)
    torch.testing.assert_close(solution.value["w"], series, rtol=1e-14, atol=0.0)
    assert solution.num_steps == num_terms


@pytest.mark.parametrize(
    "solver", [CG(5), SingleReductionCG(5), Neumann(5), Identity()], ids=list(SOLVERS)
)
def test_a_zero_right_hand_side_takes_no_product(solver):
    def forbidden(v):
        raise AssertionError("a product was taken")

    solution = solver.solve(forbidden, {"w": torch.zeros(3)})
    assert solution.status is Status.ZERO_RHS
    assert solution.num_steps == 0


@CGS
def test_a_start_worse_than_zero_is_dropped(cg):
    bad = {"w": torch.full((3,), 1e6)}
    cold = cg(2, 0.0).solve(diagonal(1.0, 2.0, 3.0), ONES)
    warm = cg(2, 0.0).solve(diagonal(1.0, 2.0, 3.0), ONES, start=bad)
    assert torch.equal(cold.value["w"], warm.value["w"])


def test_every_status_explains_itself():
    assert all(status.help.endswith(".") and len(status.help) > 30 for status in Status)


@pytest.mark.parametrize(
    "build",
    [lambda: CG(0), lambda: CG(5, 1.5), lambda: Neumann(5, -1.0), lambda: Identity(math.nan)],
)
def test_impossible_settings_are_refused(build):
    with pytest.raises(ValueError, match=r"expected a"):
        build()


@pytest.mark.parametrize("warm", [None, 0.9, 50.0], ids=["cold", "warm", "dropped"])
@pytest.mark.parametrize("solver_name", SOLVERS)
def test_the_combination_makes_the_solution_of_what_was_multiplied(solver_name, warm):
    A, b = spectrum(30.0)
    seen = []

    def matvec(v):
        seen.append(v["w"].clone())
        return {"w": A @ v["w"]}

    limits = {"cg": CG(6, 0.0), "cg_single_reduction": SingleReductionCG(6, 0.0)}
    solver = limits.get(solver_name) or Neumann(6, 20.0)
    if solver_name == "identity":
        assert Identity().solve(matvec, b).combination == ()
        return
    exact = torch.linalg.solve(A + 0.5 * torch.eye(40), b["w"])
    start = None if warm is None else {"w": warm * exact}
    solution = solver.solve(matvec, b, shift=0.5, start=start)
    assert len(solution.combination) == len(seen) == 6 + (warm is not None)
    made = sum(c * v for c, v in zip(solution.combination, seen, strict=True))
    torch.testing.assert_close(made, solution.value["w"], rtol=1e-12, atol=1e-13)


@CGS
def test_the_combination_of_a_failed_solve_is_that_of_its_last_iterate(cg):
    solution = cg(20, 1e-10).solve(diagonal(1.0, 2.0, -5.0), ONES)
    assert solution.combination == (0.0,)
