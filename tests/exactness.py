"""What the tests of kernels share: seeded numbers, and how far a kernel may be from float64."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape, dtype=torch.float64, seed=0):
    """Return the same numbers in every type, up to rounding."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def assert_as_exact(got, eager, exact, floor, least_size=0.0):
    """The error against float64 is at most twice that of eager PyTorch, plus `floor` eps.

    One eps is in units of the largest number of the result, or of `least_size` if that is larger.
    """
    assert got.dtype == eager.dtype
    assert got.shape == exact.shape
    if got.numel():
        error, allowed = ((a.double() - exact).abs().max().item() for a in (got, eager))
        size = max(least_size, exact.abs().max().item())
        slack = floor * torch.finfo(got.dtype).eps * size
        assert error <= 2.0 * allowed + slack, (error, allowed, slack)
