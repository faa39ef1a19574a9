"""AdamW with a schedule that is a function of the step, and globally reduced gradients."""

import math

import torch
from torch import Tensor

from ispen_dist.config import OptimizerConfig
from ispen_dist.linalg import trees
from ispen_dist.linalg.trees import Tree


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then cosine to the final fraction.

    Args:
        config: peak, warm-up and final fraction.
        step: steps already taken.
        num_steps: steps of the whole run.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    rest = max(1, num_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / rest)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_fraction + (1.0 - config.final_fraction) * cosine)


class Optimizer:
    """AdamW over a tree of parameters, fed with gradients that are already global.

    Args:
        parameters: the tree that is updated in place.
        config: settings.
        num_steps: steps of the whole run, for the schedule.
    """

    def __init__(self, parameters: Tree, config: OptimizerConfig, num_steps: int) -> None:
        self.parameters = parameters
        self.config = config
        self.num_steps = num_steps
        self.num_taken = 0
        self.adamw = torch.optim.AdamW(
            parameters.values(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, gradient: Tree) -> Tensor:
        """Clip, set the learning rate and update; return the norm before clipping."""
        gradient_norm = trees.norm(gradient)
        if self.config.clip_norm > 0.0:
            scale = torch.clamp(self.config.clip_norm / (gradient_norm + 1e-12), max=1.0)
            gradient = trees.scaled(gradient, scale)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(self.config, self.num_taken, self.num_steps)
        for name, parameter in self.parameters.items():
            parameter.grad = gradient[name]
        self.adamw.step()
        self.adamw.zero_grad()
        self.num_taken += 1
        return gradient_norm
