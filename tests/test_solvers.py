"""Every solver meets every operator; every way a solve can end is seen and named."""

import functools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import problems
import pytest
import torch
from linear_systems import METRIC, ONES, diagonal, positive_like, spectrum

from ispen_dist.linalg.operators import build_operator
from ispen_dist.linalg.solution import Status
from ispen_dist.linalg.solvers import (
    CG,
    SOLVERS,
    Identity,
    Neumann,
    Nystrom,
    PreconditionedCG,
    Sama,
    SingleReductionCG,
)
from ispen_dist.linalg.vectors import Vectors

pytestmark = pytest.mark.usefixtures("float64")

TIGHT = {
    "cg": lambda largest, metric: CG(2000, 1e-13),
    "cg_single_reduction": lambda largest, metric: SingleReductionCG(2000, 1e-13),
    "pcg": lambda largest, metric: PreconditionedCG(2000, 1e-13, metric),
    "neumann": lambda largest, metric: Neumann(20000, largest, rtol=1e-12),
    "nystrom": lambda largest, metric: Nystrom(problems.flatten(metric).numel(), 1e-9),
    "identity": lambda largest, metric: Identity(largest),
    "sama": lambda largest, metric: Sama(largest, metric),
}
"""By the largest eigenvalue of A, and a positive tree like the right-hand side."""


def test_the_table_of_tight_solvers_is_complete():
    assert TIGHT.keys() == SOLVERS.keys()


MEETINGS = [
    pytest.param(
        solver_name,
        task,
        # As many inner products as the square of the number of parameters.
        marks=[pytest.mark.thorough] if (solver_name, task) == ("nystrom", "bilstm") else [],
    )
    for solver_name in SOLVERS
    for task in ("multilabel", "bilstm")
]


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize(("solver_name", "task"), MEETINGS)
def test_every_solver_meets_every_operator(solver_name, curvature, task):
    problem, operator, H = curvature_of(task, curvature)
    eigenvalues = torch.linalg.eigvalsh(H)
    damping = max(0.0, -eigenvalues[0].item()) + 0.05 * eigenvalues[-1].item()
    largest = eigenvalues[-1].item() + damping
    b = torch.randn(len(H), generator=torch.Generator().manual_seed(2))
    rhs = problems.unflatten(b, problem.theta)
    metric = positive_like(rhs)
    solution = TIGHT[solver_name](largest, metric).solve(operator.matvec, rhs, shift=damping)
    value = problems.flatten(solution.value)
    if solver_name in ("identity", "sama"):
        divisor = largest * (problems.flatten(metric) if solver_name == "sama" else 1.0)
        torch.testing.assert_close(value, b / divisor, rtol=1e-14, atol=0.0)
        assert solution.status is Status.APPROXIMATE
        return
    eye = torch.eye(len(H))
    exact = torch.linalg.solve(H + damping * eye, b)
    assert solution.status is Status.CONVERGED
    assert (value - exact).norm() / exact.norm() < 1e-9
    true_residual = (b - (H + damping * eye) @ value).norm() / b.norm()
    assert solution.residual == pytest.approx(true_residual.item(), abs=1e-12)


@functools.cache
def curvature_of(task, curvature):
    """A tiny problem, its operator, and the same as a dense matrix."""
    batch = problems.random_batch(task, 5, 1)
    problem = problems.build_problem(task, batch, batch)
    operator = build_operator(curvature, problem.inner, problem.theta, problem.phi)
    eye = torch.eye(problems.flatten(problem.theta).numel())
    columns = [problems.flatten(operator.matvec(problems.unflatten(e, problem.theta))) for e in eye]
    return problem, operator, torch.stack(columns)


SHORT = {
    "cg": CG(5),
    "cg_single_reduction": SingleReductionCG(5),
    "pcg": PreconditionedCG(5, metric=METRIC),
    "neumann": Neumann(5),
    "nystrom": Nystrom(2),
    "identity": Identity(),
    "sama": Sama(metric=METRIC),
}
"""A few steps on a vector of three."""
EVERY = pytest.mark.parametrize("solver", SHORT.values(), ids=list(SHORT))
PREPARED = [SHORT[n] for n in SHORT if n not in ("identity", "sama")]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@EVERY
def test_a_right_hand_side_that_is_not_finite_is_reported(solver, bad):
    rhs = {"w": torch.tensor([1.0, bad, 1.0])}
    solution = solver.solve(diagonal(1.0, 1.0, 1.0), rhs, shift=0.1)
    assert solution.status is Status.NOT_FINITE


@pytest.mark.parametrize("solver", PREPARED)
def test_a_product_that_is_not_finite_is_reported(solver):
    solution = solver.solve(diagonal(1.0, math.nan, 1.0), ONES, shift=0.1)
    assert solution.status is Status.NOT_FINITE


def test_neumann_sees_that_its_scale_is_too_small():
    solution = Neumann(50, scale=1.0).solve(diagonal(1.0, 2.0, 3.0), ONES)
    assert solution.status is Status.DIVERGED
    assert "scale" in solution.status.help


@pytest.mark.parametrize("largest", [30.0, 1e3, 1e6])
def test_a_series_that_overflows_has_diverged(largest):
    rhs = {"w": torch.ones(3, dtype=torch.float32)}
    solution = Neumann(200, 10.0).solve(lambda v: {"w": largest * v["w"]}, rhs)
    assert solution.status is Status.DIVERGED


