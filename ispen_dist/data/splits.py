"""Which rows are for training, development and test: from a file, or seeded and declared."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ispen_dist.data.errors import DataError, nearest, open_text

_REQUIRED = ("train", "dev")
_KNOWN = ("train", "dev", "test")


def read_split_file(path: str | Path, num_rows: int) -> dict[str, np.ndarray]:
    """Read a JSON object of zero-based row numbers under train, dev and, if wanted, test.

    Args:
        path: the file.
        num_rows: rows of the data; with several files they are counted through in order.

    Returns:
        Row numbers by name, int64, in the order of the file.

    Raises:
        DataError: for other JSON, missing or unknown names, and for rows that are no whole
            numbers, out of range, or named twice.
    """
    content = _content(path)
    owner = np.full(num_rows, -1, dtype=np.int64)
    rows = {}
    for place, (name, values) in enumerate(content.items()):
        rows[name] = _checked(path, name, values, num_rows)
        _claim(path, rows[name], place, owner, list(content))
    return rows


def split_names(path: str | Path) -> list[str]:
    """Return the parts that a split file has; their rows are not looked at.

    Raises:
        DataError: for other JSON, missing or unknown names.
    """
    return list(_content(path))


def _content(path: str | Path) -> dict[str, Any]:
    content = _parsed(path)
    _check_names(path, content)
    return content


def _parsed(path: str | Path) -> Any:
    try:
        return json.load(open_text(path), object_pairs_hook=lambda pairs: _object(path, pairs))
    except DataError:
        raise
    except json.JSONDecodeError as error:
        raise DataError(
            path, error.lineno, f"expected JSON, got: {error.msg} at column {error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:  # A number or a nesting that is too long.
        raise DataError(path, None, f"expected lists of row numbers, got: {error}") from None


def _object(path: str | Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise DataError(path, None, f"expected each name once, got {name!r} twice; join them")
    return dict(pairs)


def _check_names(path: str | Path, content: object) -> None:
    if not isinstance(content, dict):
        raise DataError(
            path, None, f"expected an object with train, dev and test, got {_kind(content)}"
        )
    for name in _REQUIRED:
        if name not in content:
            found = ", ".join(map(repr, content)) or "none"
            raise DataError(
                path, None, f"expected the names train and dev, got {found}; add {name}"
            )
    for name in content:
        if name not in _KNOWN:
            raise DataError(
                path, None, f"expected the names train, dev and test, got {name!r}; "
                f"the nearest is {nearest(name, _KNOWN)!r}",
            )  # fmt: skip


def _checked(path: str | Path, name: str, values: object, num_rows: int) -> np.ndarray:
    if not isinstance(values, list) or not values:
        found = "an empty list" if values == [] else _kind(values)
        raise DataError(path, None, f"{name}: expected a list of row numbers, got {found}")
    for place, value in enumerate(values):
        # JSON's true is an int to Python.
        if type(value) is not int:
            raise DataError(
                path, None, f"{name}[{place}]: expected a whole number, got {json.dumps(value)}"
            )
        if not 0 <= value < num_rows:
            raise DataError(
                path, None, f"{name}[{place}]: expected a row from 0 to {num_rows - 1}, "
                f"got {value}; rows count from zero through all files",
            )  # fmt: skip
    return np.array(values, dtype=np.int64)


def _claim(
    path: str | Path, rows: np.ndarray, place: int, owner: np.ndarray, names: list[str]
) -> None:
    """Mark rows as belonging to one part, none of them twice and none of another part's."""
    distinct, counts = np.unique(rows, return_counts=True)
    if (counts > 1).any():
        row = distinct[counts > 1][0]
        raise DataError(path, None, f"{names[place]}: expected each row once, got {row} twice")
    taken = rows[owner[rows] >= 0]
    if len(taken):
        raise DataError(
            path, None, f"{names[place]}: expected rows of no other part, got {taken[0]}, which "
            f"{names[owner[taken[0]]]} has too; {len(taken)} such rows",
        )  # fmt: skip
    owner[rows] = place


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    return names.get(type(value), "null" if value is None else "a number")


def seeded_split(num_rows: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a fraction of the rows.

    The rows held out are the first max(1, floor(fraction * num_rows + 1/2)) of
    `numpy.random.Generator(PCG64(seed)).permutation(num_rows)`, but never all.

    Args:
        num_rows: rows to divide, at least 2.
        fraction: share to hold out, between 0 and 1.
        seed: of the permutation.

    Returns:
        Rows kept and rows held out, int64, each sorted and neither empty.

    Example:
        >>> kept, held_out = seeded_split(5, 0.4, seed=0)
        >>> len(kept), len(held_out), sorted([*kept, *held_out]) == [0, 1, 2, 3, 4]
        (3, 2, True)
    """
    if num_rows < 2:
        raise ValueError(f"num_rows: expected at least 2 rows to divide, got {num_rows}")
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction: expected a number between 0 and 1, got {fraction}")
    size = min(max(1, int(fraction * num_rows + 0.5)), num_rows - 1)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(num_rows)
    return np.sort(order[size:]), np.sort(order[:size])
