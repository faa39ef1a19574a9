"""The passes of a solver over its vectors: which implementation."""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from ispen_dist.linalg.vectors import Local, Parts, PlainLocal
from ispen_dist.ops.choice import chosen


def local_vectors(device: torch.device) -> Local:
    """Return the arithmetic of own parts for a device: on a GPU `ispen_kernels.solver`.

    On a CPU plain PyTorch, tensor by tensor in the cache, takes 1.3 (1 million parameters) and 1.1
    (11 million) times as long as loops fused by torch.compile, which would be compiled per tree.
    """
    on_gpu = device.type == "cuda"
    has_triton = importlib.util.find_spec("triton") is not None
    if chosen(can_run=has_triton and (on_gpu or _interpreted()), is_better=on_gpu):
        return KernelLocal()
    return PlainLocal()


def _interpreted() -> bool:
    from ispen_kernels.attention import INTERPRETED

    return INTERPRETED


class KernelLocal:
    """The passes as Triton kernels, see `Local`."""

    def dots(self, pairs: Sequence[tuple[Parts, Parts]]) -> Tensor:
        """See `Local.dots`."""
        from ispen_kernels import solver

        return solver.dots(pairs)

    def curvature(self, p: Parts, Hp: Parts, shift: Tensor) -> Tensor:
        """See `Local.curvature`."""
        pHp, pp = self.dots([(p, Hp), (p, p)]).unbind()
        return pHp + shift * pp

    def cg_update(
        self, q: Parts, r: Parts, p: Parts, Hp: Parts, alpha: Tensor, shift: Tensor
    ) -> Tensor:
        """See `Local.cg_update`."""
        from ispen_kernels import solver

        return solver.cg_update_(q, r, p, Hp, alpha, shift)

    def direction_update(self, p: Parts, r: Parts, beta: Tensor) -> None:
        """See `Local.direction_update`."""
        from ispen_kernels import solver

        solver.direction_update_(p, r, beta)

    def single_reduction_update(
        self, q: Parts, r: Parts, p: Parts, s: Parts, Ar: Parts, alpha: Tensor, beta: Tensor
    ) -> None:
        """See `Local.single_reduction_update`."""
        from ispen_kernels import solver

        solver.single_reduction_update_(q, r, p, s, Ar, alpha, beta)
