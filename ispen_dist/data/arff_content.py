"""The rows of an ARFF file as numbers, with the line each stands on.

Format: https://www.cs.waikato.ac.nz/ml/weka/arff.html, dense and sparse; parsed by liac-arff, whose
generators are fast enough (bibtex-train 0.5 s, delicious-train 0.7 s on one core of a 2-core x86
machine) but leave the line out of their errors. A counting stream puts it back.
"""

import csv
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any, TypeVar

import arff
import numpy as np
from scipy import sparse

from ispen_dist.data.errors import DataError, open_text
from ispen_dist.data.tables import Entry, Matrix

_KEYWORD = re.compile(r"(@relation|@attribute|@data)(?:\s+|$)", re.IGNORECASE)
_INTEGER = re.compile(r"\sinteger\s*$", re.IGNORECASE)
_INDEX = re.compile(r"[{,]\s*(\d+)")
_LINE_NUMBER = re.compile(r",? (?:at|in) line ")
_EXPECTED = {
    arff.BadRelationFormat: "@relation NAME, the name in quotes if it has blanks",
    arff.BadAttributeFormat: "@attribute NAME TYPE",
    arff.BadAttributeType: "an attribute of type numeric, real, integer or {0,1}",
    arff.BadAttributeName: "each attribute name once",
    arff.BadNominalValue: "values that the attributes declare",
    arff.BadNumericalValue: "numbers",
}


