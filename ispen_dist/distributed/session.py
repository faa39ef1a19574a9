"""One process of a run: its rank, its device, its engines, and how it stays in step with others."""

import copy
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from ispen_dist import ranges
from ispen_dist.distributed.deepspeed_engine import DeepSpeedEngine
from ispen_dist.distributed.extensions import check_extensions
from ispen_dist.distributed.flight_record import FlightRecord, keep_collectives
from ispen_dist.distributed.fsdp2_engine import FullyShardedEngine, shard
from ispen_dist.distributed.ranks import Ranks
from ispen_dist.distributed.runtime import Runtime, runtime_from
from ispen_dist.engine import Engine, Groups
from ispen_dist.replicas import ReplicatedEngine
from ispen_dist.stopping import StopRequest
from ispen_dist.watchdog import FIRST_TIME, Watchdog

NETWORKS = ("inference_net", "energy")
"""Names of the two engines of a run."""


class Session:
    """The processes of a run, as started by `accelerate launch`, torchrun or plain python.

    Uses the GPUs with nccl where there are any, otherwise the CPU with gloo. Which engine shards
    the networks is what Accelerate was configured for, see `Runtime`.

    Args:
        stop: what remembers signals; default one that handles none.
        hang_timeout: seconds without progress after which this process ends; 0 never.

    Attributes:
        runtime: the engine, and the precision of first-order steps.
        rank: this process, 0 to num_ranks - 1.
        num_ranks: number of processes.
        device: where this process computes.
        reduction: sums over the processes.
        stop: the request to stop, if there was one.
        watchdog: wants to hear of progress.
        flight_record: the last collectives, which the watchdog shows.

    Raises:
        ConfigError: for an engine that is not supported.
    """

    def __init__(self, stop: StopRequest | None = None, hang_timeout: float = 0.0) -> None:
        self.runtime: Runtime = runtime_from()
        self.stop = stop or StopRequest()
        self.watchdog = Watchdog(hang_timeout)
        self.watchdog.start()
        waits = _collective_timeout(hang_timeout)
        keep_collectives()
        on_cpu = not torch.cuda.is_available()
        self._accelerators: dict[str, Accelerator] = {}
        if self.runtime.uses_deepspeed:
            if on_cpu:
                os.environ.setdefault("DS_ACCELERATOR", "cpu")
            check_extensions()
            self._accelerators = _deepspeed_accelerators(on_cpu, waits)
            _build_whole()
        settings = {} if self.runtime.uses_deepspeed else {"cpu": on_cpu, **waits}
        self._state = PartialState(**settings)
        self.rank = self._state.process_index
        self.num_ranks = self._state.num_processes
        self.device = torch.device("cpu") if on_cpu else self._state.device
        self.reduction = Ranks()
        self.flight_record = FlightRecord(self.rank)
        self.watchdog.details = self.flight_record.describe

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes files and prints."""
        return self.rank == 0

    @ranges.marked("barrier")
    def barrier(self) -> None:
        """Wait for all processes."""
        self._state.wait_for_everyone()

    def engine(self, name: str, network: nn.Module, groups: Groups) -> Engine:
        """Hand a network on the CPU to the engine of the run.

        Afterwards use `Engine.network` in its place: the network itself may have been sharded.

        Args:
            name: one of `NETWORKS`.
            network: built alike on every rank; rank 0's parameters are what counts.
            groups: parameter names by group of the optimizer.
        """
        if self.runtime.name == "replicas":
            self._broadcast(network.to(self.device))
            return ReplicatedEngine(network, groups, self.reduction, self.runtime.low_precision)
        plain = without_hooks(network)
        if self.runtime.name == "fsdp2":
            plugin = FullyShardedDataParallelPlugin()
            mesh = init_device_mesh(self.device.type, (self.num_ranks,))
            shard(network, mesh, plugin, self.runtime.low_precision)
            return FullyShardedEngine(plain, groups, network, self.device)
        accelerator = self._accelerators[name]
        accelerator.state.select_deepspeed_plugin(name)
        named = dict(network.named_parameters())
        adamw = torch.optim.AdamW(
            [{"params": [named[n] for n in names]} for names in groups.values()]
        )
        initial = None
        if self.runtime.low_precision is not None:
            initial = {n: p.detach().clone() for n, p in named.items()}
        wrapped, _ = accelerator.prepare(network, adamw)
        _build_whole()
        return DeepSpeedEngine(plain, groups, wrapped, initial)

    @ranges.marked("broadcast")
    def _broadcast(self, network: nn.Module) -> None:
        """Copy the parameters of rank 0 to every rank."""
        if self.num_ranks > 1:
            for tensor in network.state_dict().values():
                dist.broadcast(tensor, src=0)

    @ranges.marked("broadcast")
    def agree(self, number: int) -> int:
        """Return the number that rank 0 has, on every rank."""
        tensor = torch.tensor(number, dtype=torch.int64, device=self.device)
        if self.num_ranks > 1:
            dist.broadcast(tensor, src=0)
        return int(tensor.item())

    @ranges.marked("all-reduce")
    def largest(self, numbers: Sequence[int]) -> list[int]:
        """Return the largest values over ranks, entry by entry, in one collective."""
        if self.num_ranks == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    @ranges.marked("all-gather")
    def gather_texts(self, text: str) -> list[str]:
        """Return the texts of all ranks in order."""
        if self.num_ranks == 1:
            return [text]
        texts = [""] * self.num_ranks
        dist.all_gather_object(texts, text)
        return texts

    def close(self) -> None:
        """Leave the process group, so that no process is left waiting."""
        self.watchdog.stop()
        if dist.is_initialized():
            dist.destroy_process_group()


def _collective_timeout(hang_timeout: float) -> dict[str, timedelta]:
    """Return a limit for collectives that comes after the watchdog's, whose report says more."""
    if hang_timeout == 0.0:
        return {}
    return {"timeout": timedelta(seconds=max(hang_timeout, FIRST_TIME) + 120.0)}


def _deepspeed_accelerators(on_cpu: bool, waits: dict[str, Any]) -> dict[str, Accelerator]:
    """Return an Accelerator per network; they share the process group and differ in plugin."""
    plugins = {name: DeepSpeedPlugin(zero3_init_flag=False) for name in NETWORKS}
    for plugin in plugins.values():
        plugin.deepspeed_config |= _SETTINGS
        plugin.deepspeed_config.pop("train_batch_size", None)
        # Replaces torch.nn.functional.linear in the whole process; kept small parameters would
        # have two copies to set on resume.
        if plugin.zero_stage == 3:
            plugin.deepspeed_config["zero_optimization"] |= {
                "memory_efficient_linear": False,
                "stage3_param_persistence_threshold": 0,
            }
    settings = {"backend": "gloo" if on_cpu else "nccl", **waits}
    handlers: list[Any] = [InitProcessGroupKwargs(**settings)]
    first = Accelerator(deepspeed_plugins=plugins, kwargs_handlers=handlers)
    return {name: first if name == NETWORKS[0] else Accelerator() for name in NETWORKS}


_SETTINGS = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
}
"""Sizes that DeepSpeed wants to know and the trainer decides itself; clipping is set per step."""


def _build_whole() -> None:
    """Have transformers build and read encoders whole, as all networks are before an engine.

    Accelerate tells it of ZeRO-3, and it would build them in shards, in a type of its own.
    """
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def without_hooks(network: nn.Module) -> nn.Module:
    """Return a copy of a network whose parameters are shapes without memory."""
    with torch.device("meta"):
        memo: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
            for p in network.parameters()
        }
    return copy.deepcopy(network, memo)
