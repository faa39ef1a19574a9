"""How exact a kernel and its reference are, against the reference in float64."""

import math
import sys
from collections.abc import Sequence

import torch
from kernel_cases import Case, Results
from torch import Tensor


def copies(inputs: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return copies, as some functions change their inputs."""
    return [x.to(dtype or x.dtype, copy=True) for x in inputs]


def error_of(results: Results, exact: Results) -> float:
    """Return the largest relative error of a result, in the Euclidean norm; infinite if not finite.

    A norm of zero counts as one.
    """
    worst = 0.0
    for got, truth in zip(results, exact, strict=True):
        size = truth.norm().item() or 1.0
        error = (got.double() - truth).norm().item() / size
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def check(case: Case, device: torch.device) -> dict[str, float]:
    """Return the errors of kernel and reference against float64."""
    inputs = case.inputs(device, check=True)
    exact = case.reference(*copies(inputs, torch.float64))
    return {
        "ispen_dist": error_of(case.prepare(*copies(inputs))(), exact),
        "reference": error_of(case.reference(*copies(inputs)), exact),
    }


def check_all(cases: list[Case], device: torch.device) -> list[dict[str, float]]:
    """Check every case; refuse to go on where a kernel is worse than it may be.

    A result is rounded by at most half an eps, and so may be that of a reference that is exact
    otherwise: the floor is twice that.
    """
    errors = [check(case, device) for case in cases]
    wrong = [
        f"{case.what} {case.problem}: error {e['ispen_dist']:.1e}, eager {e['reference']:.1e}"
        for case, e in zip(cases, errors, strict=True)
        if not e["ispen_dist"] <= 2 * e["reference"] + torch.finfo(case.dtype).eps
    ]
    if wrong:
        sys.exit("error: expected errors of at most twice eager's, got " + "; ".join(wrong))
    return errors
