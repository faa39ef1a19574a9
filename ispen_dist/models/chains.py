"""Exact inference in linear chains, by the library pytorch-crf.

The scores are `emissions[b, t, k] + W[j, k]` for tag k after tag j, without scores of start and
end: a chain that is the negative of `LinearChainEnergy`. Rows without any token, fillers, count as
one token, and their results mean nothing.

Shapes: B batch, T tokens, K tags.
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torchcrf import CRF


class _Chain(nn.Module):
    """The library's chain as a function of its scores; holds no memory and draws nothing."""

    def __init__(self, num_tags: int) -> None:
        super().__init__()
        with torch.device("meta"):
            self.crf = CRF(num_tags, batch_first=True)

    def forward(self, emissions: Tensor, mask: Tensor, tags: Tensor | None) -> Tensor:
        """Return the log likelihood of tags, (B,), or without any the best ones, (B, T)."""
        if tags is not None:
            return self.crf(emissions, tags, mask, reduction="none")
        paths = self.crf.decode(emissions, mask)
        width = mask.shape[1]
        rows = [path + [0] * (width - len(path)) for path in paths]
        return torch.tensor(rows, device=emissions.device)


def _run(emissions: Tensor, W: Tensor, mask: Tensor, tags: Tensor | None = None) -> Tensor:
    zeros = W.new_zeros(len(W))
    scores = {"transitions": W, "start_transitions": zeros, "end_transitions": zeros}
    is_first = torch.arange(mask.shape[1], device=mask.device) == 0
    own = {f"crf.{name}": value for name, value in scores.items()}
    return functional_call(_Chain(len(W)), own, (emissions, mask | is_first, tags))


def chain_nll(emissions: Tensor, W: Tensor, mask: Tensor, y: Tensor) -> Tensor:
    """Return the negative log likelihood of one-hot tags y (B, T, K) given the chain: (B,)."""
    return -_run(emissions, W, mask, y.argmax(-1))


@torch.no_grad()
def best_chain(emissions: Tensor, W: Tensor, mask: Tensor) -> Tensor:
    """Return the tags of highest score, by the Viterbi algorithm, as one-hot (B, T, K)."""
    one_hot = F.one_hot(_run(emissions, W, mask), len(W)).to(emissions.dtype)
    return one_hot * mask.unsqueeze(-1)
