"""What runs that should be alike have written, without how long things took."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ispen_dist.recording.metrics_file import read_metrics

TIMINGS = ("examples_per_second", "wait_seconds", "copy_seconds", "previous_write_seconds")


def rows_of(output: Path) -> list[dict]:
    """Return the metrics rows."""
    rows = read_metrics(output / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def events_of(output: Path) -> dict[str, list[tuple[int, float]]]:
    """Return steps and values of scalars and steps of pictures, as TensorBoard shows them."""
    events = EventAccumulator(str(output / "tensorboard"), {"scalars": 0, "images": 0})
    events.Reload()
    shown = {}
    for tag in events.Tags()["scalars"]:
        if tag == "save/previous_write_seconds":
            continue  # the first save of every start has none before it
        is_timing = tag.partition("/")[2] in TIMINGS
        shown[tag] = [(e.step, 0.0 if is_timing else e.value) for e in events.Scalars(tag)]
    for tag in events.Tags()["images"]:
        shown[tag] = [(e.step, 0.0) for e in events.Images(tag)]
    return shown
