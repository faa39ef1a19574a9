"""Which examples a rank reads, and how parameters are cut among ranks."""

import pytest

from ispen_dist.config import ConfigError
from ispen_dist.data.sampler import ShardedSampler, in_order
from ispen_dist.distributed.runtime import runtime_from


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
    ranks = [list(in_order(10, 2, r, 4)) for r in range(4)]
    assert sorted(row for batches in ranks for rows in batches for row in rows) == list(range(10))
    assert {len(batches) for batches in ranks} == {2}, "all ranks take part in every batch"


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="empty data set"):
        ShardedSampler(0, 4, 0)


def test_the_runtime_is_read_from_what_accelerate_leaves():
    assert runtime_from({}).name == "replicas"
    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    assert runtime_from(deepspeed).name == "zero3"
    assert runtime_from({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}).shards_parameters
    assert runtime_from({"ACCELERATE_MIXED_PRECISION": "bf16"}).low_precision is not None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: expected 2, got 1"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "distributed_type: MEGATRON_LM: expected"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed_precision: expected no or bf16, got fp16"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
            "zero_stage: expected 1, 2 or 3, got 0",
        ),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "x.json"},
            "deepspeed_config_file: expected none",
        ),
    ],
)
def test_an_engine_that_is_not_supported_is_named(environment, message):
    with pytest.raises(ConfigError, match=message):
        runtime_from(environment)
