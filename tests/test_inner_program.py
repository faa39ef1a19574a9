"""Compiled inner steps are the plain ones: figures, parameters and moments."""

import dataclasses
import math

import problems
import pytest
import torch

from ispen_dist.config import OptimizerConfig
from ispen_dist.graphs.compiler import Compiler
from ispen_dist.inner import inner_step
from ispen_dist.inner_program import InnerProgram
from ispen_dist.ops import using_kernels
from ispen_dist.optim import PRETRAINED, Phase
from ispen_dist.players import build_players, replicated
from ispen_dist.seeding import seed_step

pytestmark = pytest.mark.usefixtures("float64")

TASKS = ["multilabel", "transformer"]
NUM_ROUNDS, NUM_STEPS = 3, 4
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5)
PHASE = Phase("inner", OPTIMIZER, 100, frozenset({"new"}))


class Run:
    """Players with their engines, and inner steps plain or by a program.

    Args:
        task: one of `TASKS`.
        backend: of the compiler; None takes plain steps.
        weight: of the energy.
        phase: of the optimizer.
        frozen: names of parameters that stand still.
        net: settings of the inference network, and `fixed` of the inner loss.
    """

    def __init__(self, task, backend=None, weight=0.5, phase=PHASE, frozen=(), **net):
        self.weight, self.num_taken = weight, 0
        whole_round = net.pop("whole_round", True)
        self.players = players_of(task, **net)
        for name in frozen:
            self.players.theta[name].requires_grad_(False)
        self.engines = replicated(self.players)
        self.engine = self.engines.inference_net
        self.engine.begin(phase)
        self.compiler = Compiler(backend or "trace")
        program = InnerProgram(self.players, self.engines, self.compiler, whole_round=whole_round)
        self.program = program if backend else None

    def steps(self, batches):
        """Take one step per batch and return their figures."""
        first = self.num_taken

        def seed(i):
            seed_step(0, "inner", first + i, 0)

        self.num_taken += len(batches)
        if self.program is not None:
            return self.program(batches, self.weight, seed)
        rows = []
        for i, batch in enumerate(batches):
            seed(i)
            rows.append(inner_step(self.players, self.engines, batch, self.weight))
        return rows

    @property
    def moments(self):
        return self.engine.moments()


def players_of(task, fixed="mle", **net):
    multilabel = task == "multilabel"
    config = problems.multilabel_config() if multilabel else problems.tagging_config(task)
    settings = {"dropout": 0.3, "num_layers": 2, "feature_dropout": 0.2} | net
    if not multilabel:  # a layer norm of width 2 has gradients that are all cancellation
        settings = {"hidden_size": 6, "num_heads": 2} | settings
    config = dataclasses.replace(
        config,
        inference_net=dataclasses.replace(config.inference_net, **settings),
        inner=dataclasses.replace(config.inner, fixed=fixed),
    )
    players = build_players(config, problems.codec_of(task), problems.CPU)
    with torch.no_grad():
        for name, value in problems.random_phi(players).items():
            players.phi[name].copy_(value)
    return players


def batches_of(task, first=0, sizes=(5,) * NUM_STEPS):
    return [problems.random_batch(task, size, first + i) for i, size in enumerate(sizes)]


def assert_equal_figures(found, expected):
    """Sums of some dozen terms in another order, after at most 12 steps of which AdamW divides."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert ours[key].item() == pytest.approx(theirs[key].item(), rel=1e-10, abs=1e-15), key


def assert_equal_state(run, plain):
    """Norms, not entries: AdamW blows up the roundings of small gradients."""
    assert run.engine.num_taken == plain.engine.num_taken == plain.num_taken
    trees = [(run.players.theta, plain.players.theta)]
    trees += [(run.moments[slot], plain.moments[slot]) for slot in plain.moments]
    assert len(trees) == 3
    for ours, theirs in trees:
        assert ours.keys() == theirs.keys()
        for name in theirs:
            distance = (ours[name] - theirs[name]).norm()
            assert distance <= 1e-9 * theirs[name].norm(), name


def compare(task, backend, weight, num_rounds=NUM_ROUNDS, **settings):
    """Take rounds of steps both ways; returns the program's run and all plain figures."""
    run = Run(task, backend, weight, **settings)
    plain = Run(task, None, weight, **settings)
    rows = []
    for r in range(num_rounds):
        batches = batches_of(task, r * NUM_STEPS)
        expected = plain.steps(batches)
        assert_equal_figures(run.steps(batches), expected)
        rows += expected
    assert_equal_state(run, plain)
    return run, rows


