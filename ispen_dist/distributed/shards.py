"""Parameters in flat shards: the layout of FSDP2 and of DeepSpeed ZeRO-3, as one.

Both cut a parameter's flat entries into equal pieces, one per rank in order, and pad the end:
ZeRO-3 by entries, FSDP2 by rows. So an own part is a flat tensor without padding, shorter or empty
on the last ranks, and collectives send the padded pieces of a whole stage at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ispen_dist import ranges
from ispen_dist.distributed.ranks import Ranks
from ispen_dist.linalg.reduction import Reduction
from ispen_dist.linalg.trees import Tree
from ispen_dist.linalg.vectors import Local, Vectors

# torch 2.13 has new names for the same functions and warns of the old ones.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Cut:
    """How one parameter is cut.

    Attributes:
        shape: of the whole parameter.
        piece: entries per rank, padding included.
    """

    shape: torch.Size
    piece: int

    def size(self, rank: int) -> int:
        """Return the number of entries on a rank, without padding."""
        return min(max(self.shape.numel() - rank * self.piece, 0), self.piece)


class Shards:
    """A `Layout` of flat shards over a process group.

    Args:
        cuts: by parameter name.
        group: process group; default all ranks.
    """

    def __init__(self, cuts: Mapping[str, Cut], group: dist.ProcessGroup | None = None) -> None:
        self.cuts = dict(cuts)
        self._reduction = Ranks(group)
        self._group = group
        self._rank = dist.get_rank(group)
        self._num_ranks = dist.get_world_size(group)

    @property
    def reduction(self) -> Reduction:
        """Sums over all ranks."""
        return self._reduction

    def draw_seed(self, seed: int) -> int:
        """Return another seed on every rank."""
        return seed * self._num_ranks + self._rank

    def of(self, prefix: str) -> "Shards":
        """Return the layout of a submodule, whose names lack the prefix."""
        cuts = {n.removeprefix(prefix): c for n, c in self.cuts.items() if n.startswith(prefix)}
        return Shards(cuts, self._group)

    def gather(self, trees: Sequence[Tree]) -> Callable[[], list[Tree]]:
        """Collect whole tensors in one asynchronous all-gather, see `Layout.gather`."""
        parts = [(key, part) for tree in trees for key, part in tree.items()]
        if not parts:
            return lambda: list(trees)
        own = torch.cat([self._padded(key, part) for key, part in parts])
        pieces = own.new_empty(self._num_ranks, own.numel())
        work = all_gather(pieces.view(-1), own, group=self._group, async_op=True)
        # What was gathered lives no longer than the caller keeps it, so the closure lets go.
        waiting = [(work, own, pieces)]

        def collect() -> list[Tree]:
            work, _, pieces = waiting.pop()
            with ranges.named("all-gather"):
                work.wait()
            columns = iter(pieces.split([self.cuts[key].piece for key, _ in parts], dim=1))
            return [{key: self._join(key, next(columns)) for key in tree} for tree in trees]

        return collect

    def reduce(self, whole: Tree) -> Tree:
        """Add whole tensors over ranks into own parts, in one reduce-scatter."""
        cuts = {key: self.cuts[key] for key in whole}
        width = sum(cut.piece for cut in cuts.values())
        first = next(iter(whole.values()))
        rows = first.new_zeros(self._num_ranks, width)
        begin = 0
        for key, cut in cuts.items():
            self._spread(whole[key].flatten(), cut.piece, rows[:, begin : begin + cut.piece])
            begin += cut.piece
        own = first.new_empty(width)
        with ranges.named("reduce-scatter"):
            reduce_scatter(own, rows.view(-1), group=self._group)
        parts = own.split([cut.piece for cut in cuts.values()])
        return {
            key: part[: cut.size(self._rank)].clone()
            for (key, cut), part in zip(cuts.items(), parts, strict=True)
        }

    def own(self, whole: Tree) -> Tree:
        """Cut this rank's parts out of whole tensors; raises ValueError for other shapes."""
        return {key: self._own(key, value) for key, value in whole.items()}

    def vectors(self, local: Local | None = None) -> Vectors:
        """Return arithmetic whose inner products are summed in one all-reduce."""
        return Vectors(lambda products: self._reduction.sum([products])[0], local)

    def _own(self, key: str, value: Tensor) -> Tensor:
        cut = self.cuts[key]
        if value.shape != cut.shape:
            raise ValueError(
                f"parameter {key}: expected shape {tuple(cut.shape)}, found {tuple(value.shape)}; "
                "resume with the configuration that was saved"
            )
        begin = self._rank * cut.piece
        return value.flatten()[begin : begin + cut.size(self._rank)].clone()

    def _padded(self, key: str, part: Tensor) -> Tensor:
        missing = self.cuts[key].piece - part.numel()
        return torch.cat([part.detach(), part.new_zeros(missing)]) if missing else part.detach()

    def _join(self, key: str, pieces: Tensor) -> Tensor:
        shape = self.cuts[key].shape
        return pieces.reshape(-1)[: shape.numel()].view(shape)

    @staticmethod
    def _spread(flat: Tensor, piece: int, rows: Tensor) -> None:
        """Write a flat tensor into rows of one piece each; rows beyond its end stay zero."""
        full = flat.numel() // piece
        rows[:full] = flat[: full * piece].view(full, piece)
        rest = flat.numel() - full * piece
        if rest:
            rows[full, :rest] = flat[full * piece :]