class _Stream:
    """The lines of one ARFF file on their way to liac-arff.

    Three things are different in the header: liac-arff wants a blank, not a tab, after a keyword,
    passes over lines it does not know, so that an attribute may be missing without a word, and cuts
    the fraction off what is declared an integer, so that a label of 0.5 would pass as 0.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.lines = open_text(path).readlines()
        self.line = 0
        self.text = ""
        self.attribute_lines: list[int] = []
        self.in_header = True

    def __iter__(self) -> Iterator[str]:
        for line, text in enumerate(self.lines, start=1):
            self.line, self.text = line, text
            yield self._smoothed() if self.in_header else text

    def _smoothed(self) -> str:
        text = self.text.strip()
        if not text or text.startswith("%"):
            return text
        keyword = _KEYWORD.match(text)
        if keyword is None:
            raise self.error("@relation, @attribute or @data", self.shown())
        self.in_header = keyword[1].lower() != "@data"
        if keyword[1].lower() == "@attribute":
            self.attribute_lines.append(self.line)
            text = _INTEGER.sub(" numeric", text)
        return _KEYWORD.sub(r"\1 ", text)

    def error(self, expected: str, got: str, do: str = "mend the line") -> DataError:
        """Return the error of the current line."""
        return DataError(self.path, self.line, f"expected {expected}, got {got}; {do}")

    def shown(self) -> str:
        """Return the beginning of the current line, for messages."""
        text = self.text.strip()
        return repr(text if len(text) <= 60 else text[:57] + "...")


@dataclass(frozen=True)
class ArffContent:
    """The rows of one file.

    Attributes:
        path: the file.
        matrix: (N, A) float32 over all attributes, labels or not; infinite where float32 overflows.
        names: of the A attributes.
        row_lines: one-based line of each row.
    """

    path: str | Path
    matrix: Matrix
    names: list[str]
    row_lines: list[int]

    def error(self, entry: Entry, expected: str) -> DataError:
        """Return the error of one number."""
        value = f"{entry.value:g} in attribute {self.names[entry.column]!r}"
        return DataError(
            self.path, self.row_lines[entry.row],
            f"expected {expected}, got {value}; mend or drop the row",
        )  # fmt: skip


def read_content(path: str | Path, may_miss: Collection[str] = ()) -> ArffContent:
    """Read a dense or sparse file whose attributes are all numbers, nominal ones such as {0,1} too.

    Args:
        path: the file, plain or gzip.
        may_miss: attributes whose missing values are read as 0.

    Raises:
        DataError: for an unreadable file, a malformed row, missing values and other than numbers.
    """
    stream = _Stream(path)
    is_sparse = _is_sparse(stream)
    kind = arff.LOD_GEN if is_sparse else arff.DENSE_GEN
    content = _guarded(stream, lambda: arff.ArffDecoder().decode(stream, return_type=kind))
    names = [name for name, _ in content["attributes"]]
    if is_sparse:
        _check_omitted_values(stream, content["attributes"])
    row_lines: list[int] = []
    rows = _rows(stream, content["data"], names, frozenset(may_miss), row_lines)
    matrix = _sparse_matrix(rows, len(names)) if is_sparse else _dense_matrix(rows)
    return ArffContent(path, matrix, names, row_lines)


def _is_sparse(stream: _Stream) -> bool:
    """Return whether the first row is sparse, and that there is one."""
    lines = (line.strip() for line in stream.lines)
    rows = dropwhile(lambda line: not line.lower().startswith("@data"), lines)
    next(rows, None)
    first = next((row for row in rows if row and not row.startswith("%")), None)
    if first is None:
        raise DataError(
            stream.path, None, "expected rows after a line @data, got none; is the file cut off?"
        )
    return first.startswith("{")


_Parsed = TypeVar("_Parsed")


def _guarded(stream: _Stream, parse: Callable[[], _Parsed]) -> _Parsed:
    """Return what liac-arff parses; its errors get the file and the line."""
    try:
        return parse()
    except DataError:
        raise
    except arff.BadDataFormat:
        raise _bad_size(stream) from None
    except (arff.ArffException, csv.Error, IndexError, ValueError) as error:
        expected = _EXPECTED.get(type(error), "well-formed ARFF")
        # Not str(error): liac-arff formats its message with a line that it does not know here.
        reason = _LINE_NUMBER.split(getattr(error, "message", None) or str(error))[0]
        raise stream.error(expected, f"{stream.shown()} ({reason})") from None


def _bad_size(stream: _Stream) -> DataError:
    number, row = len(stream.attribute_lines), stream.text.strip()
    if row.startswith("{"):
        largest = max(map(int, _INDEX.findall(row)))
        return stream.error(f"attribute indices from 0 to {number - 1}", str(largest))
    return stream.error(f"{number} values, one for each attribute", str(row.count(",") + 1))


def _check_omitted_values(stream: _Stream, attributes: list[tuple[str, Any]]) -> None:
    """Raise if what a sparse row leaves out, the first declared value, would not be zero."""
    for line, (name, kind) in zip(stream.attribute_lines, attributes, strict=True):
        if isinstance(kind, list) and kind[0] not in ("0", "0.0"):
            raise DataError(
                stream.path, line, f"expected 0 as the first value of {name!r} in a sparse file, "
                f"got {kind[0]!r}; declare it as {{0,1}} or numeric",
            )  # fmt: skip


_Row = tuple[Sequence[int], list[float]]


def _rows(
    stream: _Stream,
    data: Iterator[Any],
    names: list[str],
    may_miss: frozenset[str],
    row_lines: list[int],
) -> Iterator[_Row]:
    """Yield columns and values of each row, and note the lines they stand on."""
    while (row := _guarded(stream, lambda: next(data, None))) is not None:
        row_lines.append(stream.line)
        if not isinstance(row, dict):
            yield range(len(row)), _numbers(stream, range(len(row)), row, names, may_miss)
            continue
        yield list(row), _numbers(stream, list(row), row.values(), names, may_miss)
        if row and stream.text.count(",") + 1 != len(row):
            raise stream.error("each attribute index once", f"{stream.shown()} with one twice")


def _numbers(
    stream: _Stream,
    columns: Sequence[int],
    values: Iterable[Any],
    names: list[str],
    may_miss: frozenset[str],
) -> list[float]:
    if may_miss:
        pairs = zip(columns, values, strict=True)
        values = [0 if v is None and names[column] in may_miss else v for column, v in pairs]
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError):
        for column, value in zip(columns, values, strict=True):
            if value is None:
                where = f"a missing value in attribute {names[column]!r}"
                raise stream.error("a number", where, "fill it in or drop the row") from None
            if not _is_number(value):
                where = f"{value!r} in attribute {names[column]!r}"
                raise stream.error("a number", where, "encode it as numbers") from None
        raise


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _dense_matrix(rows: Iterable[_Row]) -> np.ndarray:
    return _float32([values for _, values in rows])


def _sparse_matrix(rows: Iterable[_Row], num_columns: int) -> sparse.csr_matrix:
    indices: list[int] = []
    data: list[float] = []
    starts = [0]
    for columns, values in rows:
        indices += columns
        data += values
        starts.append(len(indices))
    shape = (len(starts) - 1, num_columns)
    matrix = sparse.csr_matrix((_float32(data), indices, starts), shape=shape)
    matrix.sort_indices()
    return matrix


def _float32(values: list[Any]) -> np.ndarray:
    # What is too large becomes infinite and is found by the check that follows.
    with np.errstate(over="ignore"):
        return np.array(values, dtype=np.float64).astype(np.float32)
