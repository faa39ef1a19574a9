"""Every runtime, on one, two and four ranks with uneven shares, gives what one process gives."""

from pathlib import Path

import pytest
import torch
import worker_ranks
from ranks import RUNTIMES, start_ranks
from safetensors.torch import load_file

HERE = Path(__file__).parent
BOUND = {"float64": 1e-10, "float32": 1e-5}


@pytest.fixture(scope="module")
def references():
    hypergradients = {dtype: worker_ranks.reference_hypergradients(dtype) for dtype in BOUND}
    tasks = worker_ranks.TRAJECTORIES
    trajectories = {task: worker_ranks.reference_trajectory(task) for task in tasks}
    return hypergradients, trajectories


def results(tmp_path, runtime, num_ranks, wanted="float64,float32,trajectory"):
    start_ranks(HERE / "worker_ranks.py", num_ranks, str(tmp_path), wanted, runtime=runtime)
    return [load_file(tmp_path / f"rank{r}.safetensors") for r in range(num_ranks)]


def relative_error(found, expected, prefix):
    keys = [key for key in expected if key.startswith(prefix)]
    assert keys, prefix
    pairs = [
        (without_key_bias(key, found[key]), without_key_bias(key, expected[key])) for key in keys
    ]
    square = sum((a - b).double().square().sum() for a, b in pairs)
    return (square / sum(b.double().square().sum() for _, b in pairs)).sqrt().item()


def without_key_bias(name, value):
    """Leave out the bias of attention keys, in one with queries and values the middle third.

    It has no influence on anything, so its gradient is rounding noise, which Adam makes full-size:
    it differs between any two orders of summation.
    """
    if name.endswith("attention.self.key.bias"):
        return value[:0]
    if not name.endswith("attention.qkv.bias"):
        return value
    query, _, values = value.chunk(3)
    return torch.cat([query, values])


ALWAYS = {*((name, 2) for name in RUNTIMES if name != "zero2"), ("replicas", 1)}


@pytest.mark.parametrize(
    ("runtime", "num_ranks"),
    [
        pytest.param(name, n, marks=[] if (name, n) in ALWAYS else pytest.mark.thorough)
        for name in RUNTIMES
        for n in (1, 2, 4)
    ],
)
def test_hypergradient_and_trajectory_are_those_of_one_process(
    runtime, num_ranks, references, tmp_path
):
    hypergradients, trajectories = references
    ranks = results(tmp_path, runtime, num_ranks)
    for rank in ranks[1:]:
        for key, value in rank.items():
            assert (value == ranks[0][key]).all(), f"{key}: ranks disagree"
    for dtype, expected in hypergradients.items():
        for memory in ("auto", "recompute"):
            found = {
                key.replace(f"/{memory}/", "/"): value
                for key, value in ranks[0].items()
                if f"/{memory}/" in key
            }
            for name in {key.rsplit("/", 1)[0] for key in expected}:
                error = relative_error(found, expected, f"{name}/")
                assert error < BOUND[dtype], f"{name}, {memory}: {error}"
    for task, expected in trajectories.items():
        found = {k.removeprefix(f"{task}/"): v for k, v in ranks[0].items() if k.startswith(task)}
        for player in ("theta/", "phi/"):
            error = relative_error(found, expected, player)
            assert error < 1e-6, f"{task} {player}: {error}"


@pytest.mark.thorough
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_metric_of_a_solver_lies_as_the_parameters_lie(runtime, tmp_path):
    """By the solver that consists of nothing else, so that a wrong entry shows."""
    expected = worker_ranks.reference_trajectory("pretrained", "sama")
    for rank in results(tmp_path, runtime, 2, "sama"):
        found = {k.removeprefix("sama/"): v for k, v in rank.items()}
        for player in ("theta/", "phi/"):
            error = relative_error(found, expected, player)
            assert error < 1e-6, f"{player}: {error}"


@pytest.mark.parametrize(
    "runtime",
    [pytest.param("zero1_bf16", marks=pytest.mark.thorough), "zero3_bf16", "fsdp2_bf16"],
)
def test_bf16_engines_keep_float32_curvature(runtime, references, tmp_path):
    """Only first-order steps are rounded: their trajectory is near, the hypergradient exact."""
    hypergradients, trajectories = references
    found = results(tmp_path, runtime, 2, "float32,trajectory")[0]
    expected = hypergradients["float32"]
    at_start = {key.replace("/auto/", "/"): value for key, value in found.items()}
    for name in {key.rsplit("/", 1)[0] for key in expected}:
        assert relative_error(at_start, expected, f"{name}/") < BOUND["float32"], name
    for task, trajectory in trajectories.items():
        steps = {k.removeprefix(f"{task}/"): v for k, v in found.items() if k.startswith(task)}
        assert 1e-6 < relative_error(steps, trajectory, "theta/") < 1e-2
