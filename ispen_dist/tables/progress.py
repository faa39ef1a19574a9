"""Progress of a table: one line that stays on a terminal, plain lines elsewhere."""

import math
import threading
from collections import Counter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class TableProgress:
    """Counts runs that are done, running and failed; use it as a context, from any thread.

    Args:
        total: runs of the table.
        console: where to write.
    """

    def __init__(self, total: int, console: Console) -> None:
        self.total, self._console = total, console
        self.counts: Counter[str] = Counter()
        self.best: tuple[float, str] | None = None
        self._lock = threading.Lock()
        self._bar = Progress(
            TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("{task.description}"), console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "TableProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def enter_earlier(self, number: int) -> None:
        """Count trials that an earlier command ran."""
        with self._lock:
            self.counts["done"] += number
            self._refresh()

    def begin(self) -> None:
        """Count a run that starts."""
        with self._lock:
            self.counts["running"] += 1
            self._refresh()

    def end(self, name: str, dev: float | None, otherwise: str = "failed") -> None:
        """Count a run that ended.

        Args:
            name: of the run.
            dev: its metric, NaN where it was trained on dev, None where it did not come to an end.
            otherwise: what became of it then.
        """
        with self._lock:
            self.counts["running"] -= 1
            figure = otherwise if dev is None else "done"
            self.counts[figure] += 1
            if dev is not None and not math.isnan(dev):
                figure = f"dev {dev:.4f}"
                self.best = max(self.best or (dev, name), (dev, name), key=lambda best: best[0])
            self._refresh()
            if not self._console.is_terminal:
                self._console.print(f"{name}: {figure}; {self}", soft_wrap=True, highlight=False)

    def _refresh(self) -> None:
        self._bar.update(self._task, completed=self.counts["done"], description=str(self))

    def __str__(self) -> str:
        counts = self.counts
        text = f"done {counts['done']} of {self.total}, running {counts['running']}"
        if counts["failed"]:
            text += f", failed {counts['failed']}"
        if self.best is not None:
            text += f"; best dev {self.best[0]:.4f} by {self.best[1]}"
        return text
