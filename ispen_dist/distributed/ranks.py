"""Sums over replicas: each rank holds all parameters and its own examples."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ispen_dist import ranges


class Ranks:
    """A `Reduction` over a process group; one process where none is initialised.

    Tensors of one call are packed by type into one flat all-reduce each. The backend gives every
    rank the same bits, so replicated solver vectors stay identical and all ranks decide alike.

    Args:
        group: process group; default all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.num_ranks = dist.get_world_size(group) if dist.is_initialized() else 1

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the sums over all ranks. Every rank calls with the same shapes and types."""
        result = list(tensors)
        if self.num_ranks == 1:
            return result
        for dtype in dict.fromkeys(t.dtype for t in result):
            places = [i for i, t in enumerate(result) if t.dtype == dtype]
            flat = torch.cat([result[i].detach().flatten() for i in places])
            with ranges.named("all-reduce"):
                dist.all_reduce(flat, group=self._group)
            parts = flat.split([result[i].numel() for i in places])
            for i, part in zip(places, parts, strict=True):
                result[i] = part.view(result[i].shape)
        return result
