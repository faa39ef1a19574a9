"""The implicit gradient against a dense solve, finite differences and a closed form, float64."""

import dataclasses
import math

import problems
import pytest
import torch

import ispen_dist
from ispen_dist.linalg.operators import HessianOperator, build_operator, symmetry_defect

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(scope="module", params=["multilabel", "bilstm"])
def solved(request, float64):
    """A tiny problem of each task at its inner optimum, with ridge so that H > 0."""
    batch = problems.random_batch(request.param, 6, 0)
    problem = problems.build_problem(
        request.param,
        batch,
        problems.random_batch(request.param, 5, 9),
        task_weight=1.0,
        objective="ssvm",
    )
    problem = dataclasses.replace(problem, inner=problems.with_ridge(problem.inner, 0.1))
    phi = problems.flatten(problem.phi)
    return problem, problems.solve_inner(problem, problems.flatten(problem.theta), phi), phi


def compute(problem, theta, phi, **settings):
    return ispen_dist.hypergradient(
        problem.inner,
        problem.outer,
        problems.unflatten(theta, problem.theta),
        problems.unflatten(phi, problem.phi),
        **settings,
    )


def defect_of(operator):
    draw = torch.Generator().manual_seed(0)
    u, v = (
        {k: torch.randn(x.shape, generator=draw).to(x) for k, x in operator.gradient.items()}
        for _ in range(2)
    )
    return symmetry_defect(operator, u, v)


