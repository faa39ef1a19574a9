"""Names what was not finite in a batch, after the fact.

A step that is not finite is left out on the device, from sums over ranks, which say nothing of the
rank or the example. So the batch is looked at again, part by part in the order of computation, with
the present parameters and without dropout. All ranks do so together: parameters may be sharded.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ispen_dist.data.batch import Batch
from ispen_dist.engine import Engines
from ispen_dist.inference import outer_view, potentials_and_head
from ispen_dist.objectives import OUTER_OBJECTIVES, View, inner_terms
from ispen_dist.players import Players

MAX_NAMED = 8
"""Examples that are named; of the others the number is given."""

NOT_SEEN = "a gradient inside a network; at the present parameters the batch itself is finite"


class Diagnosis:
    """Looks again at batches whose step was left out; every rank calls it alike.

    Args:
        players: both networks.
        engines: where their parameters are.
        gather_texts: returns the texts of all ranks.
    """

    def __init__(
        self, players: Players, engines: Engines, gather_texts: Callable[[str], list[str]]
    ) -> None:
        self._players, self._engines, self._gather_texts = players, engines, gather_texts

    def inner(self, batch: Batch) -> str:
        """Return what of the inner loss is not finite, on which rank, for which examples."""
        return self._together(self._own(batch, self._players.view, _inner_terms))

    def outer(self, inner_batch: Batch, outer_batch: Batch, generator: torch.Generator) -> str:
        """Return the same of an outer step, whose solve reads both batches."""
        objective = self._players.config.outer.objective

        def terms(view: View) -> Mapping[str, Tensor]:
            return {"outer loss": OUTER_OBJECTIVES[objective].loss(view)}

        own = self._own(outer_batch, partial(outer_view, self._players), terms, generator)
        return self._together(self._own(inner_batch, self._players.view, _inner_terms) or own)

    def _together(self, own: str) -> str:
        texts = self._gather_texts(own)
        return "; ".join(f"rank {r}: {text}" for r, text in enumerate(texts) if text) or NOT_SEEN

    def _own(
        self,
        batch: Batch,
        view: Callable[..., View],
        terms: Callable[[View], Mapping[str, Tensor]],
        generator: torch.Generator | None = None,
    ) -> str:
        """Return the first part of this rank's batch that is not finite, empty if there is none."""
        for name, value in self._parts(batch, view, terms, generator).items():
            bad = ~torch.isfinite(value.detach()).view(len(batch.index), -1).all(1)
            if bad.any():
                return f"{name} of examples {_listed(batch.index[bad].tolist())}"
        return ""

    def _parts(
        self,
        batch: Batch,
        view: Callable[..., View],
        terms: Callable[[View], Mapping[str, Tensor]],
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        parts = {f"data ({n})": x for n, x in batch.tensors().items() if x.is_floating_point()}
        logits = self._engines.inference_net.staged(batch.inputs, keep_states=False).value()
        potentials, head = potentials_and_head(self._engines, batch.inputs)
        leaf = logits.detach().requires_grad_()
        named = terms(view(batch, leaf, potentials, head, generator))
        total = torch.stack([term.sum() for term in named.values()]).sum() + 0.0 * leaf.sum()
        (gradient,) = torch.autograd.grad(total, leaf)
        parts |= {"logits": logits, "local potentials": potentials, **named}
        return parts | {"gradient at the logits": gradient}


def _inner_terms(view: View) -> Mapping[str, Tensor]:
    return dict(zip(("fixed loss", "energy"), inner_terms(view), strict=True))


def _listed(rows: Sequence[int]) -> str:
    named = ", ".join(map(str, rows[:MAX_NAMED]))
    return named if len(rows) <= MAX_NAMED else f"{named} and {len(rows) - MAX_NAMED} others"