def test_neumann_is_the_truncated_series_of_the_paper():
    c, num_terms, d = 4.0, 7, torch.tensor([1.0, 2.0, 3.0])
    series = sum((1.0 - d / c) ** k for k in range(num_terms)) / c
    solution = Neumann(num_terms, c).solve(diagonal(1.0, 2.0, 3.0), ONES)
    torch.testing.assert_close(solution.value["w"], series, rtol=1e-14, atol=0.0)
    assert solution.num_steps == num_terms


@EVERY
def test_a_zero_right_hand_side_takes_no_product(solver):
    def forbidden(v):
        raise AssertionError("a product was taken")

    solution = solver.solve(forbidden, {"w": torch.zeros(3)}, shift=0.1)
    assert solution.status is Status.ZERO_RHS
    assert solution.num_steps == 0


@pytest.mark.parametrize("seed", range(20))
def test_one_reduction_says_converged_only_where_the_residual_is_small(seed):
    # A shift far above the curvature: one step takes away nearly all of the residual, and what is
    # left is less than the rounding of the two numbers that it is the difference of.
    draw = torch.Generator().manual_seed(seed)
    d = 1e-4 * torch.rand(300, generator=draw)
    rhs = {"w": torch.randn(300, generator=draw)}
    solution = SingleReductionCG(10, 1e-6).solve(lambda v: {"w": d * v["w"]}, rhs, shift=0.3)
    left = rhs["w"].double() - (d.double() + 0.3) * solution.value["w"].double()
    true = float(left.norm() / rhs["w"].double().norm())
    assert solution.status is Status.CONVERGED
    assert true < 2e-6
    assert solution.residual == pytest.approx(true, rel=0.5, abs=2e-7)


def test_a_start_is_laid_out_as_the_right_hand_side_is():
    strides = []

    def matvec(v):
        strides.append(v["w"].stride())
        return {"w": 2.0 * v["w"]}

    by_columns = {"w": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).T}
    CG(3).solve(matvec, by_columns, start={"w": torch.ones(4, 3)})
    assert set(strides) == {(1, 4)}


def test_every_status_explains_itself():
    assert all(status.help.endswith(".") and len(status.help) > 30 for status in Status)


@pytest.mark.parametrize(
    "build",
    [
        lambda: CG(0),
        lambda: CG(5, 1.5),
        lambda: PreconditionedCG(5, -0.1),
        lambda: Neumann(5, -1.0),
        lambda: Nystrom(0),
        lambda: Nystrom(2).solve(diagonal(1.0, 2.0, 3.0), ONES),
        lambda: Identity(math.nan),
        lambda: Sama(0.0),
    ],
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

    solver = {
        "cg": CG(6, 0.0),
        "cg_single_reduction": SingleReductionCG(6, 0.0),
        "pcg": PreconditionedCG(6, 0.0, positive_like(b)),
        "neumann": Neumann(6, 20.0),
        "nystrom": Nystrom(5),
        "identity": Identity(),
        "sama": Sama(1.0, positive_like(b)),
    }[solver_name]
    if solver_name in ("identity", "sama"):
        assert solver.solve(matvec, b).combination == ()
        return
    exact = torch.linalg.solve(A + 0.5 * torch.eye(40), b["w"])
    start = None if warm is None else {"w": warm * exact}
    solution = solver.solve(matvec, b, shift=0.5, start=start)
    of_start = warm is not None and solver_name != "nystrom"
    assert len(solution.combination) == len(seen) == 6 + of_start
    made = sum(c * v for c, v in zip(solution.combination, seen, strict=True))
    torch.testing.assert_close(made, solution.value["w"], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("solver_name", SOLVERS)
def test_every_solver_on_unequal_shards_gives_what_one_process_gives(solver_name):
    """Ranks as threads that meet in every reduction; one of them holds nothing."""
    A, b = spectrum(30.0)
    sizes, metric = (27, 0, 13), positive_like(b)
    ranks = Ranks(len(sizes))

    def build(metric, seed):
        if solver_name == "nystrom":
            return Nystrom(40, 1e-8, seed)
        return TIGHT[solver_name](31.0, metric)

    def solve(rank):
        def own(x):
            return {"w": x.split(sizes)[rank]}

        def matvec(v):
            return own(A @ ranks.gathered(rank, v["w"]))

        vectors = Vectors(reduce=lambda x: ranks.gathered(rank, x[None]).sum(0))
        solver = build(own(metric["w"]), seed=rank)
        return solver.solve(matvec, own(b["w"]), shift=0.5, vectors=vectors)

    parts = ranks.run(solve)
    whole = build(metric, seed=9).solve(lambda v: {"w": A @ v["w"]}, b, shift=0.5)
    found = torch.cat([part.value["w"] for part in parts])
    torch.testing.assert_close(found, whole.value["w"], rtol=1e-7, atol=1e-9)
    assert {part.status for part in parts} == {whole.status}
    assert len({(part.num_steps, part.combination) for part in parts}) == 1


class Ranks:
    """Ranks of one process."""

    def __init__(self, num_ranks):
        self._tensors = [None] * num_ranks
        self._barrier = threading.Barrier(num_ranks, timeout=60)

    def gathered(self, rank, tensor):
        """Return the tensors of all ranks, one after another."""
        self._tensors[rank] = tensor
        self._barrier.wait()
        result = torch.cat(self._tensors)
        self._barrier.wait()
        return result

    def run(self, function):
        """Return what a function of the rank returns on every rank."""

        def run_one(rank):
            try:
                return function(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(len(self._tensors)) as pool:
            return list(pool.map(run_one, range(len(self._tensors))))
