"""How a structure is predicted from the networks."""

from dataclasses import dataclass, field
from typing import Literal

from ispen_dist.config.checks import ANY, check, check_ranges

THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20))
"""Decision thresholds of label sets that are tried on dev."""

TEMPERATURES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 2.5, 3.0)
"""Temperatures of the decoder `expected_f1` that are tried on dev."""

EMPTY_WEIGHTS = (1.0, 0.3, 0.1, 0.0)
"""Weights of the empty set in the decoder `expected_f1` that are tried on dev."""

CHOICES = {
    "threshold": THRESHOLDS,
    "temperature": TEMPERATURES,
    "empty_weight": EMPTY_WEIGHTS,
}
"""What is tuned on dev, by the name of the setting, and the values that are tried."""

UNTUNED = {"threshold": 0.5, "temperature": 1.0, "empty_weight": 1.0}
"""The same where nothing was tuned."""


@dataclass(frozen=True)
class InferenceConfig:
    """How a structure is predicted: by the inference network, the energy, or both."""

    name: Literal["network", "mean_field", "gradient_descent", "viterbi"] = "network"
    """One forward pass of the inference network; mean field of that and the energy; gradient
    descent on the energy of the relaxed structure; or the exact minimum of a linear_chain. With the
    last two the inference network is a by-stander: it takes no step after the warm-up."""
    cost_augmented: bool = False
    """In the outer losses ssvm and ssvm_plus, the structure that minimises E - margin_scale * cost.
    By gradient descent: the same steps on that. By the network: a second head of its own, trained
    on that beside the one that predicts."""
    unrolled: bool = False
    """Differentiate the outer loss through the steps of gradient descent; otherwise the structure
    they reach is a constant."""
    steps: int = 20
    """Steps of mean field or of gradient descent."""
    energy_weight: float = 1.0
    """Weight of the energy in mean field, to 1 for the log probabilities of the network. The outer
    loss nce learns an energy for which it is 1."""
    learning_rate: float = 1.0
    """Size of a step on the logits of the structure."""
    momentum: float = 0.0
    """Share of the last step that is added to the next."""
    start: Literal["zeros", "potentials"] = "zeros"
    """Logits before the first step: zeros, or the local potentials of the energy."""
    decoder: Literal["threshold", "expected_f1"] = "threshold"
    """Label sets: predict labels above the threshold, or the set of largest expected example-F1 if
    labels are independent. Decides which metric selects the networks, and what is written;
    evaluations have the figures of both."""
    threshold: float = 0.0
    """Label sets: the decision threshold besides 0.5, a multiple of 0.05. 0 tunes it on dev."""
    temperature: float = 0.0
    """Label sets: what logits are divided by for the decoder expected_f1. 0 tunes it on dev."""
    empty_weight: float = -1.0
    """Label sets: by what the decoder expected_f1 multiplies the probability that an example has no
    label: 1, 0.3, 0.1, or 0, with which every example gets one. -1 tunes it on dev."""
    view_shifts: list[int] = field(default_factory=lambda: [0])
    """Segmentation: average the predicted mask over the image moved by each of these numbers of
    pixels down and by each to the right, -2, 0 and 2 for nine views. 0 is one of them."""
    view_mirrored: bool = False
    """Segmentation: average over its mirror image, moved in the same ways, besides."""

    def __post_init__(self) -> None:
        check_ranges(
            "inference",
            self,
            steps=(1, ANY),
            energy_weight=(0.0, ANY),
            learning_rate=(0.0, ANY),
            momentum=(0.0, 0.999),
        )
        for name, values in CHOICES.items():
            value, tuned = getattr(self, name), getattr(type(self), name)
            expected = f"{tuned:g}, or one of {', '.join(map(str, values))}"
            check(value in (tuned, *values), f"inference.{name}", expected, value)
        check(
            not self.unrolled or self.name == "gradient_descent",
            "inference.unrolled",
            f"false for inference.name={self.name}",
            self.unrolled,
            "only the steps of gradient_descent can be unrolled",
        )
        check(
            not self.cost_augmented or self.name != "viterbi",
            "inference.cost_augmented",
            "false for inference.name=viterbi",
            self.cost_augmented,
            "use gradient_descent",
        )
        check(
            0 in self.view_shifts and len(set(self.view_shifts)) == len(self.view_shifts),
            "inference.view_shifts",
            "different whole numbers, one of them 0",
            self.view_shifts,
            "every pixel has to be in some view",
        )

    @property
    def choices(self) -> dict[str, float]:
        """What is named here of `CHOICES`, and so is not tuned on dev."""
        named = {name: getattr(self, name) for name in CHOICES}
        return {name: value for name, value in named.items() if value in CHOICES[name]}

    @property
    def averages_views(self) -> bool:
        """Whether the predicted mask is that of more than the image as it is."""
        return self.view_mirrored or len(self.view_shifts) > 1

    @property
    def by_network(self) -> bool:
        """Whether the inference network predicts, alone or with the energy."""
        return self.name in ("network", "mean_field")

    @property
    def num_heads(self) -> int:
        """Structures that the inference network puts out: one, or a cost-augmented one besides."""
        return 2 if self.by_network and self.cost_augmented else 1
