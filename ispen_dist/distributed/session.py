"""One process of a run: its rank, its device, and how it stays in step with the others."""

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn

from ispen_dist.distributed.ranks import Ranks


class Session:
    """The processes of a run, as started by `accelerate launch`, torchrun or plain python.

    Uses the GPUs with nccl where there are any, otherwise the CPU with gloo.

    Attributes:
        rank: this process, 0 to num_ranks - 1.
        num_ranks: number of processes.
        device: where this process computes.
        reduction: sums over the processes.
    """

    def __init__(self) -> None:
        self._state = PartialState(cpu=not torch.cuda.is_available())
        self.rank = self._state.process_index
        self.num_ranks = self._state.num_processes
        self.device = self._state.device
        self.reduction = Ranks()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        self._state.wait_for_everyone()

    def replicate(self, *modules: nn.Module) -> None:
        """Copy the parameters of rank 0 to every rank."""
        if self.num_ranks > 1:
            for module in modules:
                for tensor in module.state_dict().values():
                    dist.broadcast(tensor, src=0)

    def agree(self, number: int) -> int:
        """Return the number that rank 0 has, on every rank."""
        tensor = torch.tensor(number, dtype=torch.int64, device=self.device)
        if self.num_ranks > 1:
            dist.broadcast(tensor, src=0)
        return int(tensor.item())

    def close(self) -> None:
        """Leave the process group, so that no process is left waiting."""
        if dist.is_initialized():
            dist.destroy_process_group()
