"""The counted cost of a runtime: what is cut among ranks, and what a product sends."""

from dataclasses import replace

import problems
import pytest

from ispen_dist.distributed.runtime import Runtime
from ispen_dist.linalg.solvers import SOLVERS
from ispen_dist.plan import Sizes, cost_of

SIZES = Sizes(theta=1000, energy=400, phi=40, stage=300)


def cost(runtime="fsdp2", num_ranks=4, average_decay=0.0, **solver):
    config = problems.tagging_config("transformer", objective="ssvm")
    config = replace(
        config,
        solver=replace(config.solver, **solver),
        train=replace(
            config.train, dtype="float32", method="implicit", average_decay=average_decay
        ),
    )
    return cost_of(config, SIZES, num_ranks, Runtime(runtime))


@pytest.mark.parametrize(
    ("solver", "trees"),
    [
        ({}, 5),  # gathers of p, v and p again; two reduce-scatters
        ({"memory": "recompute"}, 5),  # gathers of p and v twice; one reduce-scatter
        ({"curvature": "gauss_newton"}, 4),
    ],
)
def test_a_sharded_product_sends_what_simulate_scale_counts(solver, trees):
    assert cost(**solver).product == pytest.approx(4 * trees * 1000 * 3 / 4)


def test_only_what_a_runtime_cuts_falls_with_the_number_of_ranks():
    per_rank = {name: cost(name).resting / (4 * 1400) for name in ("replicas", "zero1", "zero2")}
    assert per_rank == pytest.approx({"replicas": 4.0, "zero1": 2.5, "zero2": 1.75})
    assert cost("zero3").resting == cost("fsdp2").resting == 4 * 1400
    assert cost("zero3").vectors == cost("replicas").vectors / 4


def test_an_average_is_one_more_copy_of_the_parameters():
    assert cost(average_decay=0.9).resting == cost().resting + 1400
    assert cost("zero2", average_decay=0.9).resting == cost("zero2").resting + 4 * 1400


def test_a_prefetched_stage_is_held_beside_the_present_one():
    assert cost(prefetch=True).gathered == 2 * cost(prefetch=False).gathered > 0
    assert cost("zero2").gathered == 0


def test_every_solver_is_counted_with_its_products_and_vectors():
    trees = {name: cost("replicas", name=name, max_steps=6).vectors / 4000 for name in SOLVERS}
    assert trees["cg"] == 5
    assert trees["nystrom"] == 3 + 2 * 6
    sent = {name: cost(name=name, max_steps=6).outer_step for name in SOLVERS}
    product = cost().product
    assert sent["cg"] - sent["sama"] == pytest.approx(7 * product)
    assert sent["pcg"] == sent["nystrom"] == sent["cg"]
