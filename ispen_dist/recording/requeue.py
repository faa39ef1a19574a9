"""The marker of a run that was asked to stop and wants to go on.

A launcher has one exit code for many processes, and that of `accelerate launch` is 1 even where
all of them saved. So whoever may start the run again, such as a batch script, looks for this file.
"""

import json
from datetime import UTC, datetime
from pathlib import Path

from ispen_dist.recording.run_folder import write_text
from ispen_dist.stopping import Stopped

_NAME = "requeue.json"


def mark(folder: Path, stopped: Stopped) -> None:
    """Write the marker into a run folder, whole or not at all."""
    marker = {
        "round": stopped.round,
        "reason": stopped.reason,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_text(folder / _NAME, json.dumps(marker) + "\n")


def unmark(folder: Path) -> None:
    """Remove the marker, since the run goes on."""
    (folder / _NAME).unlink(missing_ok=True)
