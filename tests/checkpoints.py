"""Small checkpoints, what is in a folder of them, and damage to a file."""

from pathlib import Path

import torch
from torch import Tensor

from ispen_dist.checkpoint import save_checkpoint


def small_trees(value: float = 1.0) -> dict[str, dict[str, Tensor]]:
    return {"theta": {"w": torch.full((3,), value)}, "none": {}}


def save(folder: Path, step: int, keep: int = 9) -> Path:
    return save_checkpoint(folder, step, small_trees(step), {"round": step}, keep)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and (not a.numel() or bits(a) == bits(b))


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
