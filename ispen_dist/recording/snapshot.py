"""The code of a run as it was when the run was asked for, kept in the run folder."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

PARTS = {"ispen_dist": "ispen_dist", "kernels": "ispen_kernels", "launcher": "launcher"}
"""Folders of the repository, and where they go: packages under the names they are imported by."""


def save_code(root: Path, target: Path) -> None:
    """Copy the code below a root, so that `target` can be put on PYTHONPATH.

    In a git repository these are the files that git knows or would add, as they are now, beside
    `commit.txt` and, where they differ from the commit, `changes.diff`. Elsewhere all files.

    Args:
        root: the repository, or another folder that holds `PARTS`.
        target: folder to make.
    """
    for path in _files(root):
        first, *rest = path.parts
        copy = target.joinpath(PARTS[first], *rest)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / path, copy)
    commit = _git(root, "rev-parse", "HEAD")
    if commit:
        changed = _git(root, "status", "--short", "--", *PARTS)
        (target / "commit.txt").write_text(commit + changed, "utf-8")
    if difference := _git(root, "diff", "HEAD", "--binary", "--", *PARTS):
        (target / "changes.diff").write_text(difference, "utf-8")


def _files(root: Path) -> Iterator[Path]:
    """Yield the files of the parts, relative to the root."""
    options = ("--cached", "--others", "--exclude-standard", "-z")
    known = [
        Path(name) for name in _git(root, "ls-files", *options, "--", *PARTS).split("\0") if name
    ]
    found = known or [path.relative_to(root) for part in PARTS for path in (root / part).rglob("*")]
    for path in found:
        if (root / path).is_file() and "__pycache__" not in path.parts:
            yield path


def _git(root: Path, *arguments: str) -> str:
    """Return what git prints, or nothing where there is no git or no repository."""
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
