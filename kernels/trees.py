"""Trees as the kernels of the solver take them: checked, and found through tables of addresses.

A *tree* is a sequence of tensors of any shapes, one of float32 or float64, on one device; the trees
of one call have the same shapes, and are walked over in chunks.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ispen_kernels.launch import DTYPES

Tensors = Sequence[Tensor]

# 8 values of every vector per thread of 8 warps: enough loads in flight to fill the memory pipe of
# an SM, and the five float64 vectors of the largest update still leave room for a second program.
CHUNK = 2048
NUM_WARPS = 8
# Widest load of a thread in bytes; torch allocates at 512, but a view may start anywhere.
ALIGNMENT = 16


class Layout(NamedTuple):
    """Everything that a launch needs to know about its trees."""

    addresses: Tensor  # (vectors, tensors) int64, without empty tensors
    chunks: Tensor  # (chunks, 3) int64: tensor, first element, number of elements
    like: Tensor
    aligned: bool
    keep: list[list[Tensor]]  # copies must live until the launch is queued

    @property
    def constants(self) -> dict[str, object]:
        """The compile-time arguments of a chunked kernel."""
        dtype = DTYPES[self.like.dtype]
        return {"DTYPE": dtype, "ALIGNED": self.aligned, "CHUNK": CHUNK, "num_warps": NUM_WARPS}


def _upload(host: Tensor, device: torch.device) -> Tensor:
    """Copy without a synchronisation: the pinned buffer is kept by PyTorch until it was read."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


# Both tables are functions of their keys alone, so a stale entry is never a wrong one. The stream
# is a key because the copy is ordered on it.
@lru_cache(maxsize=256)
def _address_table(addresses: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return _upload(torch.tensor(addresses, dtype=torch.int64, device="cpu"), device)


@lru_cache(maxsize=32)
def _chunk_map(sizes: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    size = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    num_chunks = (size + CHUNK - 1) // CHUNK
    tensor = torch.repeat_interleave(num_chunks)
    first = (num_chunks.cumsum(0) - num_chunks)[tensor]
    start = (torch.arange(len(tensor), device="cpu") - first) * CHUNK
    count = (size[tensor] - start).clamp(max=CHUNK)
    return _upload(torch.stack([tensor, start, count], dim=1).contiguous(), device)


def _refuse(name: str, expected: str, got: object, do: str) -> None:
    raise ValueError(f"{name}: expected {expected}, got {got}; {do}")


def _check(name: str, tree: Tensors, like_name: str, like: Tensors) -> None:
    """Raise unless `tree` fits `like` and no derivative is asked for."""
    if len(tree) != len(like):
        _refuse(name, f"{len(like)} tensors as in {like_name}", len(tree), "pass equal trees")
    first = like[0] if like else None
    for i, (a, b) in enumerate(zip(tree, like, strict=True)):
        if a.shape != b.shape:
            _refuse(f"{name}[{i}]", f"shape {tuple(b.shape)}", tuple(a.shape), "pass equal trees")
        if a.dtype != first.dtype or a.dtype not in DTYPES:
            _refuse(f"{name}[{i}]", "float32 or float64, one for all", a.dtype, "cast the trees")
        if a.device != first.device:
            _refuse(f"{name}[{i}]", f"device {first.device}", a.device, "move the trees together")
        if (a.requires_grad and torch.is_grad_enabled()) or _has_tangent(a):
            raise RuntimeError(
                f"{name}[{i}]: expected no autograd, as the update has no derivative, got a tensor "
                "that is recorded; detach it, enter torch.no_grad() or call the reference"
            )


def _has_tangent(a: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(a).tangent is not None


def _check_written(trees: dict[str, Tensors], written: Sequence[str]) -> None:
    """Raise unless written tensors are contiguous and share memory with no other one."""
    for name in written:
        for i, tensor in enumerate(trees[name]):
            if not tensor.is_contiguous():
                _refuse(
                    f"{name}[{i}]",
                    "a contiguous tensor, as it is written in place",
                    f"strides {tensor.stride()}",
                    "call .contiguous() before the solve",
                )
    starts: dict[int, str] = {}
    for name, tree in trees.items():
        for i, tensor in enumerate(tree):
            other = starts.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
            if other != name and (name in written or other in written):
                _refuse(f"{name}[{i}]", f"memory of its own, as {' and '.join(written)} change",
                        f"a tensor that begins where one of {other} does", "clone it")  # fmt: skip


def check_scalar(name: str, value: Tensor, like: Tensors) -> None:
    """Raise unless a scalar lies beside the trees and no derivative is asked for."""
    fits = value.shape == () and (not like or value.device == like[0].device)
    if not fits or value.dtype not in DTYPES:
        _refuse(
            name,
            "a float32 or float64 tensor of shape () on the device of the trees",
            f"{value.dtype} {tuple(value.shape)} on {value.device}",
            "move or reshape it",
        )
    if (value.requires_grad and torch.is_grad_enabled()) or _has_tangent(value):
        raise RuntimeError(f"{name}: expected no autograd, got a recorded tensor; detach it")


def layout_of(trees: dict[str, Tensors], written: Sequence[str] = ()) -> Layout | None:
    """Check the trees and return their tables; None where they hold no element."""
    like_name, like = next(iter(trees.items()))
    for name, tree in trees.items():
        _check(name, tree, like_name, like)
    _check_written(trees, written)
    keep = [[tensor.contiguous() for tensor in tree if tensor.numel()] for tree in trees.values()]
    if not keep[0]:
        return None
    device = keep[0][0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    addresses = tuple(tensor.data_ptr() for tree in keep for tensor in tree)
    return Layout(
        _address_table(addresses, device, stream),
        _chunk_map(tuple(tensor.numel() for tensor in keep[0]), device, stream),
        keep[0][0],
        all(address % ALIGNMENT == 0 for address in addresses),
        keep,
    )
