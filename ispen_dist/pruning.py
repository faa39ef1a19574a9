"""Which checkpoints stay: the newest, and the one that holds the best networks.

    checkpoints/best.json    {"step": 120, "dev": 0.4423}

names the first checkpoint that holds the networks that did best on dev so far: that of the very
round where one was due then, otherwise the next. It is a mark for people and for pruning; every
checkpoint is complete without it.
"""

import os
import shutil
import warnings
from pathlib import Path

from ispen_dist.data.output_file import replacing
from ispen_dist.manifest import FOLDER_NAME, CheckpointError, json_bytes, parse_json, read_manifest

BEST = "best.json"
REPLACED = ".replaced"
SAVING, _DELETING = ".saving_", ".deleting_"


def candidates(folder: Path) -> list[Path]:
    """Return the folders with a checkpoint's name, newest first, a replaced one after its heir."""
    if not folder.is_dir():
        return []
    paths = [
        path
        for path in folder.iterdir()
        if FOLDER_NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(paths, key=lambda p: (-step_of(p), p.name.endswith(REPLACED)))


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    match = FOLDER_NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


# -- the best ----------------------------------------------------------------------------------


def mark_best(folder: Path, step: int, dev: float) -> int:
    """Mark the checkpoint of a step, just written, unless an earlier one is as good.

    Returns the marked step.

    Args:
        folder: of the checkpoints.
        step: of the new one.
        dev: the best metric so far, whose networks it holds.
    """
    marked = _read_mark(folder)
    # A later step is of an attempt that this one replaces.
    if marked is not None and marked[0] < step and marked[1] >= dev:
        return marked[0]
    with replacing(folder / BEST) as partial:
        partial.write_bytes(json_bytes({"step": step, "dev": dev}))
    return step


def _read_mark(folder: Path) -> tuple[int, float] | None:
    """Return step and metric of the marked checkpoint, or None where none is there."""
    file = folder / BEST
    try:
        mark = parse_json(file, file.read_bytes())
        step, dev = mark["step"], mark["dev"]
        if type(step) is not int or not isinstance(dev, int | float):
            raise TypeError(f"step {step!r}, dev {dev!r}")
    except FileNotFoundError:
        return None
    except (OSError, CheckpointError, KeyError, TypeError) as error:
        warnings.warn(
            f"{file}: expected step and dev, got {error}; the next checkpoint is marked anew",
            stacklevel=2,
        )
        return None
    return (step, float(dev)) if any(step_of(path) == step for path in candidates(folder)) else None


# -- deleting ----------------------------------------------------------------------------------


def delete_leftovers(folder: Path) -> None:
    """Remove the hidden folders of saves and deletions that were killed."""
    for path in folder.iterdir():
        if path.name.startswith((SAVING, _DELETING)) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def delete_old(folder: Path, step: int, keep: int, spared: int | None = None) -> None:
    """Delete what is older than the newest `keep` complete checkpoints up to `step`.

    The one of `step` was just written and is always among them. A checkpoint with missing or cut
    files does not count, so that damage never pushes out an intact one.

    Args:
        folder: of the checkpoints.
        step: of the newest one.
        keep: how many stay.
        spared: step of one that stays in any case.
    """
    later = [path.name for path in candidates(folder) if step_of(path) > step]
    if later:
        warnings.warn(
            f"{folder}: saved step {step}, but an earlier attempt left {', '.join(later)}, which "
            "an automatic resume would take; delete them if this attempt replaces that one",
            stacklevel=3,
        )
    kept: set[int] = set()
    for path in candidates(folder):
        number = step_of(path)
        if number > step:
            continue
        if number in kept or (len(kept) >= keep and number != spared):
            _try_delete(path)
        elif _looks_complete(path):
            kept.add(number)


def _looks_complete(path: Path) -> bool:
    """Compare sizes alone; hashing every kept checkpoint at every save would cost too much."""
    try:
        files = read_manifest(path)["files"]
        return all((path / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (CheckpointError, OSError):
        return False


def _try_delete(path: Path) -> None:
    try:
        delete_folder(path)
    except OSError as error:
        warnings.warn(f"{path}: old checkpoint not deleted: {error}", stacklevel=4)


def delete_folder(path: Path) -> None:
    """Remove a checkpoint; a kill in between leaves no half one under a final name."""
    doomed = path.with_name(_DELETING + path.name)
    os.rename(path, doomed)
    shutil.rmtree(doomed)
