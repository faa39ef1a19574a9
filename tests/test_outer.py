"""What an outer step does with the solve: update, skip, raise the damping, or stop."""

import math
from dataclasses import replace

import problems
import pytest
import torch

from ispen_dist.config import OptimizerConfig
from ispen_dist.graphs.compiler import Compiler
from ispen_dist.inner import inner_step
from ispen_dist.linalg.operators import HessianOperator
from ispen_dist.linalg.solvers import SOLVERS
from ispen_dist.optim import Phase, clip_factor
from ispen_dist.outer import MOST_DAMPING, OuterStep, SolveFailed, SolverRecord
from ispen_dist.players import build_players, replicated

pytestmark = pytest.mark.usefixtures("float64")

TRACED = Compiler("trace")


def outer_step(method="implicit", **solver):
    config = problems.multilabel_config(objective="ssvm", task_weight=1.0)
    config = replace(
        config,
        train=replace(config.train, method=method),
        solver=replace(config.solver, **{"max_steps": 30, "damping": 1e-6, **solver}),
    )
    players = build_players(config, problems.multilabel_codec(), problems.CPU)
    with torch.no_grad():
        for name, value in problems.random_phi(players).items():
            players.phi[name].copy_(value)
    engines = replicated(players)
    engines.energy.begin(phase(learning_rate=0.1))
    return OuterStep(players, engines, 0, SolverRecord(damping=config.solver.damping))


def phase(*groups, **settings):
    groups = frozenset(groups or ("local", "head"))
    return Phase("test", OptimizerConfig(**settings), 10, groups)


def step(outer):
    batch = problems.random_batch("multilabel", 6, 0)
    before = {k: v.detach().clone() for k, v in outer.players.phi.items()}
    figures = outer(batch, batch, 0)
    moved = {k: (v - before[k]).norm().item() for k, v in outer.players.phi.items()}
    return figures, moved


def test_an_indefinite_hessian_skips_the_implicit_part_and_counts_it():
    outer = outer_step(on_failure="skip")
    figures, moved = step(outer)
    assert outer.record.statuses == {"negative_curvature": 1}
    assert figures["skipped"] == outer.record.num_skipped == 1
    assert outer.record.start is None
    assert max(moved.values()) > 0.0
    explicit = outer_step("explicit")
    step(explicit)
    for name, value in explicit.players.phi.items():
        assert torch.equal(value, outer.players.phi[name]), name


def test_damping_is_raised_until_the_solve_holds_and_eases_off_again():
    outer = outer_step(on_failure="damp", damping=0.01, damping_factor=9.0, max_repeats=9)
    figures, _ = step(outer)
    statuses = dict(outer.record.statuses)
    failures = statuses.pop("negative_curvature")
    assert statuses in ({"converged": 1}, {"max_steps": 1})
    assert failures > 0
    assert figures["skipped"] == 0
    assert outer.record.damping == pytest.approx(0.01 * 9.0**failures / 3.0)
    raised = outer.record.damping
    for _ in range(20):
        step(outer)
    assert outer.record.damping < raised or outer.record.statuses["negative_curvature"] > failures


def test_the_repeats_are_limited():
    outer = outer_step(on_failure="damp", damping=1e-9, damping_factor=1.01, max_repeats=2)
    figures, _ = step(outer)
    assert outer.record.statuses == {"negative_curvature": 3}
    assert figures["skipped"] == 1


def test_failures_without_end_leave_a_damping_that_can_be_saved():
    outer = outer_step(on_failure="damp", damping=1.0, damping_factor=1e5, max_repeats=5)
    with torch.no_grad():
        next(iter(outer.players.theta.values())).fill_(float("nan"))
    step(outer)
    assert outer.record.damping == MOST_DAMPING


def test_a_product_that_is_zero_has_no_error_of_rounding():
    outer = outer_step()
    layout = outer.engines.inference_net.layout
    nothing = {k: torch.zeros_like(v) for k, v in outer.players.theta.items()}
    batch = problems.random_batch("multilabel", 6, 0)
    assert outer._precision_error(batch, nothing, layout) == 0.0


def test_stop_says_what_happened_and_what_to_change():
    with pytest.raises(
        SolveFailed, match=r"outer step 0: negative_curvature\. .*raise the damping"
    ):
        step(outer_step(on_failure="stop"))


def test_a_nan_reaches_no_parameter():
    outer = outer_step()
    with torch.no_grad():
        next(iter(outer.players.theta.values())).fill_(float("nan"))
    figures, moved = step(outer)
    assert outer.record.statuses == {"not_finite": 1}
    assert figures["skipped"] == 1
    assert max(moved.values()) == 0.0


