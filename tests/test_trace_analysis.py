"""What is read out of a trace: phases, overlap, rates and advice, by hand."""

import re
from dataclasses import replace
from pathlib import Path

import advice
import phases
import pytest
from operator_costs import input_bytes, leaves, matrix_product_flops
from phases import Breakdown, Timeline, break_down
from problems import multilabel_config
from trace_events import Event, Trace

from ispen_dist import ranges
from ispen_dist.command_line import _HINTS


def event(name, begin, end, category="user_annotation", thread=1, **args):
    return Event(name, category, float(begin), float(end), thread, args)


def test_each_moment_belongs_to_the_innermost_range():
    nested = [event("solve", 1, 9), event("product", 2, 4), event("all-reduce", 3, 4),
              event("product", 4, 6), event("data", 11, 12)]  # fmt: skip
    timeline = Timeline(nested, [event("ProfilerStep#1", 0, 10), event("ProfilerStep#2", 10.5, 13)])
    assert timeline.pieces() == [
        (0, 1, "other"), (1, 2, "solve"), (2, 3, "product"), (3, 4, "all-reduce"),
        (4, 6, "product"), (6, 9, "solve"), (9, 10, "other"), (10.5, 11, "other"),
        (11, 12, "data"), (12, 13, "other"),
    ]  # fmt: skip
    assert [timeline.at(t) for t in (0.5, 3.5, 5, 8)] == ["other", "all-reduce", "product", "solve"]


def test_kernels_count_for_the_phase_that_launched_them_and_hide_communication():
    trace = Trace(Path("x"), 0, 1, [10.0])
    for e in (
        event("ProfilerStep#0", 0, 10),
        event("product", 0, 5),
        event("cudaLaunchKernel", 1, 1, "cuda_runtime", correlation=7),
        event("cudaLaunchKernel", 6, 6, "cuda_runtime", correlation=8),
        event("gemm", 2, 6, "kernel", 9, correlation=7),
        event("ncclDevKernel_AllReduce", 5, 8, "kernel", 10, correlation=8),
    ):
        trace.add(e)
    b = break_down(trace)
    assert b.phases == {"product": 5.0, "other": 5.0}
    assert b.device == {"product": 4.0, "other": 3.0}
    assert (b.communication, b.exposed, b.idle) == (3.0, 2.0, 4.0)


def test_a_gather_behind_operators_is_hidden_and_a_wait_is_not():
    trace = Trace(Path("x"), 0, 1, [10.0])
    for e in (
        event("ProfilerStep#0", 0, 10),
        event("gloo:all_gather", 1, 6, thread=2),
        event("aten::mm", 1, 4, "cpu_op"),
        event("all-gather", 4, 6),
        event("c10d::allgather_", 4, 6, "cpu_op"),
    ):
        trace.add(e)
    b = break_down(trace)
    assert (b.communication, b.exposed, b.idle) == (5.0, 2.0, 5.0)


def test_intervals():
    assert phases.union([(3, 4), (0, 1), (0.5, 2), (4, 5)]) == [(0, 2), (3, 5)]
    assert phases.without([(0, 10)], [(1, 2), (3, 4), (9, 12)]) == [(0, 1), (2, 3), (4, 9)]
    assert phases.without([(0, 1), (2, 3)], [(0, 5)]) == []


def operator(name, *shapes, begin=0.0, end=1.0, kind="float"):
    inputs = {"Input Dims": list(map(list, shapes)), "Input type": [kind] * len(shapes)}
    return event(name, begin, end, "cpu_op", **inputs)


def test_matrix_products_are_counted_by_their_shapes():
    assert matrix_product_flops(operator("aten::mm", (2, 3), (3, 5))) == 60
    assert matrix_product_flops(operator("aten::addmm", (5,), (2, 3), (3, 5))) == 60
    assert matrix_product_flops(operator("aten::bmm", (7, 2, 3), (7, 3, 5))) == 420
    assert matrix_product_flops(operator("aten::mv", (2, 3), (3,))) == 12
    assert matrix_product_flops(operator("aten::add", (2, 3), (2, 3))) == 0
    assert matrix_product_flops(event("aten::mm", 0, 1)) == 0


def test_bytes_are_those_of_operators_that_call_no_other():
    outer = operator("aten::linear", (2, 3), (5, 3), begin=0, end=10)
    inner = operator("aten::mm", (2, 3), (3, 5), begin=1, end=9)
    assert leaves([outer, inner]) == [inner]
    assert input_bytes(inner) == 4 * (6 + 15)
    assert input_bytes(operator("aten::view", (2, 3))) == 0
    assert input_bytes(operator("aten::add", (2, 3), (), kind="double")) == 48


def costs(phase, **changed):
    """The advice for a phase; `changed` are fields by section."""
    config = multilabel_config()
    for section, fields in changed.items():
        config = replace(config, **{section: replace(getattr(config, section), **fields)})
    return advice.largest_costs([Breakdown(0, 1, 1.0, {phase: 1.0})], config)[0].advice


@pytest.mark.parametrize("phase", [*ranges.NAMES, phases.OTHER])
def test_every_phase_has_advice(phase):
    assert len(costs(phase)) > 20


def test_advice_follows_the_settings():
    assert "compile.curvature=true" in costs("product")
    assert "compile.curvature" not in costs("product", compile={"curvature": True})
    assert "solver.max_steps=7" in costs("product", solver={"max_steps": 7})
    assert "cg_single_reduction" in costs("all-reduce")
    assert "cg_single" not in costs("all-reduce", solver={"name": "cg_single_reduction"})
    assert "solver.prefetch=true" in costs("all-gather", solver={"prefetch": False})
    assert "compile.whole_round=true" in costs("inner step", compile={"inner": True})
    assert "train.eval_every=4" in costs("evaluation", train={"eval_every": 4})


def test_settings_in_advice_exist():
    """A setting that is renamed must be renamed here too."""
    text = Path(advice.__file__).read_text("utf-8")
    sections = "|".join(sorted({name.partition(".")[0] for name in _HINTS}))
    named = set(re.findall(rf"\b((?:{sections})\.[a-z_]+)", text))
    assert len(named) > 15
    assert {n for n in named if not n.startswith("profile.first")} <= set(_HINTS)
