"""The two problems, inner and outer, and their optimizers."""

from dataclasses import dataclass, field
from typing import Literal

from ispen_dist.config.checks import ANY, check_ranges

WITHOUT_THETA = ("cd", "nce", "ranking", "regression", "crf")
"""Outer losses in which the structures are samples or gold: theta is a constant there."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule: linear warm-up, then cosine decay."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    final_fraction: float = 1.0
    """Learning rate at the end as a share of the peak; 1 keeps it constant."""
    clip_norm: float = 5.0
    """Limit on the gradient's norm; 0 switches clipping off."""
    pretrained_factor: float = 1.0
    """Learning rate of a pretrained encoder's layers, as a multiple of that of the others: new
    layers want larger steps than those that have learned before."""

    def check(self, section: str) -> None:
        """Check the settings; `section` is the name they have in messages."""
        check_ranges(
            section,
            self,
            learning_rate=(0.0, ANY),
            weight_decay=(0.0, ANY),
            warmup_steps=(0, ANY),
            final_fraction=(0.0, 1.0),
            clip_norm=(0.0, ANY),
            pretrained_factor=(1e-30, ANY),
        )


@dataclass(frozen=True)
class InnerConfig:
    """The inner problem: the inference network on a fixed loss and lambda E."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Of theta."""
    batch_size: int = 32
    """Examples in a global batch, over all ranks."""
    steps: int = 10
    """Inner steps per outer step."""
    energy_weight: float = 0.1
    """lambda, the weight of the energy in the inner loss."""
    fixed: Literal["mle", "mle_task"] = "mle"
    """What is not learned of the inner loss: L_MLE, or with it the cost of the task on the relaxed
    prediction."""
    task_weight: float = 30.0
    """Weight of that cost with mle_task. L_MLE is a sum over positions, the cost is at most 1."""
    pretrain_learning_rate: float = 1e-3
    """Learning rate at which the local energy is pre-trained on L_MLE in the warm-up rounds; 0
    leaves it at its initial values."""

    def __post_init__(self) -> None:
        self.optimizer.check("inner.optimizer")
        check_ranges(
            "inner",
            self,
            batch_size=(1, ANY),
            steps=(1, ANY),
            energy_weight=(0.0, ANY),
            task_weight=(0.0, ANY),
            pretrain_learning_rate=(0.0, ANY),
        )

    @property
    def fixed_task_weight(self) -> float:
        """Weight of the task's cost in the inner loss."""
        return self.task_weight if self.fixed == "mle_task" else 0.0


@dataclass(frozen=True)
class OuterConfig:
    """The outer problem: the energy, on the loss of the network trained on it."""

    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1e-4))
    """Of phi. Keep it 10 to 100 times slower than the inner one."""
    batch_size: int = 128
    """Examples in a global batch of the outer loss, and of the inner loss in the solve."""
    steps: int = 1
    """Outer steps per round."""
    objective: Literal[
        "ssvm",
        "ssvm_plus",
        "dvn",
        "dvn_gold",
        "cd",
        "nce",
        "ranking",
        "regression",
        "crf",
        "mle",
        "task",
    ] = "task"
    """Outer loss, see `objectives`."""
    task_weight: float = 0.0
    """Weight of the task cost added to the objective; without effect under train.method=explicit
    where a network predicts, as its cost reads no energy."""
    entity_weight: float = 1.0
    """Tagging with data.spans=bio: weight of a token of an entity in every cost, to that of one
    outside. With 1 the cost is the share of wrong tags, which says little of the F1 of entities."""
    margin_scale: float = 1.0
    """Scale of the cost inside ssvm, ssvm_plus and cd, and in cost-augmented inference."""
    score_scale: float = 1.0
    """Scale of the energy inside dvn, dvn_gold and regression, whose predicted score is
    sigmoid(-score_scale * E); 1 in the papers. Potentials learned by likelihood want less:
    an energy of -5 is a prediction they are sure of, while its score, such as an F1, may be 0.4."""
    num_samples: int = 16
    """Samples per example in cd, nce, ranking and regression."""
    dropout: bool = True
    """Evaluate the outer loss under the dropout masks of training, frozen during the solve. On
    training data the network without dropout is close to perfect and its cost says little."""
    held_out_fraction: float = 0.0
    """Share of train kept from the inner problem for the outer loss; 0 uses the training data."""

    def __post_init__(self) -> None:
        self.optimizer.check("outer.optimizer")
        check_ranges(
            "outer",
            self,
            batch_size=(1, ANY),
            steps=(1, ANY),
            task_weight=(0.0, ANY),
            entity_weight=(1.0, ANY),
            margin_scale=(0.0, ANY),
            score_scale=(1e-30, ANY),
            num_samples=(1, ANY),
            held_out_fraction=(0.0, 0.9),
        )
