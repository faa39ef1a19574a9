"""A run's folder: settings, metric rows, TensorBoard events, checkpoints, the model, a summary."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ispen_dist.command_line import config_to_dict, dump_config, load_config
from ispen_dist.config import Config, ConfigError
from ispen_dist.recording.console import Console
from ispen_dist.recording.metrics_file import MetricsFile, read_metrics
from ispen_dist.recording.tensorboard import TensorBoardRecorder

_CONFIG, _METRICS, _SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
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
_NAMES_INTERACTION = {
    "tagging": ("learned transitions", "previous tag", "next tag", "score"),
    "multilabel": ("learned label interactions", "label", "label", "curvature of the energy"),
}
_MAY_DIFFER = (
    "train.patience", "train.checkpoint_every", "train.keep_checkpoints", "train.log_every",
    "train.num_threads", "train.on_not_finite", "train.max_not_finite", "train.hang_timeout",
)  # fmt: skip


class RunFolder:
    """The records of one run; every method does nothing on ranks other than 0.

    Args:
        path: the folder; made when the run starts.
        config: all settings.
        console: progress and tables.
        is_main: whether this process writes.
    """

    def __init__(self, path: Path, config: Config, console: Console, *, is_main: bool) -> None:
        self.path, self.config, self._console, self._is_main = path, config, console, is_main
        self._dev_curve: list[tuple[int, float]] = []
        self._dev_shown: dict[str, float] = {}

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
        resumed = (self.path / _METRICS).exists()
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / _CONFIG, dump_config(self.config))
        self._metrics = MetricsFile(self.path / _METRICS, first_round if resumed else None)
        for row in read_metrics(self.path / _METRICS) if resumed else []:
            if row["phase"] == "dev":
                self._add_to_curve(row["step"], row)
        self._tensorboard = TensorBoardRecorder(
            self.path / "tensorboard", first_round + 1 if resumed else None
        )
        if not resumed:
            self._tensorboard.text("config", f"```yaml\n{dump_config(self.config)}```")
        self._console.message(f"run folder: {self.path}")
        self._console.start(num_rounds, "training", first_round)

    def message(self, text: str) -> None:
        """Show a line, on the main process."""
        self._console.message(text)

    def _add_to_curve(self, step: int, dev: Mapping[str, Any]) -> None:
        name = next(n for n in dev if n not in ("step", "phase"))
        self._dev_curve.append((step, dev[name]))
        self._dev_shown = {f"dev {name}": dev[name]}

    def record_round(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of a round everywhere."""
        if not self._is_main:
            return
        self._metrics.write(step, "train", figures)
        self._tensorboard.scalars({f"train/{k}": v for k, v in figures.items()}, step)
        shown = {name: figures[key] for name, key in _SHOWN.items() if key in figures}
        if not figures.get("not_finite"):
            shown.pop("not finite", None)
        self._console.update(step, {**shown, **self._dev_shown})

    def record_dev(self, step: int, dev: Mapping[str, float]) -> None:
        """Write the metrics of an evaluation on dev, and redraw the curve."""
        if not self._is_main:
            return
        self._metrics.write(step, "dev", dev)
        self._tensorboard.scalars({f"dev/{k}": v for k, v in dev.items()}, step)
        self._add_to_curve(step, dev)
        name = next(iter(dev))
        warmup = self.config.train.warmup_rounds
        mark = {warmup: "end of warm-up"} if 0 < warmup < step else None
        self._tensorboard.curves(
            f"dev {name}", {name: self._dev_curve}, step, value_name=name, mark=mark
        )

    def record_interaction(self, step: int, matrix: Tensor, names: Sequence[str]) -> None:
        """Draw the learned interaction between output variables."""
        if not self._is_main:
            return
        tag, rows, columns, value = _NAMES_INTERACTION[self.config.data.task]
        self._tensorboard.heat_map(
            tag, matrix.detach().cpu().numpy(), names, names, step,
            row_name=rows, column_name=columns, value_name=value,
        )  # fmt: skip

    @property
    def model(self) -> Path:
        """Where the trained model goes."""
        return self.path / "model"

    def close(self) -> None:
        """Write everything out that was recorded; a run that stops early calls this alone."""
        if self._is_main:
            self._tensorboard.close()
            self._metrics.close()
            self._console.stop()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary and print the table of results."""
        if not self._is_main:
            return
        write_text(self.path / _SUMMARY, json.dumps(summary, indent=2) + "\n")
        results = {f"test/{k}": v for k, v in summary["test"].items()}
        results |= {f"best_dev/{k}": v for k, v in summary["dev"].items()}
        self._tensorboard.hparams(config_to_dict(self.config), results, summary["rounds"])
        self.close()
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
    """Write a file whole or not at all: beside the target first, then renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


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
