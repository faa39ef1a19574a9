"""What the final runs of a table say: means, spreads, paired tests and costs; CSV and Markdown."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ispen_dist.tables.definition import TableDefinition
from ispen_dist.tables.record import FinalRun, Record

CSV_COLUMNS = (
    "dataset", "method", "metric", "test_mean", "test_std", "dev_mean", "seeds",
    "seconds_per_epoch", "overhead",
)  # fmt: skip
BASELINE = "mle"
"""What the overhead of every method is taken to."""


@dataclass(frozen=True)
class Row:
    """One metric of one method over all seeds.

    Attributes:
        method: which.
        metric: which.
        test: values on test, in the order of seeds.
        dev_mean: mean on dev; NaN where dev was trained on.
        budget: tuning runs before.
        p_value: of the paired test against the reference, on the seeds that both have; None for
            the reference itself, and where those are fewer than two.
        seconds_per_epoch: median over seeds.
        overhead: to `mle`; None where the table has none.
        implicit_overhead: of an implicit method, to the explicit one of the same objective.
    """

    method: str
    metric: str
    test: Sequence[float]
    dev_mean: float
    budget: int
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


def table_rows(table: TableDefinition, record: Record) -> list[Row]:
    """Return a row for every metric of every method, over the seeds that have it.

    Args:
        table: which table.
        record: the runs of the methods to show; those of an earlier version may lack a metric.
    """
    seconds = {m: statistics.median(r.seconds_per_epoch for r in own) for m, own in record.items()}
    rows = []
    for method, own in record.items():
        for metric in dict.fromkeys(name for run in own for name in run.test):
            test = _by_seed(own, metric)
            reference = _by_seed(record.get(table.reference, ()), metric)
            both = [] if method == table.reference else sorted(test.keys() & reference.keys())
            own_values, others = ([values[s] for s in both] for values in (test, reference))
            rows.append(
                Row(
                    method=method,
                    metric=metric,
                    test=list(test.values()),
                    dev_mean=statistics.mean(run.dev[metric] for run in own if metric in run.dev),
                    budget=own[0].budget,
                    p_value=p_value(own_values, others, table.significance)
                    if len(both) > 1
                    else None,
                    seconds_per_epoch=seconds[method],
                    overhead=_ratio(seconds, method, BASELINE),
                    implicit_overhead=_implicit_overhead(seconds, method),
                )
            )
    return rows


def _by_seed(runs: Sequence[FinalRun], metric: str) -> dict[int, float]:
    return {run.seed: run.test[metric] for run in runs if metric in run.test}


def p_value(values: Sequence[float], reference: Sequence[float], test: str) -> float:
    """Return the two-sided p-value of a paired test over at least two seeds.

    Departure from scipy: values that equal the reference seed by seed give 1, where its t-test has
    0/0; they are no evidence of a difference.
    """
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
             _number(row.dev_mean, 4, ""), len(row.test), f"{row.seconds_per_epoch:.3f}",
             _number(row.overhead, 2, "")]
        )  # fmt: skip
    return file.getvalue()


def markdown_text(table: TableDefinition, rows: Sequence[Row], missing: Sequence[str]) -> str:
    """Return the table as Markdown, with what was done to get it.

    Args:
        table: which table.
        rows: of the methods that are complete.
        missing: methods that were asked for and are not.
    """
    name = {"paired_t": "paired t-test", "wilcoxon": "Wilcoxon signed-rank test"}
    columns = (
        "method", "metric", "seeds", "tuning runs", "test", "dev", f"p against {table.reference}",
        "seconds per epoch", f"to {BASELINE}", "implicit / explicit",
    )  # fmt: skip
    lines = [
        f"# {table.name}",
        "",
        f"Mean and standard deviation over seeds. Tuning runs are chosen from by {table.metric} on "
        "dev, none: the settings of the files; test was read once per seed. p: two-sided "
        f"{name[table.significance]} over seeds, not corrected for the number of comparisons. "
        "Seconds per epoch are a median over seeds, evaluations on dev included; methods that were "
        "run on different machines or beside other work do not compare. Every seed: "
        f"{table.name}_seeds.csv.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for row in rows:
        cells = (
            row.method, row.metric, str(len(row.test)), str(row.budget),
            f"{row.mean:.4f} +- {row.std:.4f}", _number(row.dev_mean, 4),
            _significance(row.p_value), f"{row.seconds_per_epoch:.3f}", _number(row.overhead, 2),
            _number(row.implicit_overhead, 2),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    if missing:
        lines += ["", f"Not complete, and left out: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _number(value: float | None, digits: int, absent: str = "-") -> str:
    return absent if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _significance(value: float | None) -> str:
    return "< 0.0001" if value is not None and value < 1e-4 else _number(value, 4)
