"""A run's folder: settings, metric rows, TensorBoard events, checkpoints, the model, a summary."""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ispen_dist import ranges
from ispen_dist.command_line import config_to_dict, dump_config, load_config
from ispen_dist.config import Config, ConfigError, ProfileConfig
from ispen_dist.data.output_file import replacing
from ispen_dist.recording.console import Console
from ispen_dist.recording.metrics_file import MetricsFile, read_metrics
from ispen_dist.recording.tensorboard import TensorBoardRecorder
from ispen_dist.write_failures import WriteFailures

_CONFIG, _METRICS, _SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
_TENSORBOARD = "tensorboard"
_SHOWN = {
    "inner": "inner_loss",
    "energy": "energy",
    "outer": "outer_loss",
    "stationarity": "stationarity",
    "solver": "solver_steps",
    "residual": "residual",
    "examples/s": "examples_per_second",
    "not finite": "not_finite",
}
NUM_SOLVES_SHOWN = 6
"""Newest solves in the picture of their convergence."""

_NAMES_INTERACTION = {
    "tagging": ("learned transitions", "previous tag", "next tag", "score"),
    "multilabel": ("learned label interactions", "label", "label", "curvature of the energy"),
    "segmentation": ("learned interaction with the centre", "row", "column", "curvature"),
}
_MAY_DIFFER = (
    "train.patience", "train.checkpoint_every", "train.keep_checkpoints", "train.keep_best",
    "train.on_save_error", "train.log_every", "train.num_threads", "train.on_not_finite",
    "train.max_not_finite", "train.hang_timeout",
    *(f"profile.{field.name}" for field in fields(ProfileConfig)),
)  # fmt: skip


