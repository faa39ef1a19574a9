"""Checkpoints: folders of safetensors and JSON that survive kills, full disks and flipped bits.

    checkpoints/step_00000120/
        NAME.safetensors    one file per tree of tensors
        state.json          everything that is not a tensor
        manifest.json       format version, step, SHA-256 and size of every file, order of keys
    checkpoints/best.json   which one holds the best networks, see `ispen_dist.pruning`

A save writes into a hidden folder beside the final one, syncs it, writes the manifest last and
renames. A folder under its final name is therefore complete, and whatever damages it later
disagrees with its manifest (see `ispen_dist.manifest`). Nothing is pickled: loading runs no code
from the files. One process saves at a time.
"""

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ispen_dist.manifest import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST,
    STATE,
    TREE_NAME,
    CheckpointError,
    check_json,
    damaged,
    json_bytes,
    parse_json,
    read_manifest,
    sync_folder,
    tree_file,
    verified_files,
    write_file,
)
from ispen_dist.pruning import (
    REPLACED,
    SAVING,
    candidates,
    delete_folder,
    delete_leftovers,
    delete_old,
    mark_best,
)

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "find_checkpoint",
    "load_checkpoint",
    "save_checkpoint",
]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, on the CPU.

    Attributes:
        step: when it was saved.
        trees: tensors by tree and key; the keys of a tree keep the order they were saved in.
        state: everything else, as JSON gives it back (tuples have become lists).
    """

    step: int
    trees: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


# -- saving ------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    step: int,
    trees: Mapping[str, dict[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    best: float | None = None,
) -> Path:
    """Write a checkpoint and delete old ones; return its path.

    Tensors are stored bit for bit. Those that share memory are written out in full under each
    name. A checkpoint of the same step is replaced; checkpoints of later steps, which an earlier
    attempt left behind, are reported and never deleted.

    Args:
        folder: where the checkpoints of a run lie; made if missing, but not the run's folder: one
            that has vanished is an error.
        step: when this is.
        trees: dense tensors by tree and key; a tree may be empty.
        state: JSON values with string keys. NaN and infinity are refused: JSON has neither, and
            null in their place would resume as another state.
        keep: how many of the newest checkpoints to keep, this one included; at least 1.
        best: the best metric on dev so far, whose networks are among the trees; the checkpoint
            that was the first with them is marked and kept as well. None marks and spares none.

    Raises:
        ValueError: if an argument cannot be stored; nothing was written.
        OSError: if the disk is full or fails; the older checkpoints are as they were, and there
            is no folder under the final name.
    """
    _check_arguments(step, trees, state, keep)
    folder.mkdir(exist_ok=True)
    delete_leftovers(folder)
    final = folder / f"step_{step:08d}"
    temporary = folder / f"{SAVING}{final.name}"
    try:
        _write_folder(temporary, step, trees, state)
        _move_into_place(temporary, final)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        error.add_note(f"{final}: the save did not finish; older checkpoints are as they were")
        raise
    spared = None if best is None else mark_best(folder, step, best)
    delete_old(folder, step, keep, spared)
    return final


def _check_arguments(
    step: int, trees: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any], keep: int
) -> None:
    if step < 0:
        raise ValueError(f"step: expected 0 or more, got {step}")
    if keep < 1:
        raise ValueError(f"keep: expected 1 or more, got {keep}; a run needs one to resume from")
    for name in trees:
        if not TREE_NAME.fullmatch(name):
            raise ValueError(
                f"tree {name!r}: expected a name of letters, digits, '_', '-' and '.', because it "
                "becomes a file name; rename it"
            )
    check_json(dict(state), "state")


def _write_folder(
    path: Path, step: int, trees: Mapping[str, dict[str, Tensor]], state: Mapping[str, Any]
) -> None:
    path.mkdir()
    files = {STATE: write_file(path / STATE, json_bytes(dict(state)))}
    for name, tree in trees.items():
        file_name = tree_file(name)
        files[file_name] = write_file(path / file_name, _tree_bytes(tree))
    sync_folder(path)
    manifest = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "step": step,
        "files": files,
        # safetensors sorts its keys, while arithmetic on trees pairs values in order.
        "trees": {name: list(tree) for name, tree in trees.items()},
    }
    write_file(path / MANIFEST, json_bytes(manifest))
    sync_folder(path)


def _tree_bytes(tree: dict[str, Tensor]) -> bytes:
    # Always a copy: safetensors refuses tensors that are strided or share memory.
    copies = {
        key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in tree.items()
    }
    return safetensors.torch.save(copies)


def _move_into_place(temporary: Path, final: Path) -> None:
    """Rename the finished folder, keeping a namesake findable until the new one stands."""
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        if replaced.exists():
            delete_folder(replaced)
        os.rename(final, replaced)
    try:
        os.rename(temporary, final)
    except OSError:
        if replaced.exists() and not final.exists():
            os.rename(replaced, final)
        raise
    sync_folder(final.parent)


# -- finding and loading -----------------------------------------------------------------------


def find_checkpoint(folder: Path) -> Path | None:
    """Return the intact checkpoint of the highest step, or None.

    The step is read from the folder's name; links are not followed. Every file is hashed and
    parsed. A damaged checkpoint is skipped with a warning that names the file.
    """
    for path in candidates(folder):
        try:
            for _ in _contents(path, read_manifest(path)):
                pass
        except CheckpointError as error:
            warnings.warn(f"skipping a damaged checkpoint: {error}", stacklevel=2)
        else:
            return path
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after checking every file against the manifest.

    The bytes that were hashed are the bytes that are parsed; no tensor refers to the files.

    Raises:
        CheckpointError: if a file is missing, cut, changed or of an unknown format version.
    """
    manifest = read_manifest(path)
    contents = dict(_contents(path, manifest))
    state = contents.pop(STATE)
    trees = {name: contents[tree_file(name)] for name in manifest["trees"]}
    return Checkpoint(manifest["step"], trees, state)


def _contents(path: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every tree and the state by the names of their files, one at a time."""
    keys = {tree_file(name): keys for name, keys in manifest["trees"].items()}
    for name, data in verified_files(path, manifest):
        if name == STATE:
            yield name, parse_json(path / name, data)
        else:
            yield name, _parse_tree(path / name, data, keys[name])


def _parse_tree(file: Path, data: bytes, keys: list[str]) -> dict[str, Tensor]:
    try:
        tree = safetensors.torch.load(data)
    except SafetensorError as error:
        raise damaged(file, "safetensors", str(error)) from error
    if sorted(tree) != sorted(keys):
        raise damaged(file, f"tensors {sorted(keys)}", str(sorted(tree)))
    return {key: tree[key] for key in keys}
