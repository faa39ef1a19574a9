"""All runs of a table: every method tuned, then trained once per seed; whatever is done stays.

RUNS/NAME/METHOD/study.journal        Optuna's memory
RUNS/NAME/METHOD/tuning/trial-000/    a tuning run, with trial-000.log beside it
RUNS/NAME/METHOD/chosen.yaml          the chosen settings
RUNS/NAME/METHOD/seed-0/              a final run, with seed-0.log beside it
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ispen_dist.data.output_file import replacing
from ispen_dist.recording.run_lock import RunLock
from ispen_dist.tables.definition import TableDefinition, TableError
from ispen_dist.tables.picture import draw
from ispen_dist.tables.progress import TableProgress
from ispen_dist.tables.record import (
    FinalRun,
    current,
    final_run,
    merged,
    read_record,
    record_path,
    record_text,
)
from ispen_dist.tables.runs import Interrupted, Run, RunFailed, Runs
from ispen_dist.tables.summary import csv_text, markdown_text, table_rows
from ispen_dist.tables.tuning import Tuning


@dataclass
class Grid:
    """The runs of one table.

    Args:
        table: which table.
        methods: those of its methods that are run.
        budget: tuning runs of every method.
        seeds: final runs of every method, with seeds 0 to N-1.
        folder: of the runs of this table.
        runs: where they are executed.
        jobs: runs at a time.

    Attributes:
        failures: what failed, in words, with the log.
        refused: methods whose folder has runs of other settings, which are not this table's.
    """

    table: TableDefinition
    methods: Sequence[str]
    budget: int
    seeds: int
    folder: Path
    runs: Runs
    jobs: int
    failures: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)

    @property
    def num_runs(self) -> int:
        """Runs in all."""
        return len(self.methods) * (self.budget + self.seeds)

    def run(self, progress: TableProgress) -> None:
        """Do what is not done; a run that fails ends its method's tuning, and nothing else.

        Raises:
            ConfigError: where another command works in the folder.
        """
        lock = RunLock(self.folder)
        lock.take()
        try:
            with ThreadPoolExecutor(self.jobs) as pool, self._stopping(pool):
                # Methods that are tuned hand their final runs to the same workers.
                pending: list[Future] = [
                    pool.submit(self._tune, method, progress) for method in self.methods
                ]
                while pending:
                    done, _ = wait(pending, return_when=FIRST_COMPLETED)
                    more = [run for f in pending if f in done for run in self._next(f)]
                    pending = [f for f in pending if f not in done]
                    pending += [pool.submit(self._run, run, progress) for run in more]
        finally:
            lock.release()

    @contextmanager
    def _stopping(self, pool: ThreadPoolExecutor) -> Iterator[None]:
        """End all runs, saved, when the command is told to end or fails itself."""
        try:
            yield
        except BaseException:
            self.runs.stop()
            pool.shutdown(cancel_futures=True)
            raise

    def _tune(self, method: str, progress: TableProgress) -> list[Run]:
        """Tune a method and return its final runs."""

        def execute(run: Run) -> dict[str, Any]:
            return self._run(run, progress)

        own = self.folder / method
        tuning = Tuning(self.table, method, own, self.budget, execute)
        try:
            progress.enter_earlier(tuning.num_told())
        except TableError:
            self.refused.add(method)
            raise
        settings = tuning.run()
        return [
            Run(tuning.files, {**settings, "train.seed": seed}, self._final(method, seed))
            for seed in range(self.seeds)
        ]

    def _final(self, method: str, seed: int) -> Path:
        return self.folder / method / f"seed-{seed}"

    def _run(self, run: Run, progress: TableProgress) -> dict[str, Any]:
        name = str(run.folder.relative_to(self.folder))
        progress.begin()
        dev = None
        try:
            summary = self.runs(run)
            dev = summary["dev"].get(self.table.metric, float("nan"))
        finally:
            progress.end(name, dev)
        return summary

    def _next(self, done: Future) -> list[Run]:
        """Return the final runs that a tuned method asks for; note what failed."""
        try:
            result = done.result()
        except (RunFailed, TableError) as error:
            self.failures.append(str(error))
            return []
        except Interrupted:
            return []
        return result if isinstance(result, list) else []

    def complete(self) -> dict[str, list[FinalRun]]:
        """Return the final runs of the methods of which every seed is done."""
        found = {}
        for method in self.methods:
            if method in self.refused:
                continue
            runs = [self._read(method, seed) for seed in range(self.seeds)]
            if done := [run for run in runs if run is not None]:
                found[method] = done
        return {method: done for method, done in found.items() if len(done) == self.seeds}

    def _read(self, method: str, seed: int) -> FinalRun | None:
        folder = self._final(method, seed)
        summary = Run((), {}, folder).summary()
        if summary is None:
            return None
        config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
        settings = self.table.settings_sum(method, self.budget)
        return final_run(summary, config, self.budget, settings)

    def write(self, folder: Path) -> list[Path]:
        """Write NAME.csv, .md, .png and NAME_seeds.csv of what is complete; return these files.

        Methods and seeds of earlier commands stay in the table while their settings are the present
        ones; their runs stay in NAME_seeds.csv until the method is run with other settings.

        Raises:
            TableError: where NAME_seeds.csv is malformed.
        """
        csv_path, markdown, picture = (
            folder / f"{self.table.name}.{suffix}" for suffix in ("csv", "md", "png")
        )
        seeds = record_path(folder, self.table)
        record = merged(read_record(seeds), self.complete())
        shown = current(self.table, record)
        rows = table_rows(self.table, shown)
        missing = [method for method in self.methods if method not in shown]
        with ExitStack() as files:
            for path, text in (
                (csv_path, csv_text(self.table, rows)),
                (markdown, markdown_text(self.table, rows, missing)),
                (seeds, record_text(self.table, record)),
            ):
                files.enter_context(replacing(path)).write_text(text, "utf-8")
            draw(self.table, rows).savefig(files.enter_context(replacing(picture)), format="png")
        return [csv_path, markdown, picture, seeds]
