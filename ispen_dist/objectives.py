"""Inner and outer losses, as pure functions that return (sum, count) over a rank's examples.

Low energy is good. `cost` is in [0, 1], 0 for a perfect output. With E the energy, y gold, y_k
samples from the independent distribution P of the inference network and ybar = A_theta(x):

    inner       L_MLE(y, ybar) + w cost(ybar, y) + lambda E(x, ybar)

    ssvm        [ m cost(yhat, y) - E(x, yhat) + E(x, y) ]_+
    ssvm_plus   ssvm + [ E(x, y) - E(x, ybar) ]_+
    dvn         cross-entropy of the true score 1 - cost(ybar, y) against the predicted one,
                s(ybar) = sigmoid(-c E(x, ybar))
    dvn_gold    mean of that and of the same at y, whose score is 1
    cd          -log softmax over {y, y_1..y_S}:  -E(x, y_k) + m cost(y_k, y),   gold first
    nce         -log softmax over {y, y_1..y_S}:  -E(x, y_k) - log P(y_k | x),   gold first
    ranking     -log sigmoid( E(x, y_j) - E(x, y_i) ), mean over pairs with a lower cost of y_i
    regression  ( s(y_k) - 1 + cost(y_k, y) )^2, mean over {y, y_1..y_S}
    crf         -log p(y | x),   p proportional to exp(-E(x, y)), summed exactly
    mle         L_MLE(y, ybar)
    task        cost(ybar, y)

where m is the margin scale, c the score scale, and w is 0 but with `inner.fixed=mle_task`;
`task_weight * cost(ybar, y)` can be added to each outer loss.

Cost-augmented inference. yhat is ybar, unless there is a second structure, F(x), that is inferred
to minimise E - m cost. Then the inner loss has both (Tu, Pang and Gimpel 2020, with their
token-level loss as L_MLE, one weight lambda, and no truncation at zero):

    inner       L_MLE(y, ybar) + w cost(ybar, y) + L_MLE(y, yhat)
                + lambda ( E(x, ybar) + E(x, yhat) - m cost(yhat, y) )

With ssvm this is InfNet (Tu and Gimpel 2018), which departs from the paper in that A is not F
fine-tuned once the energy is learned: it shares all of F but the last layer, learns beside it, and
both are fine-tuned together in the rounds of `train.fine_tune`. With ssvm_plus it is InfNet+.

Paths of the gradient. In ssvm, ssvm_plus, dvn, dvn_gold, mle and the task cost theta enters through
ybar and yhat. In the others the samples and log P are constants: differentiating NCE through its
own noise distribution would push the probability of the gold structure down. They therefore have no
d_theta L, and an implicit part only together with a task weight; `depends_on_theta` says so
beforehand. Where the structure is inferred by gradient descent in place of A_theta there is no
theta at all, see `inference`.

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
        logits: of the predicted structure, (B, ...).
        energy: `(S, B, ...) -> (S, B)`, the energy network at this batch.
        augmented: logits of the cost-augmented structure F(x), where there is one besides.
        gibbs_nll: `() -> -log p(y | x)` of the energy, (B,), where it can be summed exactly.
        generator: draws samples.
        num_samples: S for the objectives that draw.
        margin_scale: m.
        score_scale: c.
        fixed_task_weight: w.
    """

    space: OutputSpace
    inputs: Inputs
    y: Tensor
    weight: Tensor
    logits: Tensor
    energy: Energy
    augmented: Tensor | None = None
    gibbs_nll: Callable[[], Tensor] | None = None
    generator: torch.Generator | None = None
    num_samples: int = 1
    margin_scale: float = 1.0
    score_scale: float = 1.0
    fixed_task_weight: float = 0.0

    @property
    def ybar(self) -> Tensor:
        """The relaxed prediction A_theta(x), differentiable in theta."""
        return self.space.relax(self.logits, self.inputs)

    @property
    def yhat(self) -> Tensor:
        """The relaxed cost-augmented structure, `ybar` where there is no other."""
        logits = self.logits if self.augmented is None else self.augmented
        return self.space.relax(logits, self.inputs)

    def total(self, loss_B: Tensor) -> SumAndCount:
        """Return the sum of a loss over the real examples, and their number."""
        return (loss_B * self.weight).sum(), self.weight.sum()

    def score_logits(self, structures: Tensor) -> Tensor:
        """Return the logits of the predicted scores of structures (S, B, ...): (S, B)."""
        return -self.score_scale * self.energy(structures)

    def samples(self) -> Tensor:
        """Return {y, y_1..y_S}, gold first: constants of shape (1 + S, B, ...)."""
        if self.generator is None:
            raise ValueError(
                "View.generator: expected a torch.Generator, got None; the objective draws samples"
            )
        drawn = self.space.sample(self.logits, self.inputs, self.num_samples, self.generator)
        return torch.cat([self.y.unsqueeze(0), drawn])


def mle(view: View) -> Tensor:
    """Return L_MLE per example, of both structures where there are two: (B,)."""
    likelihood = view.space.nll(view.logits, view.y)
    if view.augmented is None:
        return likelihood
    return likelihood + view.space.nll(view.augmented, view.y)


