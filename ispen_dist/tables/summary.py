"""What the final runs of a table say: means, spreads, paired tests and costs; CSV and Markdown."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from ispen_dist.tables.definition import TableDefinition

CSV_COLUMNS = (
    "dataset", "method", "metric", "test_mean", "test_std", "dev_mean", "seeds",
    "seconds_per_epoch", "overhead",
)  # fmt: skip
BASELINE = "mle"
"""What the overhead of every method is taken to."""


@dataclass(frozen=True)
class FinalRun:
    """What a table needs of one final run.

    Attributes:
        test: metrics on test.
        dev: metrics on dev.
        seconds_per_epoch: of training, evaluations on dev included, for as many inner steps as
            read every training example once.
    """

    test: Mapping[str, float]
    dev: Mapping[str, float]
    seconds_per_epoch: float


@dataclass(frozen=True)
class Row:
    """One metric of one method over all seeds.

    Attributes:
        method: which.
        metric: which.
        test: values on test, by seed.
        dev_mean: mean on dev.
        p_value: of the paired test against the reference; None for the reference itself, and where
            too few seeds are there.
        seconds_per_epoch: median over seeds.
        overhead: to `mle`; None where the table has none.
        implicit_overhead: of an implicit method, to the explicit one of the same objective.
    """

    method: str
    metric: str
    test: Sequence[float]
    dev_mean: float
    p_value: float | None
    seconds_per_epoch: float
    overhead: float | None
    implicit_overhead: float | None

    @property
    def mean(self) -> float:
        """Mean on test."""
        return statistics.mean(self.test)

    @property
    def std(self) -> float:
        """Sample standard deviation on test; 0 for one seed."""
        return statistics.stdev(self.test) if len(self.test) > 1 else 0.0


def final_run(summary: Mapping[str, Any], config: Mapping[str, Any]) -> FinalRun:
    """Read a run's `summary.json` and `config.yaml`."""
    inner = config["inner"]
    rounds_per_epoch = summary["train_examples"] / (inner["steps"] * inner["batch_size"])
    test = {name: value for name, value in summary["test"].items() if name != "threshold"}
    seconds_per_round = summary["seconds"] / max(1, summary["rounds"])
    return FinalRun(test, summary["dev"], seconds_per_round * rounds_per_epoch)


def table_rows(table: TableDefinition, runs: Mapping[str, Sequence[FinalRun]]) -> list[Row]:
    """Return a row for every metric of every method.

    Args:
        table: which table.
        runs: of the methods that are complete, by seed, in the same order for all.
    """
    seconds = {m: statistics.median(r.seconds_per_epoch for r in own) for m, own in runs.items()}
    rows = []
    for method, own in runs.items():
        for metric in own[0].test:
            test = [run.test[metric] for run in own]
            reference = [run.test[metric] for run in runs.get(table.reference, ())]
            compared = method != table.reference and bool(reference)
            rows.append(
                Row(
                    method=method,
                    metric=metric,
                    test=test,
                    dev_mean=statistics.mean(run.dev[metric] for run in own),
                    p_value=p_value(test, reference, table.significance) if compared else None,
                    seconds_per_epoch=seconds[method],
                    overhead=_ratio(seconds, method, BASELINE),
                    implicit_overhead=_implicit_overhead(seconds, method),
                )
            )
    return rows


def p_value(values: Sequence[float], reference: Sequence[float], test: str) -> float | None:
    """Return the two-sided p-value of a paired test over seeds, None for fewer than two.

    Departure from scipy: values that equal the reference seed by seed give 1, where its t-test has
    0/0; they are no evidence of a difference.
    """
    if len(values) < 2:
        return None
    if np.array_equal(values, reference):
        return 1.0
    if test == "wilcoxon":
        return float(stats.wilcoxon(values, reference).pvalue)
    return float(stats.ttest_rel(values, reference).pvalue)


def _ratio(seconds: Mapping[str, float], method: str, base: str) -> float | None:
    return seconds[method] / seconds[base] if base in seconds and seconds[base] > 0 else None


def _implicit_overhead(seconds: Mapping[str, float], method: str) -> float | None:
    objective = method.removesuffix("_implicit")
    return None if objective == method else _ratio(seconds, method, f"{objective}_explicit")


def csv_text(table: TableDefinition, rows: Sequence[Row]) -> str:
    """Return the table as CSV."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in rows:
        writer.writerow(
            [table.name, row.method, row.metric, f"{row.mean:.4f}", f"{row.std:.4f}",
             f"{row.dev_mean:.4f}", len(row.test), f"{row.seconds_per_epoch:.3f}",
             _number(row.overhead, 2, "")]
        )  # fmt: skip
    return file.getvalue()


def markdown_text(
    table: TableDefinition, rows: Sequence[Row], missing: Sequence[str], budget: int, seeds: int
) -> str:
    """Return the table as Markdown, with what was done to get it.

    Args:
        table: which table.
        rows: of the methods that are complete.
        missing: methods that are not.
        budget: tuning runs of every method.
        seeds: final runs of every method.
    """
    name = {"paired_t": "paired t-test", "wilcoxon": "Wilcoxon signed-rank test"}
    columns = (
        "method", "metric", "test", "dev", f"p against {table.reference}", "seconds per epoch",
        f"to {BASELINE}", "implicit / explicit",
    )  # fmt: skip
    lines = [
        f"# {table.name}",
        "",
        f"Seeds 0 to {seeds - 1}: mean and standard deviation. Every method had {budget} tuning "
        f"runs, chosen by {table.metric} on dev; test was read once per seed. p: two-sided "
        f"{name[table.significance]} over seeds, not corrected for the number of comparisons. "
        "Seconds per epoch are a median over seeds, evaluations on dev included.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for row in rows:
        cells = (
            row.method, row.metric, f"{row.mean:.4f} +- {row.std:.4f}", f"{row.dev_mean:.4f}",
            _significance(row.p_value), f"{row.seconds_per_epoch:.3f}",
            _number(row.overhead, 2), _number(row.implicit_overhead, 2),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    if missing:
        lines += ["", f"Not complete, and left out: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _number(value: float | None, digits: int, absent: str = "-") -> str:
    return absent if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _significance(value: float | None) -> str:
    return "< 0.0001" if value is not None and value < 1e-4 else _number(value, 4)
