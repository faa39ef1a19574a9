"""TensorBoard events of a run: scalars, texts, pictures and, at the end, its settings."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from ispen_dist.recording import figures


class TensorBoardRecorder:
    """Writes one event file into a folder; a resumed run adds another beside it.

    Every method may raise an `OSError`, also that of an earlier write, since a thread writes. The
    next one then begins another file: half an event hides whatever follows it in the same file.

    Args:
        folder: of the event files; made if missing.
        purge_step: first step that is written again after a resume. TensorBoard then hides what
            the earlier files hold from this step on.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        self._folder, self._purge_step = folder, purge_step
        self._writer: SummaryWriter | None = None
        with self._writing():
            pass

    @contextlib.contextmanager
    def _writing(self) -> Iterator[SummaryWriter]:
        """Give the writer of the present file, and give the file up if it fails."""
        try:
            if self._writer is None:
                # The writer would make missing parents too, and hide that the run's folder is gone.
                self._folder.mkdir(exist_ok=True)
                # The default of two minutes is what a kill would lose.
                self._writer = SummaryWriter(
                    str(self._folder), purge_step=self._purge_step, flush_secs=10
                )
                self._purge_step = None
            yield self._writer
        except OSError:
            self._writer = None
            raise

    def scalars(self, values: Mapping[str, float | None], step: int) -> None:
        """Add numbers by tag; those that are None are left out."""
        with self._writing() as writer:
            for tag, value in values.items():
                if value is not None:
                    writer.add_scalar(tag, value, step)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Add a text, shown as Markdown."""
        with self._writing() as writer:
            writer.add_text(tag, text, step)

    def heat_map(
        self,
        tag: str,
        matrix: Tensor | ArrayLike,
        row_labels: Sequence[str],
        column_labels: Sequence[str],
        step: int,
        *,
        row_name: str = "",
        column_name: str = "",
        value_name: str = "",
    ) -> None:
        """Add a picture of a matrix, (R, C); see `figures.heat_map`."""
        if isinstance(matrix, Tensor):
            # NumPy has no bfloat16.
            matrix = matrix.detach().double().cpu().numpy()
        self._picture(
            tag,
            figures.heat_map(
                matrix,
                row_labels,
                column_labels,
                f"{tag}, step {step}",
                row_name=row_name,
                column_name=column_name,
                value_name=value_name,
            ),
            step,
        )

    def curves(
        self,
        tag: str,
        series: Mapping[str, Sequence[tuple[int, float]]],
        step: int,
        *,
        step_name: str = "round",
        value_name: str = "",
        mark: Mapping[int, str] | None = None,
    ) -> None:
        """Add a picture of figures over steps; see `figures.curves`."""
        figure = figures.curves(series, tag, step_name=step_name, value_name=value_name, mark=mark)
        self._picture(tag, figure, step)

    def convergence(self, tag: str, solves: Mapping[int, Sequence[float]], step: int) -> None:
        """Add a picture of solver residuals by round; see `figures.convergence`."""
        self._picture(tag, figures.convergence(solves, f"{tag}, step {step}"), step)

    def _picture(self, tag: str, figure: Figure, step: int) -> None:
        # Not add_figure: it goes through pyplot, which keeps figures and may look for a display.
        with self._writing() as writer:
            writer.add_image(tag, figures.pixels(figure), step, dataformats="HWC")
        figure.clear()

    def hparams(
        self, settings: Mapping[str, object], results: Mapping[str, float], step: int
    ) -> None:
        """Add the settings of the run with its results, for TensorBoard's table of runs.

        Call it once, at the end.

        Args:
            settings: nested; shown by dotted name.
            results: final metrics by tag, added as scalars as well.
            step: the last one.
        """
        # SummaryWriter.add_hparams would open a second run in a folder of its own.
        with self._writing() as writer:
            for summary in hparams(dict(_flat(settings)), dict(results)):
                writer._get_file_writer().add_summary(summary)
        self.scalars(results, step)

    def flush(self) -> None:
        """Hand everything added so far to the system, so that a kill does not lose it."""
        with self._writing() as writer:
            writer.flush()

    def sync(self) -> None:
        """Write what was flushed through to the disk; from any thread."""
        for path in self._folder.glob("events.out.tfevents.*"):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Write everything out."""
        with self._writing() as writer:
            writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _flat(settings: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield settings by dotted name, numbers as they are and the rest as text."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            # torch would write a boolean as 1.0.
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            yield f"{prefix}{name}", value if is_number else str(value)
