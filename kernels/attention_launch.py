"""How the kernels of attention are cut and launched, and what their operators check.

Shapes: B batch, N heads, T queries, S keys, H head size. A row statistic is (B, N, T), contiguous,
in float64 beside float64 and in float32 otherwise.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ispen_kernels.attention_tiles import Operand, Rows
from ispen_kernels.launch import INTERPRETED, launch, padded


class Tiles(NamedTuple):
    """How a kernel is cut: rows it owns, rows it visits per step, warps, pipeline stages."""

    owned: int
    visited: int
    warps: int
    stages: int


# For head sizes up to 64, and up to 128. 64 owned rows are the least that use the wide products of
# Hopper, and little padding for sentences; a second derivative keeps four tiles of weights in
# registers, hence its narrow steps. Compiled for sm_90 by Triton 3.6 and 3.9 no 16-bit row spills
# more than 56 bytes a thread, and that only where lengths do not divide. None was timed yet.
TILES_16_BITS = {
    "forward": (Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2)),
    "forward_tangent": (Tiles(64, 32, 4, 3), Tiles(64, 32, 4, 2)),
    "tangent": (Tiles(64, 32, 4, 3), Tiles(64, 32, 4, 2)),
    "q_bar": (Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2)),
    "q_bar_tangent": (Tiles(64, 32, 4, 2), Tiles(64, 16, 4, 2)),
    "kv_bar": (Tiles(64, 64, 4, 3), Tiles(64, 32, 4, 2)),
    "kv_bar_tangent": (Tiles(64, 32, 4, 2), Tiles(128, 16, 8, 2)),
}
# IEEE products hold whole rows of both operands in registers: small tiles over many warps, and the
# tangents of head sizes from 64 spill all the same. Tiles of 16 x 16 over 8 warps would spill less,
# but the LLVM of Triton 3.9 aborts on them.
TILES_32_BITS = {
    name: (Tiles(32, 16, 8, 1),) * 2
    if "tangent" in name
    else (Tiles(32, 32, 4, 2), Tiles(32, 32, 8, 1))
    for name in TILES_16_BITS
}
# At head sizes 17 to 32 the LLVM of Triton 3.9 aborts on those, and on four others that were tried.
TILES_32_BITS_NARROW = Tiles(32, 32, 8, 1)
# Small, so that small tests meet several blocks; nothing else counts here.
TILES_INTERPRETER = Tiles(32, 32, 4, 1)


def _tiles(kernel: str, dtype: torch.dtype, block_H: int) -> Tiles:
    if INTERPRETED:
        return TILES_INTERPRETER
    if dtype.itemsize > 2 and kernel == "forward_tangent" and block_H == 32:
        return TILES_32_BITS_NARROW
    table = TILES_16_BITS if dtype.itemsize == 2 else TILES_32_BITS
    return table[kernel][block_H > 64]


def accumulator(x: Tensor) -> tl.dtype:
    """Return the type that sums are kept in."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def rows_of(x: Tensor, size: int, ragged: bool) -> Rows:
    """Return the rows of the heads of x, in tiles of this size."""
    constants = (x.shape[-1], size, padded(x.shape[-1]), ragged)
    return Rows(x.shape[2], *(tl.constexpr(value) for value in constants))


def cut(kernel: str, q: Tensor, k: Tensor, by_keys: bool = False) -> tuple[Rows, Rows, dict]:
    """Return queries and keys as a kernel cuts them, which owns one of them, and its options."""
    tiles = _tiles(kernel, q.dtype, padded(q.shape[-1]))
    sizes = (tiles.visited, tiles.owned) if by_keys else (tiles.owned, tiles.visited)
    queries, keys = (
        rows_of(x, size, ragged=x.shape[2] % size != 0)
        for x, size in zip((q, k), sizes, strict=True)
    )
    options = {"ACC": accumulator(q), "num_warps": tiles.warps, "num_stages": tiles.stages}
    return queries, keys, options


def operands(*tensors: Tensor | None) -> list[Operand | None]:
    """Return tensors as kernels take them."""
    return [None if x is None else Operand(x, x.stride()) for x in tensors]


def launch_heads(kernel, like: Tensor, rows: Rows, *args, **constants) -> None:
    """Launch one program for each block of rows of each head."""
    grid = (like.shape[0] * like.shape[1] * triton.cdiv(rows.length, rows.ROWS.value),)
    launch(kernel, grid, like.device, *args, **constants)


def _statistic_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def statistic_of(q: Tensor) -> Tensor:
    """Return memory for a row statistic."""
    return torch.empty(q.shape[:3], dtype=_statistic_dtype(q), device=q.device)


def is_empty(q: Tensor, k: Tensor) -> bool:
    """Tell whether there is nothing to launch for."""
    return q.numel() == 0 or k.numel() == 0


def check_like(expected: Tensor, **tensors: Tensor | None) -> None:
    """Raise unless tensors have the shape and type of the one they belong to."""
    for name, x in tensors.items():
        if x is not None and (x.shape != expected.shape or x.dtype != expected.dtype):
            raise ValueError(
                f"{name}: expected {tuple(expected.shape)} of {expected.dtype}, got "
                f"{tuple(x.shape)} of {x.dtype}; pass a tensor like the one it belongs to"
            )


def check_statistics(q: Tensor, **statistics: Tensor) -> None:
    """Raise unless tensors are row statistics of these queries."""
    for name, x in statistics.items():
        if not (x.shape == q.shape[:3] and x.dtype == _statistic_dtype(q) and x.is_contiguous()):
            raise ValueError(
                f"{name}: expected contiguous {tuple(q.shape[:3])} of {_statistic_dtype(q)}, got "
                f"{tuple(x.shape)} of {x.dtype}; pass the row statistic as an operator returned it"
            )