@pytest.mark.parametrize("whole_round", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("task", TASKS)
def test_compiled_steps_are_the_plain_ones(task, weight, whole_round):
    run, rows = compare(task, "trace", weight, whole_round=whole_round)
    norms = [row["gradient_norm"].item() for row in rows]
    assert max(norms) > OPTIMIZER.clip_norm  # clipping is seen
    assert all((row["energy"].item() != 0.0) == (weight > 0.0) for row in rows)
    if whole_round:
        assert run.compiler.names == ["4 inner steps"]
    else:  # every part once, both blocks of the transformer in one
        assert len(set(run.compiler.names)) == len(run.compiler.names)
        assert "update" not in run.compiler.names
        assert not any("blocks.1" in name for name in run.compiler.names)


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("task", TASKS)
def test_compiled_steps_see_the_fixed_cost_of_the_task(task, weight):
    _, rows = compare(task, "trace", weight, fixed="mle_task")
    without = Run(task, None, weight).steps(batches_of(task))
    # The same networks and masks: the cost is all the difference, at most 30 per example.
    cost = rows[0]["fixed_loss"].item() - without[0]["fixed_loss"].item()
    assert 1.0 < cost < 30.0


@pytest.mark.parametrize("whole_round", [True, False])
def test_generated_code_takes_the_plain_steps(whole_round):
    settings = {"num_rounds": 2, "num_layers": 1, "whole_round": whole_round}
    run, _ = compare("multilabel", "inductor", 0.5, **settings)
    assert ("4 inner steps" in run.compiler.names) == whole_round


@pytest.mark.parametrize("task", TASKS)
def test_batches_of_unequal_shapes_are_steps_of_their_own(task):
    run, plain = Run(task, "trace"), Run(task)
    for first in (0, 4):
        batches = batches_of(task, first, (5, 4, 5, 4))
        assert_equal_figures(run.steps(batches), plain.steps(batches))
    assert_equal_state(run, plain)
    assert run.compiler.names == ["1 inner steps"] * 2


def test_one_function_is_compiled_per_number_of_steps_and_shape():
    run = Run("multilabel", "trace")
    names = []
    for sizes in ((5, 5), (5, 5), (5, 5, 5), (4, 4), (5, 5), (4, 4)):
        run.steps(batches_of("multilabel", 0, sizes))
        names.append(len(run.compiler.names))
    assert names == [1, 1, 2, 3, 3, 3]


def test_filler_rows_change_nothing():
    whole = Run("transformer", "trace", dropout=0.0, feature_dropout=0.0)
    padded = Run("transformer", "trace", dropout=0.0, feature_dropout=0.0)
    batches = batches_of("transformer")
    rows = whole.steps(batches)
    assert_equal_figures(padded.steps([batch.padded(7, 6) for batch in batches]), rows)
    assert_equal_state(padded, whole)


@pytest.mark.parametrize("whole_round", [True, False])
def test_a_step_that_is_not_finite_is_left_out_and_counts(whole_round):
    run, plain = Run("multilabel", "trace", whole_round=whole_round), Run("multilabel")
    batches = batches_of("multilabel")
    bad = [spoiled(batch) for batch in batches]
    mixed = [spoiled(batch) if i == 1 else batch for i, batch in enumerate(batches)]
    norms = [[row["gradient_norm"] for row in one.steps(mixed)] for one in (run, plain)]
    assert [math.isfinite(norm) for norm in norms[0]] == [True, False, True, True]
    assert [math.isfinite(norm) for norm in norms[1]] == [True, False, True, True]
    assert_equal_state(run, plain)
    before = [x.clone() for x in run.engine.state()]
    assert not any(math.isfinite(row["gradient_norm"]) for row in run.steps(bad))
    assert run.engine.num_taken == 2 * NUM_STEPS
    after = run.engine.state()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    plain.steps(bad)
    run.steps(batches)  # As far in the schedule as if all steps had been taken.
    plain.steps(batches)
    assert not any(torch.equal(a, b) for a, b in zip(before, run.engine.state(), strict=True))
    assert_equal_state(run, plain)


def spoiled(batch):
    inputs = {name: x * torch.nan for name, x in batch.inputs.items()}
    return dataclasses.replace(batch, inputs=inputs)


def test_the_schedule_enters():
    optimizer = dataclasses.replace(OPTIMIZER, warmup_steps=3)
    phase = Phase("inner", optimizer, 12, frozenset({"new"}))
    run, _ = compare("multilabel", "trace", 0.5, phase=phase)
    constant = Run("multilabel", "trace", 0.5)
    for r in range(NUM_ROUNDS):
        constant.steps(batches_of("multilabel", r * NUM_STEPS))
    distance = [
        (a - b).norm() / b.norm()
        for a, b in zip(run.players.theta.values(), constant.players.theta.values(), strict=True)
    ]
    assert max(distance) > 1e-3


@pytest.mark.parametrize("whole_round", [True, False])
def test_layers_of_a_pretrained_encoder_have_a_rate_of_their_own(whole_round):
    optimizer = dataclasses.replace(OPTIMIZER, pretrained_factor=0.01)
    phase = Phase("inner", optimizer, 12, frozenset({"new", PRETRAINED}))
    # Its gradient is rounding alone, which Adam makes full-size.
    settings = {"frozen": ["blocks.0.attention.self.key.bias"], "whole_round": whole_round}
    run, _ = compare("pretrained", "trace", 0.5, phase=phase, **settings)
    start = Run("pretrained", "trace").players.theta
    moved = {name: (p - start[name]).abs().max() for name, p in run.players.theta.items()}
    groups = run.engine.groups
    largest = max(moved[name] for name in groups[PRETRAINED])
    assert 0.0 < largest < 0.2 * min(moved[name] for name in groups["new"])


def test_steps_continue_from_a_checkpoint():
    batches = batches_of("transformer")
    whole, first = Run("transformer", "trace"), Run("transformer", "trace")
    expected = whole.steps(batches) + whole.steps(batches)
    first.steps(batches)
    second = Run("transformer", "trace")
    second.engine.load({n: p.detach().clone() for n, p in first.engine.parameters().items()})
    second.engine.load_moments(first.moments, first.engine.num_taken)
    second.num_taken = first.num_taken
    rows = second.steps(batches)
    for ours, theirs in zip(rows, expected[NUM_STEPS:], strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    for name, p in whole.players.theta.items():
        assert torch.equal(second.players.theta[name], p)
        if name in whole.moments["exp_avg"]:
            for slot, tree in whole.moments.items():
                assert torch.equal(second.moments[slot][name], tree[name])


def test_plain_steps_continue_from_compiled_ones():
    batches = batches_of("multilabel")
    run, plain = Run("multilabel", "trace"), Run("multilabel")
    run.steps(batches)
    run.program = None
    plain.steps(batches)
    assert_equal_figures(run.steps(batches), plain.steps(batches))
    assert_equal_state(run, plain)


def test_frozen_parameters_stay():
    frozen = ("encoder.blocks.0.attention.out.weight", "output.bias")
    before = {name: p.detach().clone() for name, p in players_of("transformer").theta.items()}
    run, _ = compare("transformer", "trace", 0.5, frozen=frozen)
    for name, p in run.players.theta.items():
        assert torch.equal(p, before[name]) == (name in frozen), name
    assert not set(frozen) & run.moments["exp_avg"].keys()


def test_what_draws_after_the_masks_of_a_step_draws_the_same():
    """The trainer pre-trains the local energy there."""
    run, seen = Run("multilabel", "trace"), []
    batches = batches_of("multilabel", sizes=(5, 5))
    run.program(
        batches, 0.5, lambda i: seed_step(0, "inner", i, 0), lambda i: seen.append(torch.rand(2))
    )
    plain = Run("multilabel")
    for i, batch in enumerate(batches):
        seed_step(0, "inner", i, 0)
        inner_step(plain.players, plain.engines, batch, 0.5)
        assert torch.equal(torch.rand(2), seen[i])


@pytest.mark.parametrize("backend", [None, "trace"])
def test_steps_are_those_of_the_plain_operations(backend):
    """Also where an operation leaves its gradient in another layout than the parameter has."""
    run, plain, batches = Run("multilabel", backend), Run("multilabel"), batches_of("multilabel")
    found = run.steps(batches)
    with using_kernels("reference"):
        assert_equal_figures(found, plain.steps(batches))
    assert_equal_state(run, plain)