def relative_error(value, reference):
    return ((value - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_equals_dense_solve(solved, damping):
    problem, theta, phi = solved
    result = compute(problem, theta, phi, solver=ispen_dist.CG(500, 1e-13), damping=damping)
    reference = problems.dense_hypergradient(problem, theta, phi, damping)
    assert result.status is ispen_dist.Status.CONVERGED
    assert relative_error(problems.flatten(result.value), reference) < 1e-8
    assert problems.flatten(result.implicit).norm() > 1e-3 * reference.norm()


def test_equals_finite_differences_of_the_solution_map(solved):
    problem, theta, phi = solved
    result = problems.flatten(compute(problem, theta, phi, solver=ispen_dist.CG(500, 1e-13)).value)
    draw = torch.Generator().manual_seed(0)
    direction = (
        result / result.norm() + 0.5 * torch.randn(phi.shape, generator=draw) / phi.numel() ** 0.5
    )

    def outer_at(step):
        moved = phi + step * direction
        return problem.flat_outer(problems.solve_inner(problem, theta, moved), moved).item()

    h = 2e-3
    fourth_order = (8 * (outer_at(h) - outer_at(-h)) - outer_at(2 * h) + outer_at(-2 * h)) / (
        12 * h
    )
    assert abs((result @ direction).item() / fourth_order - 1.0) < 1e-8


def test_unrolled_differentiation_approaches_the_implicit_gradient():
    batch = problems.random_batch("multilabel", 6, 0)
    problem = problems.build_problem("multilabel", batch, batch)
    problem = dataclasses.replace(problem, inner=problems.with_ridge(problem.inner, 1.0))
    phi = problems.flatten(problem.phi)
    theta = problems.solve_inner(problem, problems.flatten(problem.theta), phi)
    eigenvalues = torch.linalg.eigvalsh(problems.dense_hessian(problem, theta, phi))
    learning_rate = 1.0 / eigenvalues[-1].item()
    rate = -math.log1p(-learning_rate * eigenvalues[0].item())
    num_steps = math.ceil(math.log(1e5) / rate)
    assert num_steps < 200
    unrolled = ispen_dist.unrolled_hypergradient(
        problem.inner,
        problem.outer,
        problems.unflatten(theta, problem.theta),
        problems.unflatten(phi, problem.phi),
        learning_rate=learning_rate,
        num_steps=num_steps,
    )
    implicit = compute(problem, theta, phi, solver=ispen_dist.CG(500, 1e-13)).value
    assert relative_error(problems.flatten(unrolled), problems.flatten(implicit)) < 1e-4


@pytest.mark.parametrize(
    "solver",
    [ispen_dist.CG(50, 1e-14), ispen_dist.Neumann(4000, 3.0, rtol=1e-13)],
    ids=["cg", "neumann"],
)
def test_ridge_regression_has_a_closed_form(solver):
    draw = torch.Generator().manual_seed(0)
    X, y = torch.randn(40, 6, generator=draw), torch.randn(40, generator=draw)
    X_outer, y_outer = torch.randn(20, 6, generator=draw), torch.randn(20, generator=draw)

    def theta_star(weight):
        return torch.linalg.solve(X.T @ X / 40 + weight * torch.eye(6), X.T @ y / 40)

    weight = torch.tensor(0.3, requires_grad=True)
    reference = torch.autograd.grad(((X_outer @ theta_star(weight) - y_outer) ** 2).mean(), weight)[
        0
    ]
    result = ispen_dist.hypergradient(
        lambda t, p: 0.5 * ((X @ t["w"] - y) ** 2).mean() + 0.5 * p["a"] * (t["w"] ** 2).sum(),
        lambda t, p: ((X_outer @ t["w"] - y_outer) ** 2).mean(),
        {"w": theta_star(weight).detach()},
        {"a": weight.detach()},
        solver=solver,
    )
    assert result.status is ispen_dist.Status.CONVERGED
    assert abs(result.value["a"] / reference - 1.0) < 1e-10


@pytest.mark.parametrize("task", problems.TASKS)
def test_gauss_newton_mixed_product_in_output_space_equals_the_hessian_one(task):
    batch = problems.random_batch(task, 5, 1)
    problem = problems.build_problem(task, batch, batch)
    operators = [
        build_operator(name, problem.inner, problem.theta, problem.phi)
        for name in ("hessian", "gauss_newton")
    ]
    q = {k: torch.randn_like(v) for k, v in problem.theta.items()}
    first, second = (problems.flatten(op.mixed(q)) for op in operators)
    assert relative_error(first, second) < 1e-12
    torch.testing.assert_close(operators[0].gradient, operators[1].gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("task", "fixed"),
    [*((task, "mle") for task in problems.TASKS), ("multilabel", "mle_task"), ("fcn", "mle_task")],
)
def test_products_equal_the_dense_hessian_and_are_symmetric(task, fixed):
    batch = problems.random_batch(task, 5, 1)
    problem = problems.build_problem(task, batch, batch, fixed)
    theta, phi = problems.flatten(problem.theta), problems.flatten(problem.phi)
    operator = HessianOperator(problem.inner, problem.theta, problem.phi)
    H = problems.dense_hessian(problem, theta, phi)
    columns = [
        problems.flatten(operator.matvec(problems.unflatten(e, problem.theta)))
        for e in torch.eye(len(theta))
    ]
    assert relative_error(torch.stack(columns), H) < 1e-12
    for name in ("hessian", "gauss_newton"):
        operator = build_operator(name, problem.inner, problem.theta, problem.phi)
        assert defect_of(operator) < 1e-14


def test_gauss_newton_of_a_convex_output_loss_is_positive_semidefinite():
    batch = problems.random_batch("bilstm", 5, 1)
    problem = problems.build_problem("bilstm", batch, batch)
    y = torch.nn.functional.one_hot(batch.target, 3) * batch.inputs["mask"].unsqueeze(-1)
    loss = ispen_dist.ComposedLoss(
        problem.inner.model, lambda z, phi: -(torch.log_softmax(z, -1) * y).sum() / 5
    )
    operator = build_operator("gauss_newton", loss, problem.theta, {})
    size = problems.flatten(problem.theta).numel()
    dense = torch.stack(
        [
            problems.flatten(operator.matvec(problems.unflatten(e, problem.theta)))
            for e in torch.eye(size)
        ]
    )
    eigenvalues = torch.linalg.eigvalsh(dense)
    assert eigenvalues[0] > -1e-14 * eigenvalues[-1]
    assert eigenvalues[-1] > 0.0


def test_each_loss_is_called_once_so_that_dropout_is_frozen():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Dropout(0.5))
    x = torch.randn(8, 4)
    calls = []

    def inner(theta, phi):
        calls.append("inner")
        out = torch.func.functional_call(layer, theta, (x,))
        return (out**2 * phi["s"]).mean()

    def outer(theta, phi):
        calls.append("outer")
        return (theta["0.weight"] ** 2).sum()

    theta = {k: v.detach() for k, v in layer.named_parameters()}
    phi = {"s": torch.ones(4)}
    result = ispen_dist.hypergradient(
        inner, outer, theta, phi, damping=4.0, solver=ispen_dist.CG(30, 1e-8)
    )
    assert sorted(calls) == ["inner", "outer"]
    assert result.status is ispen_dist.Status.CONVERGED
    operator = HessianOperator(inner, theta, phi)
    assert defect_of(operator) < 1e-14


def test_symmetry_probe_sees_fresh_randomness():
    class Redrawn:
        def __init__(self):
            self.value = torch.zeros(())
            self.gradient = {"w": torch.zeros(20)}

        def matvec(self, v):
            return {"w": torch.randn(20, 20) @ v["w"]}

    assert defect_of(Redrawn()) > 1e-2


def test_an_outer_loss_without_theta_is_reported_and_not_silently_zero():
    batch = problems.random_batch("multilabel", 5, 1)
    problem = problems.build_problem("multilabel", batch, batch, objective="nce")
    result = ispen_dist.hypergradient(
        problem.inner, problem.outer, problem.theta, problem.phi, damping=0.1
    )
    assert result.status is ispen_dist.Status.ZERO_RHS
    assert "task cost" in result.status.help
    assert problems.flatten(result.implicit).abs().max() == 0.0
    assert problems.flatten(result.explicit).abs().max() > 0.0


def test_warm_start_from_the_solution_takes_no_step(solved):
    problem, theta, phi = solved
    cold = compute(problem, theta, phi, solver=ispen_dist.CG(500, 1e-8))
    warm = compute(problem, theta, phi, solver=ispen_dist.CG(500, 1e-7), start=cold.solution.value)
    assert cold.num_steps > 0
    assert warm.num_steps == 0
    assert warm.status is ispen_dist.Status.CONVERGED


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": -1.0}, "damping: expected a number >= 0"),
        ({"curvature": "gauss_newton"}, "ComposedLoss"),
        ({"curvature": "fisher"}, "curvature: expected one of hessian, gauss_newton"),
    ],
)
def test_wrong_arguments_say_what_to_do(settings, message):
    theta = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        ispen_dist.hypergradient(
            lambda t, p: (t["w"] ** 2).sum(), lambda t, p: t["w"].sum(), theta, {}, **settings
        )


def test_a_loss_that_is_no_scalar_is_refused():
    theta = {"w": torch.ones(2)}
    with pytest.raises(ValueError, match=r"outer_loss: expected a scalar .* got shape \(2,\)"):
        ispen_dist.hypergradient(lambda t, p: (t["w"] ** 2).sum(), lambda t, p: t["w"], theta, {})
