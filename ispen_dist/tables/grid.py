"""All runs of a table: every method tuned, then trained once per seed; whatever is done stays.

RUNS/NAME/METHOD/study.journal        Optuna's memory
RUNS/NAME/METHOD/tuning/trial-000/    a tuning run, with trial-000.log beside it
RUNS/NAME/METHOD/chosen.yaml          the chosen settings
RUNS/NAME/METHOD/seed-0/              a final run, with seed-0.log beside it
RUNS/NAME/METHOD/refit-0/             the same on train and dev, where the table asks for it
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ispen_dist.command_line import load_config
from ispen_dist.config.inference import CHOICES
from ispen_dist.data.loading import has_test
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

Job = Callable[[TableProgress], list["Job"]]
"""Runs something and returns what can be run then."""


@dataclass
class Grid:
    """The runs of one table.

    Args:
        table: which table.
        methods: those of its methods that are run.
        budget: tuning runs of every method.
        seeds: of the final runs of every method.
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
    seeds: range
    folder: Path
    runs: Runs
    jobs: int
    failures: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)

    @property
    def num_runs(self) -> int:
        """Runs in all."""
        return len(self.methods) * self.budget + len(self._rows) * len(self.seeds)

    @property
    def _rows(self) -> list[str]:
        return [row for method in self.methods for row in self.table.rows_of(method)]

    def check_test(self) -> None:
        """Check that the final runs of every method read a test set.

        Raises:
            TableError: for the first that does not.
            ConfigError: for settings that cannot work.
            DataError: for a malformed split file.
        """
        for method in self.methods:
            files = (*self.table.configs, self.table.method_files[method])
            config, names = load_config(*files), ", ".join(map(str, files))
            if not config.train.read_test:
                raise TableError(
                    f"config {names}: train.read_test: expected true, found false; leave it out, "
                    "as tuning leaves test alone anyway"
                )
            if not has_test(config.data):
                raise TableError(
                    f"config {names}: expected a test set for the final runs, found none; set "
                    "data.test, data.test_folds, or data.split_file with a part test"
                )

    def run(self, progress: TableProgress) -> None:
        """Do what is not done; a run that fails ends its method's tuning, and nothing else.

        Raises:
            ConfigError: where another command works in the folder, or it cannot be written.
        """
        lock = RunLock(self.folder, "--runs")
        lock.take()
        try:
            with ThreadPoolExecutor(self.jobs) as pool, self._stopping(pool):
                waiting: deque[Job] = deque(partial(self._tune, name) for name in self.methods)
                pending: list[Future[list[Job]]] = []
                while waiting or pending:
                    while waiting and len(pending) < self.jobs:
                        pending.append(pool.submit(waiting.popleft(), progress))
                    done, _ = wait(pending, return_when=FIRST_COMPLETED)
                    more = [job for f in pending if f in done for job in self._next(f)]
                    pending = [f for f in pending if f not in done]
                    # A method that was begun comes to its end before others begin.
                    waiting.extendleft(reversed(more))
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

    def _tune(self, method: str, progress: TableProgress) -> list[Job]:
        """Tune a method and return the jobs of its seeds."""

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
            partial(self._train, method, tuning.files, {**settings, "train.seed": seed})
            for seed in self.seeds
        ]

    def _train(
        self,
        row: str,
        files: tuple[Path, ...],
        settings: Mapping[str, Any],
        progress: TableProgress,
    ) -> list[Job]:
        """Take a final run and return the job of its refit, where it has one."""
        run = Run(files, settings, self._final(row, settings["train.seed"]))
        summary = self._run(run, progress)
        if not summary["test"]:
            raise TableError(
                f"{run.folder}: expected figures on test, found none in summary.json; set "
                "data.test and train.read_test=true, and choose another folder with --runs"
            )
        dev = summary["dev"]
        own = {**settings, "data.train_on_dev": True}
        own |= {f"inference.{name}": dev[name] for name in CHOICES if name in dev}
        return [partial(self._train, refit, files, own) for refit in self.table.rows_of(row)[1:]]

    def _final(self, row: str, seed: int) -> Path:
        method = self.table.method_of(row)
        return self.folder / method / f"{'seed' if row == method else 'refit'}-{seed}"

    def _run(self, run: Run, progress: TableProgress) -> dict[str, Any]:
        name = str(run.folder.relative_to(self.folder))
        progress.begin()
        dev, otherwise = None, "failed"
        try:
            summary = self.runs(run)
            dev = summary["dev"].get(self.table.metric, float("nan"))
        except Interrupted:
            otherwise = "stopped"
            raise
        finally:
            progress.end(name, dev, otherwise)
        return summary

    def _next(self, done: Future[list[Job]]) -> list[Job]:
        """Return the jobs that another makes possible; note what failed."""
        try:
            return done.result()
        except (RunFailed, TableError) as error:
            self.failures.append(str(error))
        except Interrupted:
            pass
        return []

    def complete(self) -> dict[str, list[FinalRun]]:
        """Return the final runs of the rows of which every seed is done."""
        found = {}
        asked = [method for method in self.methods if method not in self.refused]
        for row in (row for method in asked for row in self.table.rows_of(method)):
            runs = [self._read(row, seed) for seed in self.seeds]
            if done := [run for run in runs if run is not None]:
                found[row] = done
        return {row: done for row, done in found.items() if len(done) == len(self.seeds)}

    def _read(self, row: str, seed: int) -> FinalRun | None:
        folder = self._final(row, seed)
        summary = Run((), {}, folder).summary()
        if summary is None or not summary["test"]:
            return None
        config = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
        settings = self.table.settings_sum(row, self.budget)
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
        missing = [row for row in self._rows if row not in shown]
        with ExitStack() as files:
            for path, text in (
                (csv_path, csv_text(self.table, rows)),
                (markdown, markdown_text(self.table, rows, missing)),
                (seeds, record_text(self.table, record)),
            ):
                files.enter_context(replacing(path)).write_text(text, "utf-8")
            draw(self.table, rows).savefig(files.enter_context(replacing(picture)), format="png")
        return [csv_path, markdown, picture, seeds]
