"""The moving average of the networks: its formula, where it goes, and what it leaves alone."""

import pytest
import torch
from labels import labels  # noqa: F401
from programs import train
from safetensors.torch import load_file

ROUNDS = range(1, 7)
NETWORKS = ("inference_net", "energy")


@pytest.fixture(scope="module")
def runs(labels, tmp_path_factory):  # noqa: F811
    """The same run without and with an average, evaluated at its end alone."""
    folder = tmp_path_factory.mktemp("runs")
    for decay in (0.0, 0.7):
        settings = {"average_decay": decay, "checkpoint_every": 1, "eval_every": 100}
        flags = [f"--train.{name}={value}" for name, value in settings.items()]
        train(labels, folder / str(decay), *flags)
    return folder / "0.0", folder / "0.7"


def after(folder, number, name):
    return load_file(folder / "checkpoints" / f"step_{number:08d}" / f"{name}.safetensors")


@pytest.mark.parametrize("name", NETWORKS)
def test_the_average_is_that_of_the_formula_and_is_what_a_run_leaves(runs, name):
    _, averaged = runs
    expected = after(averaged, 1, name)
    for number in ROUNDS[1:]:
        last = after(averaged, number, name)
        expected = {k: 0.7 * v + 0.3 * last[k] for k, v in expected.items()}
        found = after(averaged, number, f"average_{name}")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    model = load_file(averaged / "model" / f"{name}.safetensors")
    assert all(torch.equal(v, found[k]) for k, v in model.items())
    assert not all(torch.equal(v, last[k]) for k, v in model.items())


@pytest.mark.parametrize("name", NETWORKS)
def test_training_does_not_see_the_average(runs, name):
    plain, averaged = runs
    for number in ROUNDS:
        first, second = after(plain, number, name), after(averaged, number, name)
        assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert not list(plain.glob(f"checkpoints/*/average_{name}.safetensors"))
