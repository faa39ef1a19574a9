"""NaN on one rank: all ranks leave the step out together, count it, name it, and go on or stop."""

import json
import math
from collections import Counter
from dataclasses import replace

import problems
import pytest
import torch
from forks import Job
from labels import labels  # noqa: F401
from safetensors.torch import load_file

from ispen_dist.config import OptimizerConfig, TrainConfig
from ispen_dist.inner import inner_step
from ispen_dist.not_finite import (
    LEAST_FACTOR,
    RECOVERY_ROUNDS,
    NotFinite,
    NotFiniteRecord,
    mean_of_finite,
)
from ispen_dist.optim import Phase
from ispen_dist.players import build_players, replicated

RUNTIMES = ["replicas", pytest.param("zero1", marks=pytest.mark.thorough), "zero3", "fsdp2"]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def state_after(folder, step):
    files = (folder / "checkpoints" / f"step_{step:08d}").glob("*.safetensors")
    return {f"{f.stem}/{k}": v for f in files for k, v in load_file(f).items()}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_all_ranks_leave_the_same_steps_out_and_go_on(runtime, labels, tmp_path):  # noqa: F811
    """In turn: data (both steps), inner loss, outer loss, products of the solver."""
    output = tmp_path / "run"
    job = Job(
        tmp_path, "--config", labels, "--output", output, "--train.max_outer_steps=6",
        "--train.checkpoint_every=1", runtime=runtime, plant="nan_everywhere",
    )  # fmt: skip
    assert job.codes() == [0, 0], job.text()
    summary = json.loads((output / "summary.json").read_text())
    assert summary["not_finite"]["skipped"] == {"inner": 6, "outer": 2}
    assert summary["hypergradient"]["statuses"]["not_finite"] == 4
    counted = [row["not_finite"] for row in rows(output) if row["phase"] == "train"]
    assert counted == [0, 0, 0, 4, 7, 8, 8, 8]
    for words in (
        "round 4: left out inner step 1 and 3 others, not finite: rank 1: "
        "data (inputs.features) of examples",
        "round 5: left out inner step 1 and 2 others, not finite: rank 1: fixed loss of examples",
        "round 6: left out outer step 1, not finite: rank 1: outer loss of examples",
        "steps left out, not finite: inner 6, outer 2",
    ):
        assert job.text().count(words) == 1, job.text()
    before, after, later = (state_after(output, step) for step in (3, 4, 7))
    assert any(name.startswith("inference_net_exp_avg_sq/") for name in before)
    for name, value in before.items():
        assert name.startswith("best_") or torch.equal(value, after[name]), name
        assert later[name].isfinite().all(), name
    moved = [name for name in before if not torch.equal(before[name], later[name])]
    assert {name.split("/")[0] for name in moved} >= {"inference_net", "energy"}


def test_a_loss_that_samples_leaves_the_same_step_out(labels, tmp_path):  # noqa: F811
    """Nothing can be drawn from NaN; the rank that has it goes on to where all ranks decide."""
    job = Job(
        tmp_path, "--config", labels, "--output", tmp_path / "run", "--train.max_outer_steps=6",
        "--outer.objective=nce", plant="nan_everywhere",
    )  # fmt: skip
    assert job.codes() == [0, 0], job.text()
    assert "round 4: left out" in job.text()


@pytest.mark.parametrize(
    ("plant", "flag", "words"),
    [
        (
            "always_nan", "--train.on_not_finite=stop",
            "round 1: left out inner step 1 and 5 others",
        ),
        ("always_nan", "--train.max_not_finite=5", "6 in a row (train.max_not_finite=5)"),
        ("nan_products", "--solver.on_failure=stop", "outer step 0: not_finite."),
    ],
)  # fmt: skip
def test_a_run_that_shall_stop_ends_with_code_3_on_all_ranks(plant, flag, words, labels, tmp_path):  # noqa: F811
    arguments = ["--config", labels, "--output", tmp_path / "run", flag]
    job = Job(tmp_path, *arguments, plant=plant)
    assert job.codes() == [3, 3], job.text()
    assert job.text().count(words) == 1, job.text()
    assert ("rank 1: fixed loss of examples" in job.text()) == (plant == "always_nan")


def test_a_skipped_step_leaves_parameters_and_moments_and_counts_as_taken():
    players = build_players(problems.multilabel_config(), problems.multilabel_codec(), problems.CPU)
    engines = replicated(players)
    engines.inference_net.begin(Phase("inner", OptimizerConfig(), 10, frozenset({"new"})))
    batch = problems.random_batch("multilabel", 6, 0).to(problems.CPU, torch.float64)
    spoiled = replace(batch, inputs={k: x * torch.nan for k, x in batch.inputs.items()})
    states = []
    for now in (batch, spoiled, batch):
        norm = inner_step(players, engines, now, 0.3)["gradient_norm"].item()
        assert math.isfinite(norm) == (now is batch)
        states.append([x.clone() for x in engines.inference_net.state()])
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(states[1], states[2], strict=True))
    steps = {float(s["step"]) for s in engines.inference_net._adamw.state.values()}
    assert steps == {3.0} == {float(engines.inference_net.num_taken)}


def test_back_off_halves_the_rates_and_recovers():
    config, record = TrainConfig(on_not_finite="back_off", max_not_finite=99), NotFiniteRecord()
    for expected in (0.5, 0.25):
        record.enter("inner", [math.nan])
        record.follow(config, "planted")
        assert record.rate_factor == expected
    for _ in range(RECOVERY_ROUNDS):
        assert record.rate_factor == 0.25
        record.follow(config, "")
    assert record.rate_factor == 0.5
    again = NotFiniteRecord.from_state(json.loads(json.dumps(record.state())))
    assert again == record
    for _ in range(30):
        record.enter("outer", [math.inf])
        record.follow(config, "planted")
    assert record.rate_factor == LEAST_FACTOR


def test_only_steps_in_a_row_stop_a_run():
    config, record = TrainConfig(max_not_finite=3), NotFiniteRecord()
    for norms in ([math.nan, math.inf, 1.0], [math.nan, math.nan]):
        record.enter("inner", norms)
        record.follow(config, "planted")
    assert record.skipped == Counter(inner=4)
    record.enter("inner", [-math.inf])
    with pytest.raises(NotFinite, match="3 in a row"):
        record.follow(config, "planted")


def test_means_are_those_of_the_steps_that_were_taken():
    assert mean_of_finite([1.0, math.nan, 3.0]) == 2.0
    assert math.isnan(mean_of_finite([math.nan]))
