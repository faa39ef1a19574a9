"""The manifest of a checkpoint: what its files must be, and reading none that differ.

    {"format": "ispen-dist checkpoint", "version": 1, "step": 120,
     "files": {"NAME.safetensors": {"bytes": 1024, "sha256": "..."}, "state.json": {...}},
     "trees": {"NAME": ["first key", "second key"]}}

Neither safetensors nor JSON notices a flipped bit inside a number; a hash does. A change of this
layout takes a new version number.
"""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORMAT_NAME = "ispen-dist checkpoint"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
STATE = "state.json"

FOLDER_NAME = re.compile(r"step_(\d{8,})(\.replaced)?")
TREE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class CheckpointError(ValueError):
    """A checkpoint that must not be used; the message names the file and says what to do."""


def tree_file(name: str) -> str:
    """Return the file name of a tree."""
    return f"{name}.safetensors"


def check_json(value: object, where: str) -> None:
    """Raise unless JSON gives the value back as it is, but for tuples."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(
            f"{where}: expected a finite number, got {value}; leave it out or use None"
        )
    if value is None or isinstance(value, bool | int | float | str):
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: expected string keys, got {key!r}; convert it")
            check_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            check_json(item, f"{where}[{i}]")
    else:
        raise ValueError(
            f"{where}: expected a JSON value, got {type(value).__name__}; put tensors into trees"
        )


def json_bytes(value: dict[str, Any]) -> bytes:
    """Return JSON with sorted keys; a value means the same bytes every time."""
    text = json.dumps(value, sort_keys=True, indent=1, allow_nan=False)
    return (text + "\n").encode("ascii")


def write_file(path: Path, data: bytes) -> dict[str, Any]:
    """Write through to the disk and return the manifest's entry.

    The hash is of the bytes in memory, so that a faulty write is found as well.
    """
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def sync_folder(path: Path) -> None:
    """Write the names in a folder through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verified_files(path: Path, manifest: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Yield every file that the manifest lists with its contents, one at a time in memory.

    Raises:
        CheckpointError: at the first file that is missing or differs in size or hash.
    """
    for name, entry in manifest["files"].items():
        data = _read(path / name)
        if len(data) != entry["bytes"]:
            raise damaged(path / name, f"{entry['bytes']} bytes", f"{len(data)} bytes")
        digest = hashlib.sha256(data).hexdigest()
        if digest != entry["sha256"]:
            raise damaged(path / name, f"SHA-256 {entry['sha256']}", digest)
        yield name, data


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint folder after checking its form.

    Raises:
        CheckpointError: if it is missing, broken, of another version or of another step.
    """
    file = path / MANIFEST
    manifest = parse_json(file, _read(file))
    if manifest.get("format") != FORMAT_NAME:
        raise damaged(file, f"format {FORMAT_NAME!r}", repr(manifest.get("format")))
    if manifest.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: expected format version {FORMAT_VERSION}, got "
            f"{manifest.get('version')!r}; load it with the release of ispen-dist that wrote it"
        )
    _check_manifest(file, manifest)
    return manifest


def _check_manifest(file: Path, manifest: dict[str, Any]) -> None:
    step, files, trees = (manifest.get(key) for key in ("step", "files", "trees"))
    if type(step) is not int or not isinstance(files, dict) or not isinstance(trees, dict):
        raise damaged(file, "a step, files and trees", ", ".join(manifest))
    named = FOLDER_NAME.fullmatch(file.parent.name)
    if named and int(named[1]) != step:
        raise damaged(file, f"step {int(named[1])} as in the folder's name", f"step {step}")
    expected = {STATE, *map(tree_file, trees)}
    # The file names follow from checked tree names, so none leads out of the folder.
    if set(files) != expected or not all(map(TREE_NAME.fullmatch, trees)):
        raise damaged(file, f"files {sorted(expected)}", f"{sorted(files)}")
    for name, entry in files.items():
        if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise damaged(file, f"bytes and sha256 of {name}", repr(entry))
    for name, keys in trees.items():
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise damaged(file, f"a list of keys of {name}", repr(keys))


def _read(file: Path) -> bytes:
    """Return the content of a regular file; a link may lead anywhere, and a pipe never ends."""
    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            raise damaged(file, "a regular file", "a link, a folder or a device")
        return file.read_bytes()
    except OSError as error:
        raise damaged(file, "a readable file", error.strerror or str(error)) from error


def parse_json(file: Path, data: bytes) -> dict[str, Any]:
    """Return a JSON object that was read from a file."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise damaged(file, "JSON", str(error)) from error
    if not isinstance(value, dict):
        raise damaged(file, "a JSON object", type(value).__name__)
    return value


def damaged(file: Path, expected: str, got: str) -> CheckpointError:
    """Return the error for a file that is not as it was saved."""
    return CheckpointError(
        f"{file}: expected {expected}, got {got}; the checkpoint is damaged or unfinished, resume "
        "from another one or restore it from a copy"
    )