class RunFolder:
    """The records of one run; every method does nothing on ranks other than 0.

    What cannot be written is noted in `failures` and not raised.

    Args:
        path: the folder; made when the run starts.
        config: all settings.
        console: progress and tables.
        is_main: whether this process writes.

    Attributes:
        failures: of everything the run writes, checkpoints included.
    """

    def __init__(self, path: Path, config: Config, console: Console, *, is_main: bool) -> None:
        self.path, self.config, self._console, self._is_main = path, config, console, is_main
        self.failures = WriteFailures(config.train.on_save_error, console.message)
        self._dev_curve: list[tuple[int, float]] = []
        self._dev_shown: dict[str, float] = {}
        self._solves: deque[tuple[int, Sequence[float]]] = deque(maxlen=NUM_SOLVES_SHOWN)

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    def start(self, num_rounds: int, first_round: int) -> None:
        """Open the records, at the round a checkpoint was taken where a run is resumed.

        A run that was ended before its first checkpoint starts again in its own folder.
        """
        if not self._is_main:
            return
        with self.failures.watching("run folder"):
            self._open(first_round)
        self._console.message(f"run folder: {self.path}")
        self._console.start(num_rounds, "training", first_round)

    def _open(self, first_round: int) -> None:
        resumed = (self.path / _METRICS).exists()
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / _CONFIG, dump_config(self.config))
        # From the beginning, what an attempt without a checkpoint left is all written again.
        last_kept = first_round or -1
        self._metrics = MetricsFile(self.path / _METRICS, last_kept if resumed else None)
        for row in read_metrics(self.path / _METRICS) if resumed else []:
            if row["phase"] == "dev":
                self._add_to_curve(row["step"], row)
        self._tensorboard = TensorBoardRecorder(
            self.path / _TENSORBOARD, last_kept + 1 if resumed else None
        )
        if first_round == 0 or not resumed:
            self._tensorboard.text("config", f"```yaml\n{dump_config(self.config)}```")

    def message(self, text: str) -> None:
        """Show a line, on the main process."""
        self._console.message(text)

    def _add_to_curve(self, step: int, dev: Mapping[str, Any]) -> None:
        name = next(n for n in dev if n not in ("step", "phase"))
        self._dev_curve.append((step, dev[name]))
        self._dev_shown = {f"dev {name}": dev[name]}

    def _record(self, step: int, phase: str, figures: Mapping[str, float | None]) -> None:
        with self.failures.watching(_METRICS):
            self._metrics.write(step, phase, figures)
        with self.failures.watching(_TENSORBOARD):
            self._tensorboard.scalars({f"{phase}/{k}": v for k, v in figures.items()}, step)

    @ranges.marked("records")
    def record_round(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of a round."""
        if self._is_main:
            self._record(step, "train", figures)

    @ranges.marked("records")
    def show_round(self, step: int, figures: Mapping[str, float]) -> None:
        """Show the figures of a round, with those of the last evaluation on dev."""
        if not self._is_main:
            return
        shown = {name: figures[key] for name, key in _SHOWN.items() if key in figures}
        if not figures.get("not_finite"):
            shown.pop("not finite", None)
        self._console.update(step, {**shown, **self._dev_shown})

    @ranges.marked("records")
    def record_solve(self, step: int, residuals: Sequence[float]) -> None:
        """Keep the residuals of a solve for the picture; a row where the run is profiled."""
        if not (self._is_main and residuals):
            return
        self._solves.append((step, residuals))
        if self.config.profile.enabled:
            with self.failures.watching(_METRICS):
                self._metrics.write(step, "solve", {"residuals": residuals})

    @ranges.marked("records")
    def record_save(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Write what a save cost, and hand all records so far to the system."""
        if not self._is_main:
            return
        self._record(step, "save", figures)
        with self.failures.watching(_TENSORBOARD):
            self._tensorboard.flush()

    def sync(self) -> None:
        """Write the records so far through to the disk; from any thread.

        Raises:
            OSError: if that fails.
        """
        self._metrics.sync()
        self._tensorboard.sync()

    @ranges.marked("records")
    def record_dev(self, step: int, dev: Mapping[str, float]) -> None:
        """Write the metrics of an evaluation on dev, and redraw the curve."""
        if not self._is_main:
            return
        self._record(step, "dev", dev)
        self._add_to_curve(step, dev)
        name = next(iter(dev))
        warmup = self.config.train.warmup_rounds
        mark = {warmup: "end of warm-up"} if 0 < warmup < step else None
        with self.failures.watching(_TENSORBOARD):
            self._tensorboard.curves(
                f"dev {name}", {name: self._dev_curve}, step, value_name=name, mark=mark
            )
            if self._solves:
                self._tensorboard.convergence("solver convergence", dict(self._solves), step)

    @ranges.marked("records")
    def record_interaction(self, step: int, matrix: Tensor, names: Sequence[str]) -> None:
        """Draw the learned interaction between output variables."""
        if not self._is_main:
            return
        tag, rows, columns, value = _NAMES_INTERACTION[self.config.data.task]
        height, width = matrix.shape
        with self.failures.watching(_TENSORBOARD):
            self._tensorboard.heat_map(
                tag, matrix.detach().cpu().numpy(), names[:height], names[:width], step,
                row_name=rows, column_name=columns, value_name=value,
            )  # fmt: skip

    @property
    def model(self) -> Path:
        """Where the trained model goes."""
        return self.path / "model"

    def close(self) -> None:
        """Write everything out that was recorded; a run that stops early calls this alone."""
        if self._is_main:
            with self.failures.watching(_TENSORBOARD):
                self._tensorboard.close()
            with self.failures.watching(_METRICS):
                self._metrics.close()
            self._console.stop()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary and print the table of results."""
        if not self._is_main:
            return
        results = {f"test/{k}": v for k, v in summary["test"].items()}
        results |= {f"best_dev/{k}": v for k, v in summary["dev"].items()}
        with self.failures.watching(_TENSORBOARD):
            # After the last round, so that a kill before the end does not leave them twice.
            self._tensorboard.hparams(config_to_dict(self.config), results, summary["rounds"] + 1)
        self.close()
        with self.failures.watching(_SUMMARY):
            write_text(self.path / _SUMMARY, json.dumps(summary, indent=2) + "\n")
        names = dict.fromkeys([*summary["dev"], *summary["test"]])
        rows = [[n, summary["dev"].get(n), summary["test"].get(n)] for n in names]
        self._console.table("results", ["metric", "dev", "test"], rows)
        if summary["hypergradient"]["statuses"]:
            solver = summary["hypergradient"]
            statuses = ", ".join(f"{k} {v}" for k, v in solver["statuses"].items())
            self._console.message(
                f"solves: {statuses}; {solver['skipped']} outer steps without implicit part; "
                f"{solver['mean_steps']:.1f} products each"
            )
        if skipped := summary["not_finite"]["skipped"]:
            kinds = ", ".join(f"{kind} {number}" for kind, number in skipped.items())
            self._console.message(f"steps left out, not finite: {kinds}")
        self._console.message(
            f"{summary['seconds']:.0f} s on {summary['world_size']} process(es); see {self.path}"
        )


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, "utf-8")


def check_folder(output: Path, config: Config, *, may_continue: bool) -> None:
    """See that a run may write into a folder. Every rank asks before any of them writes.

    Args:
        output: the run folder.
        config: all settings.
        may_continue: whether it may hold an earlier part of this run.

    Raises:
        ConfigError: for a folder of another run; where it may be continued, with the first
            settings that differ.
    """
    if not (output / _CONFIG).exists():
        return
    if not may_continue:
        raise ConfigError(
            f"--output {output}: expected a new or empty folder for a fresh start, found an "
            "earlier run; choose another folder, or continue that run with --resume auto"
        )
    before = _flat(config_to_dict(load_config(output / _CONFIG)))
    now = _flat(config_to_dict(config))
    changed = [k for k in now if now[k] != before.get(k) and k not in _MAY_DIFFER]
    if changed:
        shown = "; ".join(f"{k}: expected {before.get(k)!r}, got {now[k]!r}" for k in changed[:3])
        raise ConfigError(
            f"--resume: {output} was started with other settings: {shown}; use the same ones, or "
            "another --output"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
