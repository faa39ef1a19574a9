"""Which steps each round of a run takes.

    warm-up    inner steps on L_MLE alone; the local energy is pre-trained      warmup_rounds
    learning   inner and outer steps, or the outer ones alone: with             max_outer_steps
               order=energy_first, and where no inference network predicts
    final      inner steps alone; the energy stands still                       see `num_final`

With train.method=mle every round has the inner steps, on L_MLE, and nothing else.
"""

from dataclasses import dataclass

from ispen_dist.config import Config


@dataclass(frozen=True)
class Schedule:
    """The rounds of a run, by their number from 0."""

    config: Config

    @property
    def num_final(self) -> int:
        """Rounds after the energy is learned: what the order put off, and the fine-tuning."""
        train = self.config.train
        put_off = train.max_outer_steps if train.order == "energy_first" else 0
        return put_off + round(train.fine_tune * train.max_outer_steps)

    @property
    def num_learning_end(self) -> int:
        """Rounds until the energy is learned, warm-up included."""
        return self.config.train.warmup_rounds + self.config.train.max_outer_steps

    @property
    def num_rounds(self) -> int:
        """Rounds of the whole run."""
        return self.num_learning_end + self.num_final

    @property
    def select_after(self) -> int:
        """Rounds after which evaluations select: from the last part in which networks learn."""
        return self.num_learning_end if self.num_final else self.config.train.warmup_rounds

    @property
    def learns_energy(self) -> bool:
        """Whether the run has outer steps."""
        return self.config.train.method != "mle"

    @property
    def _skips_inner(self) -> bool:
        """Whether the inference network rests while the energy is learned."""
        rests = self.config.train.order == "energy_first" or not self.config.inference.by_network
        return self.learns_energy and rests

    def is_warm_up(self, number: int) -> bool:
        """Whether a round is one of the warm-up."""
        return number < self.config.train.warmup_rounds

    def has_outer(self, number: int) -> bool:
        """Whether a round has outer steps."""
        learning = range(self.config.train.warmup_rounds, self.num_learning_end)
        return self.learns_energy and number in learning

    def has_inner(self, number: int) -> bool:
        """Whether a round has inner steps."""
        return not (self._skips_inner and self.has_outer(number))

    def energy_weight(self, number: int) -> float:
        """Return lambda in the inner steps of a round."""
        sees_energy = self.learns_energy and not self.is_warm_up(number)
        return self.config.inner.energy_weight if sees_energy else 0.0

    def first_inner(self, number: int) -> int:
        """Return the number of the first inner step of a round: how many come before it."""
        skipped = self._learning_before(number) if self._skips_inner else 0
        return (number - skipped) * self.config.inner.steps

    def first_outer(self, number: int) -> int:
        """Return the number of the first outer step of a round."""
        before = self._learning_before(number) if self.learns_energy else 0
        return before * self.config.outer.steps

    def _learning_before(self, number: int) -> int:
        train = self.config.train
        return min(max(number - train.warmup_rounds, 0), train.max_outer_steps)
