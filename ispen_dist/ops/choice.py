"""Which implementation of an operation is used: chosen by what can run, unless it is told."""

import contextlib
from collections.abc import Iterator

KERNELS = ("auto", "reference", "always")
"""`auto`: a kernel where it is known to be the better choice. `reference`: plain PyTorch. `always`:
a kernel wherever it can run, also in Triton's interpreter on a CPU, which is slow and for tests."""

_told = ["auto"]


def set_kernels(kernels: str) -> None:
    """Tell all operations of the process what to use.

    Raises:
        ValueError: for anything but one of `KERNELS`.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels: expected one of {', '.join(KERNELS)}, got {kernels!r}")
    _told[0] = kernels


@contextlib.contextmanager
def using_kernels(kernels: str) -> Iterator[None]:
    """Tell all operations what to use, for a while."""
    before = _told[0]
    set_kernels(kernels)
    try:
        yield
    finally:
        _told[0] = before


def chosen(*, can_run: bool, is_better: bool) -> bool:
    """Whether an operation uses its kernel.

    Args:
        can_run: whether the kernel takes these tensors and has the derivatives that are needed.
        is_better: whether `auto` prefers it on this device.
    """
    if _told[0] == "auto":
        return can_run and is_better
    return can_run and _told[0] == "always"


def told() -> str:
    """Return what operations are told at present, one of `KERNELS`."""
    return _told[0]
