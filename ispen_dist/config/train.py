"""The length of a run, and what happens on the way."""

from dataclasses import dataclass
from typing import Literal

from ispen_dist.config.checks import ANY, check_ranges


@dataclass(frozen=True)
class TrainConfig:
    """The length of the run, its seed, and what happens on the way.

    A round is `inner.steps` inner steps and `outer.steps` outer steps; see `order`. Warm-up rounds
    have no outer step.
    """

    method: Literal["implicit", "explicit", "mle"] = "implicit"
    """Energy learned with the implicit gradient, with its explicit part only, or not at all
    (the inference network on L_MLE alone, for the same number of inner steps)."""
    warmup_rounds: int = 30
    """Rounds on L_MLE alone before the first outer step; the local energy is pre-trained on the
    same batches."""
    max_outer_steps: int = 100
    """Rounds in which the energy is learned, after the warm-up; each has `outer.steps`."""
    order: Literal["alternate", "energy_first"] = "alternate"
    """Inner and outer steps in every round, or all outer steps first, with the network as the
    warm-up left it, and then as many rounds of inner steps on the energy, which stands still."""
    fine_tune: float = 0.0
    """Rounds of inner steps alone at the end, on the learned energy, as a share of
    max_outer_steps."""
    seed: int = 0
    """Seed of initial values, data order, dropout and samples."""
    eval_every: int = 10
    """Rounds between evaluations on dev; the last round is always evaluated."""
    average_decay: float = 0.0
    """Share that a moving average of both networks keeps in a round, as 0.9. The average is what is
    evaluated, kept as the best and written in the end; training does not see it. 0 takes the
    networks themselves."""
    patience: int = 0
    """Evaluations without a better dev metric before the run stops; 0 never stops early."""
    checkpoint_every: int = 50
    """Rounds between checkpoints; the last round always leaves one."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = True
    """Also keep the first checkpoint that holds the networks that did best on dev; best.json beside
    it names it."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint or a record cannot be written: stop the run with exit code 5, so that no
    time goes into what may never be kept, or warn, continue and try again at the next save. A run
    that ends with something unwritten has exit code 5 as well. The last good checkpoint stays."""
    read_test: bool = True
    """Evaluate on test at the end. A run that only helps to choose settings leaves test alone."""
    log_every: int = 1
    """Rounds between rows of metrics.jsonl."""
    on_not_finite: Literal["skip", "back_off", "stop"] = "skip"
    """On NaN or infinity in the loss or gradient of a step. The step is always left out, on all
    ranks; then the run goes on, goes on with half the learning rates (doubled again after 10 rounds
    without), or stops with exit code 3."""
    max_not_finite: int = 10
    """Steps left out in a row, of one kind (inner, pretrain, outer), after which the run stops with
    exit code 3 in any case."""
    hang_timeout: float = 1800.0
    """Seconds without a finished step, batch of an evaluation, compiled function or save, after
    which a process writes the stacks of its threads and ends with exit code 4; whatever is done for
    the first time has 600 at least. 0 waits for ever."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of parameters and solver vectors."""
    num_threads: int = 0
    """CPU threads per process; 0 leaves PyTorch's choice."""

    def __post_init__(self) -> None:
        check_ranges(
            "train",
            self,
            warmup_rounds=(0, ANY),
            max_outer_steps=(0, ANY),
            fine_tune=(0.0, ANY),
            eval_every=(1, ANY),
            average_decay=(0.0, 0.9999),
            patience=(0, ANY),
            checkpoint_every=(1, ANY),
            keep_checkpoints=(1, ANY),
            log_every=(1, ANY),
            max_not_finite=(1, ANY),
            hang_timeout=(0.0, ANY),
            num_threads=(0, ANY),
            seed=(0, 2**32 - 1),
        )
