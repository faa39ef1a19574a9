"""Randomness as a function of (seed, purpose, step, rank): resuming needs no random state.

Before every step the global generator is seeded for it, so a step draws the same dropout masks
and samples whether the run was interrupted or not, and a repeated solve draws them again.
"""

import hashlib

import torch


def derived_seed(*parts: int | str) -> int:
    """Return a 63-bit seed from the parts, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_step(seed: int, purpose: str, step: int, rank: int) -> None:
    """Seed the global generators of all devices for one step."""
    torch.manual_seed(derived_seed(seed, purpose, step, rank))


def step_generator(
    seed: int, purpose: str, step: int, rank: int, device: torch.device
) -> torch.Generator:
    """Return a generator of its own for the samples of one step."""
    return torch.Generator(device).manual_seed(derived_seed(seed, purpose, step, rank))