def fixed(view: View) -> Tensor:
    """Return the inner loss without its learned part, `L_MLE + w cost(ybar, y)`: (B,)."""
    if not view.fixed_task_weight:
        return mle(view)
    return mle(view) + view.fixed_task_weight * task(view)


def inner_terms(view: View) -> tuple[Tensor, Tensor]:
    """Return the terms of the inner loss without and with lambda per example: two tensors (B,)."""
    if view.augmented is None:
        return fixed(view), view.energy(view.ybar.unsqueeze(0))[0]
    yhat = view.yhat
    energy_predicted, energy_augmented = view.energy(torch.stack([view.ybar, yhat]))
    cost = view.margin_scale * view.space.cost(yhat, view.y)
    return fixed(view), energy_predicted + energy_augmented - cost


def inner(view: View, energy_weight: float) -> SumAndCount:
    """Return the inner loss as (sum, count)."""
    constant, energy = inner_terms(view)
    return view.total(constant + energy_weight * energy)


def task(view: View) -> Tensor:
    """Return the task cost of the relaxed output per example: (B,)."""
    return view.space.cost(view.ybar, view.y)


def ssvm(view: View) -> Tensor:
    """Return the margin-rescaled structured hinge per example (Taskar et al. 2004): (B,)."""
    yhat = view.yhat
    energy_augmented, energy_gold = view.energy(torch.stack([yhat, view.y]))
    cost = view.margin_scale * view.space.cost(yhat, view.y)
    return F.relu(cost - energy_augmented + energy_gold)


def ssvm_plus(view: View) -> Tensor:
    """Return the hinge with the perceptron loss of the prediction (Tu et al. 2020): (B,)."""
    energy_predicted, energy_gold = view.energy(torch.stack([view.ybar, view.y]))
    return ssvm(view) + F.relu(energy_gold - energy_predicted)


def dvn(view: View) -> Tensor:
    """Return the deep-value-network loss per example (Gygli et al. 2017): (B,)."""
    return _score_loss(view, view.ybar.unsqueeze(0))


def dvn_gold(view: View) -> Tensor:
    """Return the mean of `dvn` at the prediction and at the gold structure, of score 1: (B,).

    Gygli et al. (2017) train on gold structures too: at its own predictions alone the energy learns
    to expect a low score everywhere, and leads to structures that deserve it.
    """
    return _score_loss(view, torch.stack([view.ybar, view.y]))


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


def ranking(view: View) -> Tensor:
    """Return the pairwise logistic loss of energies ordered by cost (Lee et al. 2022): (B,)."""
    structures = view.samples()
    cost, energy = view.space.cost(structures, view.y), view.energy(structures)
    is_better = (cost.unsqueeze(1) < cost.unsqueeze(0)).to(energy.dtype)
    loss = F.softplus(energy.unsqueeze(1) - energy.unsqueeze(0))
    return (is_better * loss).sum((0, 1)) / is_better.sum((0, 1)).clamp(min=1.0)


def regression(view: View) -> Tensor:
    """Return the squared error of the predicted score (Lee et al. 2022): (B,)."""
    structures = view.samples()
    score = 1.0 - view.space.cost(structures, view.y)
    return (torch.sigmoid(view.score_logits(structures)) - score).square().mean(0)


def crf(view: View) -> Tensor:
    """Return the exact negative log likelihood of the energy (Lafferty et al. 2001): (B,)."""
    assert view.gibbs_nll is not None, "Config refuses it for an energy without an exact sum"
    return view.gibbs_nll()


def _score_loss(view: View, structures: Tensor) -> Tensor:
    """Cross-entropy of the true score against the predicted one, mean over (S, B, ...): (B,)."""
    score = 1.0 - view.space.cost(structures, view.y)
    logits = view.score_logits(structures)
    loss = F.binary_cross_entropy_with_logits(logits, score, reduction="none")
    return loss.mean(0)


def _gold_among(logits_SB: Tensor) -> Tensor:
    return -torch.log_softmax(logits_SB, dim=0)[0]


@dataclass(frozen=True)
class OuterObjective:
    """A row of the registry.

    Attributes:
        loss: per-example loss of a view, (B,).
        depends_on_theta: whether theta enters the loss through the relaxed output.
        reads_structure: whether the loss needs a predicted structure, or samples around it.
    """

    loss: Callable[[View], Tensor]
    depends_on_theta: bool
    reads_structure: bool = True


OUTER_OBJECTIVES: dict[str, OuterObjective] = {
    "ssvm": OuterObjective(ssvm, True),
    "ssvm_plus": OuterObjective(ssvm_plus, True),
    "dvn": OuterObjective(dvn, True),
    "dvn_gold": OuterObjective(dvn_gold, True),
    "cd": OuterObjective(contrastive_divergence, False),
    "nce": OuterObjective(nce, False),
    "ranking": OuterObjective(ranking, False),
    "regression": OuterObjective(regression, False),
    "crf": OuterObjective(crf, False, reads_structure=False),
    "mle": OuterObjective(mle, True),
    "task": OuterObjective(task, True),
}


def outer(view: View, objective: str, task_weight: float = 0.0) -> SumAndCount:
    """Return the outer loss `objective + task_weight * cost(ybar, y)` as (sum, count)."""
    loss = OUTER_OBJECTIVES[objective].loss(view)
    if task_weight:
        loss = loss + task_weight * task(view)
    return view.total(loss)
