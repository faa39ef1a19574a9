"""DeepSpeed's ZeRO behind the `Engine` interface, and what had to be worked around.

Both networks are engines of their own. Each is called only in a graph that ends in its own
backward; the other player, evaluation and all second-order work read own parts through a plain
copy of the network instead. Reasons, as measured with torch 2.13 and deepspeed 0.19:

- Second derivatives fail: ZeRO raises. Hence `Engine.network`, a copy without hooks on the meta
  device.
- Calling the energy's engine in the inference network's step is silently wrong under ZeRO-3 and
  raises under ZeRO-1 and 2.
- It averages gradients over ranks, so a rank's share of the global mean is scaled by their number.
- It takes a gradient only between a backward and a step, so `apply` runs the backward of zero
  first.
- ZeRO-1 and 2 link parameters to optimizer state after the first group's first step, so that the
  second group has none to read or set; state is therefore made and linked when a phase begins.
- ZeRO-2 puts gradients into buckets in the order in which they arrive, and trusts that it is the
  same on all ranks. That of a recurrent network depends on the lengths of its sequences, so that
  ranks silently add gradients of different parameters (parameters off by 2.5% after 20 steps of a
  BiLSTM). Its parameters therefore pass through one node, which waits for all their gradients.
- The padding at the end of a ZeRO-3 partition is uninitialised memory; `Cut.size` leaves it out.
- ZeRO keeps its optimizer in float32, whatever the type of the parameters. Under bf16, curvature
  reads that copy, which DeepSpeed makes from rounded values, so it is set again from the network.
  Frozen parameters have none; theirs is kept here.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from ispen_dist.distributed.ranks import Ranks
from ispen_dist.distributed.shards import Cut, Shards
from ispen_dist.engine import MOMENTS, Engine, Groups
from ispen_dist.linalg.layout import Replicas
from ispen_dist.linalg.trees import Tree
from ispen_dist.models.stages import Inputs
from ispen_dist.optim import checked_norm


class _Together(torch.autograd.Function):
    """The identity on several tensors, whose gradients go on at the same time."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


