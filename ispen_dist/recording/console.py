"""Progress on the screen: a live bar in a terminal, plain lines in a log, silence elsewhere."""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self, TextIO

from rich import box
from rich.columns import Columns
from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

# A log has no width of its own; tables in it may be wider than the classic 80 columns.
_LOG_WIDTH = 120


def compact(value: float | str | None) -> str:
    """Format a figure in few characters, four digits of it at most.

    Example:
        >>> [compact(x) for x in (0.123456, 12345.6, 1.5e-7, 250, float("nan"), None)]
        ['0.1235', '12,346', '1.50e-07', '250', 'nan', '-']
    """
    if value is None:
        return "-"
    if isinstance(value, str | int):
        return str(value)
    size = abs(value)
    if 1e3 <= size < 1e7:
        return f"{value:,.0f}"
    if size != 0.0 and not 1e-3 <= size < 1e7:
        return f"{value:.2e}"
    return f"{value:.4g}"


class Console:
    """Shows how a run goes; a context manager that leaves the terminal as it was.

    Args:
        is_main: whether this process speaks; on the others every method does nothing.
        every: in a log, steps between two lines.
        stream: where to write; standard output by default.
    """

    def __init__(self, is_main: bool, every: int = 10, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._is_main, self._every = is_main, every
        live = self._stream.isatty()
        self._rich = RichConsole(
            file=self._stream,
            force_terminal=live,
            width=None if live else _LOG_WIDTH,
            highlight=False,
        )
        self._is_live = live and not self._rich.is_dumb_terminal
        self._progress: _FigureProgress | None = None
        self._task = TaskID(0)
        self._total, self._first, self._begin = 0, 0, 0.0

    def start(self, total: int, description: str, completed: int = 0) -> None:
        """Begin to count steps.

        Args:
            total: steps of the whole run.
            description: what is being done, in a word or two.
            completed: steps done before, in a resumed run.
        """
        if not self._is_main:
            return
        self.stop()
        self._total, self._first, self._begin = total, completed, time.perf_counter()
        if self._is_live:
            self._progress = _FigureProgress(self._rich)
            self._task = self._progress.add_task(description, total=total, completed=completed)
            self._progress.start()
        else:
            begun = f" from step {completed}" if completed else ""
            self._print(f"{description}: {total} steps{begun}")

    def update(self, step: int, figures: Mapping[str, float | str | None]) -> None:
        """Show that `step` steps are done, and figures by name, in the order given."""
        if not self._is_main:
            return
        if self._progress is not None:
            self._progress.figures = figures
            self._progress.update(self._task, completed=step)
        elif not self._is_live and self._is_due(step):
            parts = [f"{name} {compact(value)}" for name, value in figures.items()]
            seconds = time.perf_counter() - self._begin
            self._print("  ".join([f"step {step}/{self._total}", *parts, f"{seconds:.1f} s"]))

    def _is_due(self, step: int) -> bool:
        return step in (self._first + 1, self._total) or step % self._every == 0

    def message(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._is_main:
            self._print(text)

    def table(
        self, title: str, columns: Sequence[str], rows: Iterable[Sequence[float | str | None]]
    ) -> None:
        """Print a table; the first column is flush left, the others flush right."""
        if not self._is_main:
            return
        style = box.SIMPLE_HEAD if self._is_live else box.ASCII2
        table = Table(title=Text(title), title_justify="left", box=style)
        for i, column in enumerate(columns):
            table.add_column(Text(column), justify="right" if i else "left")
        for row in rows:
            table.add_row(*(Text(compact(value)) for value in row))
        self._rich.print(table)
        self._stream.flush()

    def stop(self) -> None:
        """Take the bar down, leaving its last state on the screen."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _print(self, text: str) -> None:
        # No markup: settings stand in brackets. No wrapping: a log is searched line by line.
        self._rich.print(text, markup=False, emoji=False, soft_wrap=True)
        self._stream.flush()


class _FigureProgress(Progress):
    """A progress bar with a second line of figures, in columns that fit the terminal."""

    def __init__(self, console: RichConsole) -> None:
        self.figures: Mapping[str, float | str | None] = {}
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            refresh_per_second=4,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the bar and the figures."""
        yield self.make_tasks_table(self.tasks)
        if self.figures:
            pairs = [
                Text.assemble((f"{name} ", "dim"), (compact(value), "bold"))
                for name, value in self.figures.items()
            ]
            yield Columns(pairs, padding=(0, 3))
