"""Inner and outer losses, as pure functions that return (sum, count) over a rank's examples.

Low energy is good. `cost` is in [0, 1], 0 for a perfect output. With E the energy, y gold, y_k
samples from the independent distribution P of the inference network and ybar = A_theta(x):

    inner  L_MLE(y, ybar) + lambda E(x, ybar)

    ssvm   [ m cost(ybar, y) - E(x, ybar) + E(x, y) ]_+
    dvn    cross-entropy of the true score 1 - cost(ybar, y) against the predicted one,
           sigmoid(-E(x, ybar))
    cd     -log softmax over {y, y_1..y_S}:  -E(x, y_k) + m cost(y_k, y),   gold first
    nce    -log softmax over {y, y_1..y_S}:  -E(x, y_k) - log P(y_k | x),   gold first
    task   cost(ybar, y)

where m is the margin scale, and `task_weight * cost(ybar, y)` can be added to each.

Paths of the gradient. In ssvm, dvn and the task cost theta enters through ybar. In cd and nce the
samples and log P are constants: differentiating NCE through its own noise distribution would push
the probability of the gold structure down. cd and nce alone therefore have no d_theta L, and an
implicit part only together with a task weight; `depends_on_theta` says so beforehand.

To add an objective: write a function of a `View`, and add a row to `OUTER_OBJECTIVES`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ispen_dist.models.output_spaces import Inputs, OutputSpace

SumAndCount = tuple[Tensor, Tensor]
Energy = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class View:
    """One rank's batch as the objectives see it.

    Attributes:
        space: the kind of structure.
        inputs: network inputs of the batch.
        y: encoded gold structures, (B, ...).
        weight: (B,), 1 for examples and 0 for fillers.
        logits: output of the inference network, (B, ...).
        energy: `(S, B, ...) -> (S, B)`, the energy network at this batch.
        generator: draws samples.
        num_samples: S for cd and nce.
        margin_scale: m.
    """

    space: OutputSpace
    inputs: Inputs
    y: Tensor
    weight: Tensor
    logits: Tensor
    energy: Energy
    generator: torch.Generator | None = None
    num_samples: int = 1
    margin_scale: float = 1.0

    @property
    def ybar(self) -> Tensor:
        """The relaxed output A_theta(x), differentiable in theta."""
        return self.space.relax(self.logits, self.inputs)

    def total(self, loss_B: Tensor) -> SumAndCount:
        """Return the sum of a loss over the real examples, and their number."""
        return (loss_B * self.weight).sum(), self.weight.sum()

    def samples(self) -> Tensor:
        """Return {y, y_1..y_S}, gold first: constants of shape (1 + S, B, ...)."""
        if self.generator is None:
            raise ValueError(
                "View.generator: expected a torch.Generator, got None; cd and nce draw samples"
            )
        drawn = self.space.sample(self.logits, self.inputs, self.num_samples, self.generator)
        return torch.cat([self.y.unsqueeze(0), drawn])


def mle(view: View) -> Tensor:
    """Return L_MLE per example: (B,)."""
    return view.space.nll(view.logits, view.y)


def inner_terms(view: View) -> tuple[Tensor, Tensor]:
    """Return L_MLE and E(x, ybar) per example: two tensors (B,)."""
    return mle(view), view.energy(view.ybar.unsqueeze(0))[0]


def inner(view: View, energy_weight: float) -> SumAndCount:
    """Return the inner loss `L_MLE + lambda E(x, A_theta(x))` as (sum, count)."""
    likelihood, energy = inner_terms(view)
    return view.total(likelihood + energy_weight * energy)


def task(view: View) -> Tensor:
    """Return the task cost of the relaxed output per example: (B,)."""
    return view.space.cost(view.ybar, view.y)


def ssvm(view: View) -> Tensor:
    """Return the margin-rescaled structured hinge per example (Taskar et al. 2004): (B,)."""
    energy_predicted, energy_gold = view.energy(torch.stack([view.ybar, view.y]))
    return F.relu(view.margin_scale * task(view) - energy_predicted + energy_gold)


def dvn(view: View) -> Tensor:
    """Return the deep-value-network loss per example (Gygli et al. 2017): (B,)."""
    negative_energy = -view.energy(view.ybar.unsqueeze(0))[0]
    score = 1.0 - task(view)
    return F.binary_cross_entropy_with_logits(negative_energy, score, reduction="none")


def contrastive_divergence(view: View) -> Tensor:
    """Return the margin-rescaled contrastive loss over samples per example: (B,)."""
    structures = view.samples()
    cost = view.space.cost(structures, view.y)
    return _gold_among(view.margin_scale * cost - view.energy(structures))


def nce(view: View) -> Tensor:
    """Return the ranking noise-contrastive loss per example (Ma and Collins 2018): (B,)."""
    structures = view.samples()
    log_noise = -view.space.nll(view.logits.detach(), structures)
    return _gold_among(-view.energy(structures) - log_noise)


def _gold_among(logits_SB: Tensor) -> Tensor:
    return -torch.log_softmax(logits_SB, dim=0)[0]


@dataclass(frozen=True)
class OuterObjective:
    """A row of the registry.

    Attributes:
        loss: per-example loss of a view, (B,).
        depends_on_theta: whether theta enters the loss through the relaxed output.
    """

    loss: Callable[[View], Tensor]
    depends_on_theta: bool


OUTER_OBJECTIVES: dict[str, OuterObjective] = {
    "ssvm": OuterObjective(ssvm, True),
    "dvn": OuterObjective(dvn, True),
    "cd": OuterObjective(contrastive_divergence, False),
    "nce": OuterObjective(nce, False),
    "task": OuterObjective(task, True),
}


def outer(view: View, objective: str, task_weight: float = 0.0) -> SumAndCount:
    """Return the outer loss `objective + task_weight * cost(ybar, y)` as (sum, count)."""
    loss = OUTER_OBJECTIVES[objective].loss(view)
    if task_weight:
        loss = loss + task_weight * task(view)
    return view.total(loss)
