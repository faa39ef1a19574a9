"""Everything that knows of several processes: the only place that imports torch.distributed."""

from ispen_dist.distributed.ranks import Ranks
from ispen_dist.distributed.session import Session

__all__ = ["Ranks", "Session"]
