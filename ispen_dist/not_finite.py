"""What follows where a loss or a gradient is NaN or infinite.

The step itself was left out by its engine, from globally reduced values and without the host. Here,
at the end of the round, it is counted, named, and followed by what `train.on_not_finite` says; all
from the same reduced values, so that all ranks do the same.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from ispen_dist.config import TrainConfig

BACK_OFF = 0.5
"""What learning rates are multiplied with after a round with a step left out."""

LEAST_FACTOR = 2.0**-10

RECOVERY_ROUNDS = 10
"""Rounds without such a step after which a lowered rate rises by one factor."""

Rows = Sequence[Mapping[str, float]]


class NotFinite(RuntimeError):
    """Training met NaN or infinity and was told to stop, or met it too often in a row."""


@dataclass
class NotFiniteRecord:
    """Which steps were left out; part of the checkpoint, the same on all ranks.

    Attributes:
        skipped: steps left out, by kind: inner, pretrain, outer.
        in_a_row: of them the last ones without a good step since, by kind.
        rate_factor: what learning rates are multiplied with at present.
        num_clean: rounds without since the last one with a step left out.
    """

    skipped: Counter[str] = field(default_factory=Counter)
    in_a_row: Counter[str] = field(default_factory=Counter)
    rate_factor: float = 1.0
    num_clean: int = 0

    def enter(self, kind: str, norms: Sequence[float]) -> list[int]:
        """Enter steps by the norms of their gradients, and return which were left out."""
        left_out = []
        for i, norm in enumerate(norms):
            if math.isfinite(norm):
                self.in_a_row[kind] = 0
            else:
                self.in_a_row[kind] += 1
                self.skipped[kind] += 1
                left_out.append(i)
        return left_out

    def follow(self, config: TrainConfig, what: str) -> None:
        """Follow the configuration at the end of a round.

        Args:
            config: says what to do.
            what: the steps left out in this round, in words; empty where there were none.

        Raises:
            NotFinite: where the run shall stop.
        """
        if not what:
            self._recover()
            return
        if config.on_not_finite == "stop":
            raise NotFinite(f"{what}; train.on_not_finite=stop")
        if (worst := max(self.in_a_row.values())) >= config.max_not_finite:
            raise NotFinite(
                f"{what}; {worst} in a row (train.max_not_finite={config.max_not_finite}); check "
                "the data, or lower inner.optimizer.learning_rate or inner.energy_weight"
            )
        self.num_clean = 0
        if config.on_not_finite == "back_off":
            self.rate_factor = max(BACK_OFF * self.rate_factor, LEAST_FACTOR)

    def _recover(self) -> None:
        self.num_clean += 1
        if self.rate_factor < 1.0 and self.num_clean % RECOVERY_ROUNDS == 0:
            self.rate_factor /= BACK_OFF

    def state(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return {
            "skipped": dict(self.skipped),
            "in_a_row": dict(self.in_a_row),
            "rate_factor": self.rate_factor,
            "num_clean": self.num_clean,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Return the record of a checkpoint."""
        counters = {key: Counter(state[key]) for key in ("skipped", "in_a_row")}
        return cls(**(dict(state) | counters))


class NotFiniteWatch:
    """Collects the steps left out in a round, and ends the round with what follows from them.

    Args:
        config: says what to do.
        describe: returns, in words and on all ranks alike, where a step was not finite: of a round
            counted from 1, a kind, and a number within the round counted from 0.
        report: shows a line.

    Attributes:
        record: of the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        describe: Callable[[int, str, int], str],
        report: Callable[[str], None],
    ) -> None:
        self._config, self._describe, self._report = config, describe, report
        self.record = NotFiniteRecord()
        self._found: list[tuple[str, int]] = []

    def means(self, rows: Rows) -> dict[str, float]:
        """Enter the inner steps of a round, and return the means over those that were taken."""
        self._enter("inner", [row["gradient_norm"] for row in rows])
        if "local_gradient_norm" in rows[0]:
            self._enter("pretrain", [row["local_gradient_norm"] for row in rows])
        return {name: mean_of_finite([row[name] for row in rows]) for name in rows[0]}

    def enter_outer(self, norms: Sequence[float]) -> None:
        """Enter the outer steps of a round by the norms of their gradients."""
        self._enter("outer", norms)

    def _enter(self, kind: str, norms: Sequence[float]) -> None:
        self._found += [(kind, i) for i in self.record.enter(kind, norms)]

    def end_round(self, round: int) -> float:
        """Follow the configuration, and return the factor of the next round's learning rates.

        Raises:
            NotFinite: where the run shall stop.
        """
        found, self._found = self._found, []
        what = ""
        if found:
            # Of several the first: it is where the trouble began.
            more = f" and {len(found) - 1} others" if len(found) > 1 else ""
            kind, step = found[0]
            where = self._describe(round, kind, step)
            what = f"round {round}: left out {kind} step {step + 1}{more}, not finite: {where}"
        self.record.follow(self._config, what)
        if what:
            self._report(f"warning: {what}")
        return self.record.rate_factor


def mean_of_finite(values: Sequence[float]) -> float:
    """Return the mean of the finite values, NaN where there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
