"""What the AdamW of every engine does alike: phases, the schedule, clipping."""

import math
from dataclasses import dataclass

from ispen_dist.config import OptimizerConfig

CLIP_EPSILON = 1e-6
"""Added to the norm in `clip_norm / (norm + epsilon)`, as torch and DeepSpeed do."""

BETA2, ADAM_EPSILON = 0.999, 1e-8
"""Decay of second moments, and what is added to their roots: torch's defaults, in all engines."""


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one schedule; the optimizer's state starts anew with it.

    Attributes:
        name: for checkpoints.
        config: learning rate, decay, clipping.
        num_steps: of the whole phase, for the schedule.
        groups: names of the parameter groups that are trained; the others stand still.
    """

    name: str
    config: OptimizerConfig
    num_steps: int
    groups: frozenset[str]

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
