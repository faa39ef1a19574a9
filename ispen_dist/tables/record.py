"""The final runs of a table as a file, NAME_seeds.csv: a row per metric of every run.

It is what tests over seeds are computed from, and what later commands add methods and seeds to, on
this machine or another. Figures are written without rounding, so a table is the same whenever it is
made.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ispen_dist.config.inference import CHOICES
from ispen_dist.data.errors import DataError, read_text
from ispen_dist.tables.definition import TableDefinition, TableError

COLUMNS = (
    "dataset", "method", "seed", "metric", "test", "dev", "seconds_per_epoch", "budget", "settings",
)  # fmt: skip


@dataclass(frozen=True)
class FinalRun:
    """What a table needs of one final run.

    Attributes:
        seed: of the run.
        test: metrics on test.
        dev: metrics on dev; NaN where the run was trained on dev.
        seconds_per_epoch: of training, evaluations on dev included, for as many inner steps as
            read every training example once.
        budget: tuning runs before it.
        settings: sum of what was run, `TableDefinition.settings_sum`.
    """

    seed: int
    test: Mapping[str, float]
    dev: Mapping[str, float]
    seconds_per_epoch: float
    budget: int
    settings: str


Record = Mapping[str, Sequence[FinalRun]]
"""Final runs by method, each in the order of seeds."""


def record_path(folder: Path, table: TableDefinition) -> Path:
    """Return where the record of a table is, in the folder of the table."""
    return folder / f"{table.name}_seeds.csv"


def final_run(
    summary: Mapping[str, Any], config: Mapping[str, Any], budget: int, settings: str
) -> FinalRun:
    """Read a run's `summary.json` and `config.yaml`."""
    inner = config["inner"]
    rounds_per_epoch = summary["train_examples"] / (inner["steps"] * inner["batch_size"])
    test = {name: value for name, value in summary["test"].items() if name not in CHOICES}
    seconds_per_round = summary["seconds"] / max(1, summary["rounds"])
    return FinalRun(
        seed=config["train"]["seed"],
        test=test,
        dev={name: summary["dev"].get(name, math.nan) for name in test},
        seconds_per_epoch=seconds_per_round * rounds_per_epoch,
        budget=budget,
        settings=settings,
    )


def current(table: TableDefinition, record: Record) -> dict[str, Sequence[FinalRun]]:
    """Return the runs with the present settings of the table's methods, in the table's order."""
    return {
        row: record[row]
        for row in table.rows
        if row in record
        and all(run.settings == table.settings_sum(row, run.budget) for run in record[row])
    }


def merged(record: Record, new: Record) -> dict[str, Sequence[FinalRun]]:
    """Return a record with new runs in place of those of the same method, seed by seed.

    Where the settings or the tuning are others, none of the method's old runs stay.
    """
    result = dict(record)
    for method, runs in new.items():
        same = {(run.settings, run.budget) for run in runs}
        old = {run.seed: run for run in record.get(method, ())
               if (run.settings, run.budget) in same}  # fmt: skip
        by_seed = old | {run.seed: run for run in runs}
        result[method] = [by_seed[seed] for seed in sorted(by_seed)]
    return result


def record_text(table: TableDefinition, record: Record) -> str:
    """Return the record as CSV."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for method, runs in record.items():
        writer.writerows(
            [table.name, method, run.seed, metric, test, run.dev[metric],
             run.seconds_per_epoch, run.budget, run.settings]
            for run in runs for metric, test in run.test.items()
        )  # fmt: skip
    return file.getvalue()


def read_record(path: Path) -> dict[str, Sequence[FinalRun]]:
    """Read a record; without a file it is empty.

    Raises:
        TableError: with file and line.
    """
    if not path.exists():
        return {}
    try:
        file = io.StringIO(read_text(path), newline="")
    except DataError as error:
        raise TableError(str(error)) from None
    reader = csv.DictReader(file, strict=True)
    try:
        columns, rows = tuple(reader.fieldnames or ()), list(reader)
    except csv.Error as error:
        raise TableError(
            f"{path}, line {reader.line_num + 1}: expected CSV, found an error ({error}); move the "
            "file away, or repair it"
        ) from None
    if columns != COLUMNS:
        raise TableError(
            f"{path}, line 1: expected the columns {','.join(COLUMNS)}, found "
            f"{','.join(columns)!r}; move the file away, or repair it"
        )
    found: dict[tuple[str, int], FinalRun] = {}
    for line, row in enumerate(rows, start=2):
        try:
            _add(found, row)
        except (TypeError, ValueError) as error:
            raise TableError(
                f"{path}, line {line}: expected numbers for seed, test, dev, "
                f"seconds_per_epoch and budget, found {list(row.values())!r:.120} ({error}); "
                "move the file away, or repair it"
            ) from None
    methods = dict.fromkeys(method for method, _ in found)
    return {
        name: [run for (method, _), run in sorted(found.items()) if method == name]
        for name in methods
    }


def _add(found: dict[tuple[str, int], FinalRun], row: Mapping[str, str]) -> None:
    seed, metric = int(row["seed"]), row["metric"]
    run = found.get((row["method"], seed))
    found[row["method"], seed] = FinalRun(
        seed=seed,
        test={**(run.test if run else {}), metric: float(row["test"])},
        dev={**(run.dev if run else {}), metric: float(row["dev"])},
        seconds_per_epoch=float(row["seconds_per_epoch"]),
        budget=int(row["budget"]),
        settings=row["settings"],
    )
