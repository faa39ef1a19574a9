"""What the tests of readers share: how an error must read, and label sets as lists."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ispen_dist.data.errors import DataError
from ispen_dist.data.tables import MultiLabelTable


def check_error(
    read: Callable[[], Any], path: Path, line: int | None, expected: str, got: str
) -> None:
    """The error has file and line as fields and in front, then what was expected, then found."""
    with pytest.raises(DataError) as caught:
        read()
    error = caught.value
    assert (error.path, error.line) == (str(path), line)
    where = str(path) if line is None else f"{path}:{line}"
    assert str(error) == f"{where}: {error.problem}"
    before, separator, after = error.problem.partition(", got")
    assert separator, error.problem
    assert "expected" in before
    assert expected in before, error.problem
    assert got in after, error.problem


def labels_of(table: MultiLabelTable) -> list[list[int]]:
    assert table.targets is not None
    return table.targets.toarray().tolist()