def test_a_usable_solve_moves_phi_along_both_parts_and_warms_the_next():
    outer = outer_step(damping=5.0)
    figures, _ = step(outer)
    assert figures["implicit_norm"] > 0.0
    assert figures["explicit_norm"] > 0.0
    cold_steps = figures["solver_steps"]
    assert outer.record.start is not None
    outer.engines.energy.begin(phase(learning_rate=0.0))
    step(outer)
    figures, _ = step(outer)
    assert figures["solver_steps"] < cold_steps


def test_the_schedule_warms_up_and_decays():
    settings = OptimizerConfig(learning_rate=1.0, warmup_steps=4, final_fraction=0.1)
    rates = [Phase("p", settings, 20, frozenset()).learning_rate(s) for s in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[20] == pytest.approx(0.1)


def test_clipping_limits_the_norm_as_torch_does():
    for norm, limit in ((5.0, 1.0), (0.5, 1.0), (5.0, 0.0)):
        w = torch.nn.Parameter(torch.zeros(2))
        w.grad = torch.tensor([0.6, 0.8]) * norm
        torch.nn.utils.clip_grad_norm_([w], limit or math.inf)
        ours = clip_factor(torch.tensor(norm), limit) * torch.tensor([0.6, 0.8]) * norm
        torch.testing.assert_close(ours, w.grad, rtol=1e-15, atol=0.0)


def test_the_first_step_probes_the_curvature(monkeypatch):
    outer = outer_step(damping=5.0)
    batch = problems.random_batch("multilabel", 6, 0)
    figures = outer(batch, batch, 0)
    assert figures["symmetry_defect"] < 1e-14
    assert figures["precision_error"] < 1e-14
    assert "symmetry_defect" not in outer(batch, batch, 1)
    monkeypatch.setattr(
        HessianOperator, "matvec", lambda self, v: {k: torch.randn_like(x) for k, x in v.items()}
    )
    with pytest.raises(SolveFailed, match="expected a symmetric Hessian"):
        outer(batch, batch, 0)


ALL = pytest.mark.parametrize("solver_name", SOLVERS)


def with_moments(outer):
    """Take two steps of the inference network, which leave moments in its optimizer."""
    outer.engines.inference_net.begin(phase("new", learning_rate=1e-2))
    for seed in (3, 4):
        batch = problems.random_batch("multilabel", 6, seed)
        inner_step(outer.players, outer.engines, batch, 0.3)
    return outer


def solve_by(solver_name, memory="auto", compiler=None):
    batches = [problems.random_batch("multilabel", 6, seed) for seed in (0, 9)]
    settings = {"damping": 5.0, "scale": 50.0, "max_steps": 4, "warm_start": False}
    outer = with_moments(outer_step(name=solver_name, memory=memory, **settings))
    outer.compiler = compiler
    return outer.hypergradient(*batches, 0)


@ALL
def test_every_solver_gives_one_hypergradient_by_every_way_to_a_product(solver_name):
    """By the graph, by stages and compiled: where J q comes from differs among them."""
    whole = solve_by(solver_name)
    assert whole.status.usable
    for other in (solve_by(solver_name, "states"), solve_by(solver_name, "auto", TRACED)):
        torch.testing.assert_close(other.implicit, whole.implicit, rtol=1e-9, atol=1e-12)
        assert other.num_steps == whole.num_steps
    assert max(part.abs().max() for part in whole.implicit.values()) > 1e-6


def test_the_metric_is_what_adam_divides_by():
    """A parameter moves by rate * m_hat / metric, without decay and clipping."""
    outer = with_moments(outer_step())
    engine = outer.engines.inference_net
    before = {n: p.detach().clone() for n, p in outer.players.theta.items()}
    inner_step(outer.players, outer.engines, problems.random_batch("multilabel", 6, 5), 0.3)
    first, metric = engine.moments()["exp_avg"], engine.metric()
    assert list(metric) == list(before)
    for name, value in before.items():
        step = engine.learning_rates(2)["new"] * first[name] / (1.0 - 0.9**3) / metric[name]
        torch.testing.assert_close(outer.players.theta[name].detach(), value - step)


@pytest.mark.parametrize(("solver_name", "plain"), [("pcg", "cg"), ("sama", "identity")])
def test_before_the_first_inner_step_a_metric_is_missed_aloud(solver_name, plain):
    batch = problems.random_batch("multilabel", 6, 0)
    expected = outer_step(name=plain, damping=5.0).hypergradient(batch, batch, 0)
    with pytest.warns(UserWarning, match=f"solver.name={solver_name}: expected second moments"):
        found = outer_step(name=solver_name, damping=5.0).hypergradient(batch, batch, 0)
    for name, value in expected.value.items():
        assert torch.equal(found.value[name], value), name


def test_directions_are_drawn_anew_in_every_outer_step():
    batch = problems.random_batch("multilabel", 6, 0)
    outer = outer_step(name="nystrom", damping=5.0, max_steps=2)
    first, again, other = (
        problems.flatten(outer.hypergradient(batch, batch, step).solution.value)
        for step in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert (first - other).norm() > 1e-6 * first.norm()