class DeepSpeedEngine(Engine):
    """A network under ZeRO-1, 2 or 3.

    Args:
        network: the network as built, before `wrapped` took it.
        groups: parameter names by group, in the order of the optimizer's groups.
        wrapped: what Accelerate made of the network: a `deepspeed.DeepSpeedEngine`.
        initial: whole float32 parameters before DeepSpeed rounded them, where it did.
    """

    def __init__(
        self, network: nn.Module, groups: Groups, wrapped: Any, initial: Tree | None = None
    ) -> None:
        self._engine = wrapped
        self._zero = wrapped.optimizer
        self._parameters = dict(wrapped.module.named_parameters())
        self._sharded = wrapped.zero_optimization_stage() == 3
        self._low_precision = wrapped.bfloat16_enabled()
        self._constants: Tree = {}
        self._cuts: dict[str, Cut] = {}
        if self._sharded:
            self._cuts = {
                n: Cut(p.ds_shape, p.ds_tensor.numel()) for n, p in self._parameters.items()
            }
        layout = Shards(self._cuts) if self._sharded else Replicas(Ranks())
        super().__init__(network, layout, groups)
        if initial is not None:
            self.load(self.layout.own(initial))

    def parameters(self, names: Iterable[str] | None = None) -> Tree:
        """Return own parts; under bf16 of the optimizer's float32 copy."""
        return {name: self._own(name) for name in (self._parameters if names is None else names)}

    def _own(self, name: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

        if name in self._constants:
            return self._constants[name]
        p = self._parameters[name]
        if not self._sharded:
            return safe_get_full_fp32_param(p) if self._low_precision else p.detach()
        part = safe_get_local_fp32_param(p) if self._low_precision else p.ds_tensor.detach()
        return part.to(self._engine.device)[: self._size(name)]

    def _size(self, name: str) -> int:
        return self._cuts[name].size(dist.get_rank())

    def forward(self, inputs: Inputs) -> Tensor:
        """Run the engine."""
        self._engine.train()
        if self._low_precision:
            inputs = {
                key: x.bfloat16() if x.is_floating_point() else x for key, x in inputs.items()
            }
        together = {} if self._sharded else self._recurrent_together()
        output = functional_call(self._engine, together, (inputs,))
        return output.float() if self._low_precision else output

    def _recurrent_together(self) -> Tree:
        """Return the parameters of recurrent modules behind one node each, by name."""
        result: Tree = {}
        for prefix, module in self._engine.named_modules():
            if isinstance(module, nn.RNNBase):
                own = {f"{prefix}.{name}": p for name, p in module.named_parameters()}
                result |= dict(zip(own, _Together.apply(*own.values()), strict=True))
        return result

    def step(
        self, total: Tensor, also: Sequence[Tensor], count: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """See `Engine.step`."""
        *sums, global_count = self.layout.reduction.sum([*(s.detach() for s in also), count])
        # DeepSpeed skips a step whose gradient is not finite; so it must not be, on any rank.
        share = checked_norm(dist.get_world_size() / global_count, sums)
        self._engine.backward(total * share)
        norm = self._take_step()
        return [s / global_count for s in sums], norm

    def apply(self, gradient: Tree, inputs: Inputs) -> None:
        """See `Engine.apply`."""
        from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

        self._engine.backward((self.forward(inputs) * 0.0).sum())
        for name, p in self._parameters.items():
            if self._sharded:
                part = gradient.get(name)
                safe_set_local_grad(p, self._padded(name, part, p.ds_tensor.float()))
            else:
                value = gradient.get(name)
                safe_set_full_grad(p, torch.zeros_like(p) if value is None else value.to(p))
        self._take_step()

    def _padded(self, name: str, part: Tensor | None, like: Tensor) -> Tensor:
        whole = torch.zeros_like(like)
        if part is not None:
            whole[: self._size(name)] = part
        return whole

    def _take_step(self) -> Tensor:
        self._zero.clip_grad = self.phase.config.clip_norm
        self._prepare(self._zero.param_groups)
        self._engine.step()
        self.num_taken += 1
        if not self._engine.was_step_applied():
            for partition in self._partitions:
                self._set_step(partition, self.num_taken)
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self._engine.device).reshape(())

    @torch.no_grad()
    def load(self, parameters: Tree) -> None:
        """See `Engine.load`: both the engine's parameters and the optimizer's copy."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for name, p in self._parameters.items():
            part = parameters[name]
            if self._sharded:
                p.ds_tensor.copy_(self._padded(name, part, p.ds_tensor))
            else:
                p.copy_(part)
            if self._low_precision and name in self.frozen:
                self._constants[name] = part.to(self._engine.device, copy=True)
            elif self._sharded:
                safe_set_local_fp32_param(p, self._padded(name, part, p.ds_tensor.float()))
            else:
                safe_set_full_fp32_param(p, part)

    def moments(self) -> dict[str, Tree]:
        """See `Engine.moments`."""
        if self.num_taken == 0:
            return {}
        return {
            slot: {name: self._moment(name, slot) for name in self.trained_names}
            for slot in MOMENTS
        }

    def _moment(self, name: str, slot: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

        p = self._parameters[name]
        if self._sharded:
            return safe_get_local_optimizer_state(p, slot)[: self._size(name)]
        return safe_get_full_optimizer_state(p, slot)

    def load_moments(self, moments: Mapping[str, Tree], num_taken: int) -> None:
        """See `Engine.load_moments`."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self._forget()
        for slot, tree in moments.items():
            for name, part in tree.items():
                p = self._parameters[name]
                if self._sharded:
                    padded = self._padded(name, part, p.ds_tensor.float())
                    safe_set_local_optimizer_state(p, padded, slot)
                else:
                    safe_set_full_optimizer_state(p, part, slot)
        for partition in self._partitions:
            self._set_step(partition, num_taken)
        self.num_taken = num_taken

    def _forget(self) -> None:
        state = self._zero.optimizer.state
        for partition in self._partitions:
            for slot in MOMENTS:
                state[partition].setdefault(slot, torch.zeros_like(partition)).zero_()
            self._set_step(partition, 0)
        if not self._sharded:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    @property
    def _partitions(self) -> list[Tensor]:
        """The float32 pieces of parameters that the optimizer updates on this rank."""
        zero = self._zero
        return list(
            zero.fp32_partitioned_groups_flat
            if self._sharded
            else zero.single_partition_of_fp32_groups
        )

    def _set_step(self, partition: Tensor, step: int) -> None:
        state = self._zero.optimizer.state[partition]
        is_torch = isinstance(self._zero.optimizer, torch.optim.AdamW)
        state["step"] = torch.tensor(float(step)) if is_torch else step
