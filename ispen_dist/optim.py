"""What the AdamW of every engine does alike: phases, the schedule, clipping, steps left out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ispen_dist.config import OptimizerConfig

CLIP_EPSILON = 1e-6
"""Added to the norm in `clip_norm / (norm + epsilon)`, as torch and DeepSpeed do."""

BETA2, ADAM_EPSILON = 0.999, 1e-8
"""Decay of second moments, and what is added to their roots: torch's defaults, in all engines."""

PRETRAINED = "pretrained"
"""Name of the parameter group of a pretrained encoder's layers."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one schedule; the optimizer's state starts anew with it.

    Attributes:
        name: for checkpoints.
        config: learning rate, decay, clipping, the factor of pretrained layers.
        num_steps: of the whole phase, for the schedule.
        groups: names of the parameter groups that are trained; the others stand still.
    """

    name: str
    config: OptimizerConfig
    num_steps: int
    groups: frozenset[str]

    def factor(self, group: str) -> float:
        """Return what the learning rate is multiplied with for a parameter group."""
        return self.config.pretrained_factor if group == PRETRAINED else 1.0

    def learning_rate(self, step: int) -> float:
        """Return the rate of a step (steps already taken): linear warm-up, then cosine."""
        config = self.config
        if step < config.warmup_steps:
            return config.learning_rate * (step + 1) / config.warmup_steps
        rest = max(1, self.num_steps - config.warmup_steps)
        progress = min(1.0, (step - config.warmup_steps) / rest)
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        final = config.final_fraction
        return config.learning_rate * (final + (1.0 - final) * cosine)


def clip_factor(norm: Tensor, clip_norm: float) -> Tensor:
    """Return what a gradient of the given norm is multiplied with; 1 where clipping is off."""
    if clip_norm <= 0.0:
        return torch.ones_like(norm)
    return torch.clamp(clip_norm / (norm + CLIP_EPSILON), max=1.0)


def checked_norm(norm: Tensor, terms: Sequence[Tensor]) -> Tensor:
    """Return the norm of a gradient, NaN where a term of its loss is not finite."""
    return torch.where(torch.isfinite(torch.stack([norm, *terms])).all(), norm, torch.nan)


def found_inf(norm: Tensor) -> Tensor:
    """Return what a fused optimizer reads: 1 where it shall leave everything as it is."""
    return (~torch.isfinite(norm)).to(torch.float32)


def step_unless(optimizer: torch.optim.Optimizer, found: Tensor) -> None:
    """Step a fused optimizer, unless the device finds a 1 in `found`, and forget the gradients."""
    taken = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    optimizer.found_inf = found  # type: ignore[attr-defined]
    optimizer.step()
    # It takes a skipped step back in its count; here the count is a function of the round.
    counts = [optimizer.state[p]["step"] for p in taken]
    torch._foreach_add_(counts, [found.to(counts[0].device)] * len(counts))
    optimizer.zero_grad()
