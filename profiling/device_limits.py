"""What the device can do, measured by two short benchmarks, or read from a file."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

SIDE = 1024
"""Of the square matrices on a CPU; 8 times that on a GPU."""
COPIED = 2**26
"""Bytes that are copied on a CPU, more than its caches hold; 16 times that on a GPU."""
REPETITIONS = 7


@dataclass(frozen=True)
class Limits:
    """The best that was seen of a device.

    Attributes:
        flops: multiplications and additions a second in a float32 matrix product.
        read_bytes: bytes a second that a copy reads; it writes as many.
        source: where the figures are from.
    """

    flops: float
    read_bytes: float
    source: str


def measure_limits(num_threads: int = 0) -> Limits:
    """Multiply and copy for about a second, on the GPU if there is one.

    Args:
        num_threads: of the CPU, as the run had; 0 leaves PyTorch's choice.
    """
    if num_threads:
        torch.set_num_threads(num_threads)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    side, size = (SIDE * 8, COPIED * 4) if on_gpu else (SIDE, COPIED // 4)
    a = torch.randn(side, side, device=device)
    x = torch.randn(size, device=device)
    y = torch.empty_like(x)
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} thread(s)"
    return Limits(
        2.0 * side**3 / _fastest(lambda: a @ a, on_gpu),
        4.0 * size / _fastest(lambda: y.copy_(x), on_gpu),
        f"measured now on this machine: {name}, float32",
    )


def _fastest(work: Callable[[], object], on_gpu: bool) -> float:
    seconds = []
    for _ in range(REPETITIONS):
        begin = time.perf_counter()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def read_limits(path: Path) -> Limits:
    """Read `{"flops": ..., "read_bytes": ...}`.

    Raises:
        ValueError: if the file does not say that.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
        flops, read_bytes = float(values["flops"]), float(values["read_bytes"])
        if not (flops > 0.0 and read_bytes > 0.0):
            raise ValueError("not above 0")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path}: expected {{"flops": NUMBER, "read_bytes": NUMBER}}, a second each, got: '
            f"{error}; correct the file or leave --limits out to measure"
        ) from error
    return Limits(flops, read_bytes, f"from {path.name}")
