"""N gloo ranks with uneven shares give what one rank gives on the whole batch, float64."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import worker_hypergradient
from safetensors.torch import load_file

from ispen_dist.data.sampler import ShardedSampler, in_order

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(script: Path, num_ranks: int, *arguments: str) -> None:
    """Run a script as ranks 0 to n-1 on this machine and fail with the output of one that fails."""
    port = str(free_port())
    processes = []
    for rank in range(num_ranks):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "LOCAL_WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, str(script), *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output


@pytest.fixture(scope="module")
def reference(float64):
    return worker_hypergradient.one_rank()


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_with_uneven_shares_equal_one_rank(num_ranks, reference, tmp_path):
    start_ranks(HERE / "worker_hypergradient.py", num_ranks, str(tmp_path))
    ranks = [load_file(tmp_path / f"rank{r}.safetensors") for r in range(num_ranks)]
    for name, expected in reference.items():
        for result in ranks:
            error = (result[name] - expected).norm() / expected.norm()
            assert error < 1e-10, f"{name}: {error}"
            assert torch.equal(result[name], ranks[0][name]), f"{name}: ranks disagree"


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "num_ranks"), [(10, 4, 3), (7, 7, 2), (5, 2, 4), (3, 8, 5)]
)
def test_an_epoch_holds_every_example_once_however_the_sizes_divide(
    num_examples, batch_size, num_ranks
):
    ranks = [ShardedSampler(num_examples, batch_size, 0, r, num_ranks) for r in range(num_ranks)]
    whole = ShardedSampler(num_examples, batch_size, 0)
    for epoch in range(3):
        seen = []
        for position in range(whole.batches_per_epoch):
            step = epoch * whole.batches_per_epoch + position
            parts = [row for sampler in ranks for row in sampler.own_batch(step)]
            assert parts == list(whole.own_batch(step))
            assert len({len(s.own_batch(step)) for s in ranks}) <= 2
            seen += parts
        assert sorted(seen) == list(range(num_examples))


def test_epochs_differ_and_are_a_function_of_the_seed():
    sampler = ShardedSampler(50, 50, 1)
    assert list(sampler.own_batch(0)) != list(sampler.own_batch(1))
    assert list(sampler.own_batch(1)) == list(ShardedSampler(50, 50, 1).own_batch(1))
    assert list(sampler.own_batch(0)) != list(ShardedSampler(50, 50, 2).own_batch(0))


def test_evaluation_reads_each_example_on_one_rank():
    seen = [row for r in range(4) for rows in in_order(10, 2, r, 4) for row in rows]
    assert sorted(seen) == list(range(10))


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="empty data set"):
        ShardedSampler(0, 4, 0)
