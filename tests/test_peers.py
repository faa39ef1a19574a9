"""Every adapter of another system solves the same problem as `ispen_dist.hypergradient`."""

import bench_problems
import pytest
import torch
from peers import PEERS

from ispen_dist.linalg import trees
from ispen_dist.linalg.operators import HessianOperator

CPU = torch.device("cpu")
NAMES = ("torchopt", "betty", "curvlinops", "hypertorch", "jax")
# Where the system itself is wrong, seen with the versions named; a later one may be right.
WRONG = {
    ("betty", "bibtex"): "betty-ml 0.1.1: search directions are not conjugate",
    ("betty", "transformer"): "betty-ml 0.1.1: search directions are not conjugate",
    ("curvlinops", "transformer"): "torch 2.13: jvp of jacrev is wrong through layer norm",
}
NUM_STEPS = 6
# Float32 against float64: rounding of 1e-7, times a condition number below 100 over a few steps.
TOLERANCE = 1e-5


def tiny(name, dtype):
    sizes = {
        "bibtex": bench_problems.BibtexSizes(
            batch_size=8,
            num_features=20,
            num_labels=6,
            hidden_size=5,
            mean_active=8.0,
            mean_gold=2.0,
        ),
        "transformer": bench_problems.TransformerSizes(
            batch_size=5,
            num_tokens=6,
            num_blocks=2,
            width=8,
            num_heads=2,
            embedding_size=4,
            num_buckets=32,
            num_tags=5,
            energy_width=4,
            damping=60.0,
        ),
    }
    return bench_problems.build_problem(name, CPU, dtype, sizes[name])


def relative_error(value, reference):
    wide = {key: part.double() for key, part in value.items()}
    assert wide.keys() == reference.keys()
    difference = trees.add_scaled(wide, -1.0, reference)
    return (trees.norm(difference) / trees.norm(reference)).item()


@pytest.fixture(params=NAMES)
def peer(request):
    peer = PEERS[request.param]
    reason = peer.available()
    if reason is not None:
        pytest.skip(reason)
    return peer


def judge(error, peer, name):
    if not error < TOLERANCE and (peer.name, name) in WRONG:
        pytest.xfail(f"{WRONG[peer.name, name]}; error {error:.1e}")
    assert error < TOLERANCE


def test_every_peer_is_tested():
    assert set(NAMES) == set(PEERS)


@pytest.mark.parametrize("name", ["bibtex", "transformer"])
def test_hypergradient_is_ours(peer, name):
    double = tiny(name, torch.float64).hypergradient(NUM_STEPS)
    assert double.status.usable
    assert double.num_steps == NUM_STEPS
    work = peer.hypergradient(tiny(name, torch.float32), NUM_STEPS)
    first, second = work(), work()
    judge(relative_error(second, double.value), peer, name)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["bibtex", "transformer"])
def test_product_is_ours(peer, name):
    single, double = (tiny(name, t) for t in (torch.float32, torch.float64))
    work = peer.product(single, single.direction())
    if work is None:
        pytest.skip(f"{peer.name} exposes no product")
    operator = HessianOperator(double.inner(), double.theta, double.phi)
    judge(relative_error(work(), operator.matvec(double.direction())), peer, name)


@pytest.mark.parametrize("name", ["bibtex", "transformer"])
def test_gradient_is_ours(peer, name):
    work = peer.gradient(tiny(name, torch.float32))
    if work is None:
        pytest.skip(f"{peer.name} has no gradient of its own")
    double = tiny(name, torch.float64)
    assert relative_error(work(), double.gradient()) < TOLERANCE


def test_values_do_not_depend_on_the_type():
    single, double = (tiny("bibtex", t) for t in (torch.float32, torch.float64))
    for ours, wide in ((single.theta, double.theta), (single.phi, double.phi)):
        assert all(torch.equal(ours[key], wide[key].float()) for key in ours)
