"""FSDP2 behind the `Engine` interface, and what had to be worked around.

As under DeepSpeed, see `deepspeed_engine`, each network is called only in a graph that ends in its
own backward, and second-order work reads own parts through a plain copy. Reasons, as measured with
torch 2.13:

- Second derivatives raise.
- It averages gradients over ranks, so a rank's share of the global mean is scaled by their number;
  it can be told to add, but not on gloo.
- Accelerate never selects FSDP on a CPU, so parameters are sharded by torch's `fully_shard` itself,
  with the settings of Accelerate's plugin, on every device.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from ispen_dist.distributed.shards import Cut, Shards
from ispen_dist.engine import MOMENTS, Engine, Groups, copy_into
from ispen_dist.linalg.trees import Tree, scaled
from ispen_dist.models.stages import Inputs, parts_of
from ispen_dist.optim import checked_norm, clip_factor, found_inf, step_unless


def shard(
    network: nn.Module, mesh: DeviceMesh, plugin: Any, precision: torch.dtype | None
) -> FSDPModule:
    """Shard a network in place: each stage of a single module by itself, then the rest.

    Args:
        network: to be sharded.
        mesh: one dimension, all ranks.
        plugin: Accelerate's `FullyShardedDataParallelPlugin`.
        precision: type of first-order computation, or None for that of the parameters.
    """
    offload = OffloadPolicy()
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy) or plugin.cpu_offload is True:
        offload = CPUOffloadPolicy()
    settings: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": bool(plugin.reshard_after_forward),
        "offload_policy": offload,
    }
    reduced = torch.float32 if precision else None
    inside = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=reduced)
    trunk = getattr(network, "feature_network", network)
    for part in parts_of(trunk):
        if len(part.reads) == 1:
            fully_shard(part.reads[0], mp_policy=inside, **settings)
    # Only the output of the whole is cast back: packed sequences inside are not cast again.
    fully_shard(network, mp_policy=replace(inside, output_dtype=reduced), **settings)
    assert isinstance(network, FSDPModule)
    return network


class FullyShardedEngine(Engine):
    """A network under FSDP2.

    Args:
        network: plain copy, without hooks.
        groups: parameter names by group.
        sharded: what `shard` returned.
        device: where curvature is computed, also when the shards are offloaded.
    """

    def __init__(
        self, network: nn.Module, groups: Groups, sharded: nn.Module, device: torch.device
    ) -> None:
        self._sharded = sharded
        self._device = device
        self._parameters: dict[str, Any] = dict(sharded.named_parameters())
        num_ranks = dist.get_world_size()
        cuts = {}
        for name, p in self._parameters.items():
            rows = -(-p.shape[0] // num_ranks)
            cuts[name] = Cut(p.shape, rows * (p.shape.numel() // max(p.shape[0], 1)))
        super().__init__(network, Shards(cuts), groups)
        self._adamw = torch.optim.AdamW(
            [{"params": [self._parameters[n] for n in names]} for names in groups.values()],
            fused=True,
        )

    def parameters(self, names: Iterable[str] | None = None) -> Tree:
        """Return own parts, in the type of the shards: float32 also under bf16."""
        return {
            n: _local(self._parameters[n]).to(self._device)
            for n in (self._parameters if names is None else names)
        }

    def forward(self, inputs: Inputs) -> Tensor:
        """Run the sharded network."""
        self._sharded.train()
        return self._sharded(inputs)

    def step(
        self, total: Tensor, also: Sequence[Tensor], count: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """See `Engine.step`."""
        *sums, global_count = self.layout.reduction.sum([*(s.detach() for s in also), count])
        (total * (dist.get_world_size() / global_count)).backward()
        gradient = {}
        for name in self.trained_names:
            p = self._parameters[name]
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            assert isinstance(grad, DTensor)
            gradient[name] = _local(grad)
        means = [s / global_count for s in sums]
        return means, self._update(gradient, means)

    def apply(self, gradient: Tree, inputs: Inputs) -> None:
        """See `Engine.apply`."""
        self._update(gradient)

    def _update(self, gradient: Tree, terms: Sequence[Tensor] = ()) -> Tensor:
        norm = self.layout.vectors().dots([(gradient, gradient)])[0].sqrt()
        norm = checked_norm(norm, terms)
        gradient = scaled(gradient, clip_factor(norm, self.phase.config.clip_norm))
        self._adamw.zero_grad()
        for name, part in gradient.items():
            self._parameters[name].grad = self._as_shard(name, part)
        self._prepare(self._adamw.param_groups)
        step_unless(self._adamw, found_inf(norm))
        self.num_taken += 1
        return norm

    def _as_shard(self, name: str, part: Tensor) -> DTensor:
        p = self._parameters[name]
        local = part.view(p.to_local().shape).to(p.to_local().device)
        return DTensor.from_local(
            local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )

    @torch.no_grad()
    def load(self, parameters: Tree) -> None:
        """See `Engine.load`."""
        copy_into({name: _local(p) for name, p in self._parameters.items()}, parameters)

    def moments(self) -> dict[str, Tree]:
        """See `Engine.moments`."""
        if self.num_taken == 0:
            return {}
        state = self._adamw.state
        return {
            slot: {n: _local(state[self._parameters[n]][slot]) for n in self.trained_names}
            for slot in MOMENTS
        }

    def load_moments(self, moments: Mapping[str, Tree], num_taken: int) -> None:
        """See `Engine.load_moments`."""
        self._forget()
        for name in next(iter(moments.values()), {}):
            device = self._parameters[name].to_local().device
            state: dict[str, Tensor] = {"step": torch.tensor(float(num_taken), device=device)}
            for slot in MOMENTS:
                state[slot] = self._as_shard(name, moments[slot][name].clone())
            self._adamw.state[self._parameters[name]] = state
        self.num_taken = num_taken

    def _forget(self) -> None:
        self._adamw.state.clear()


def _local(p: DTensor) -> Tensor:
    return p.to_local().detach().view(-1)
