"""Multi-label svmlight files: `3,17 0:0.5 8:1`, labels, then features by index.

Parsed by scikit-learn, which does not name lines in its errors; a counting stream puts them back.
The first line may hold the sizes "N D L", as in the extreme classification repository's files.
"""

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.datasets import dump_svmlight_file, load_svmlight_file

from ispen_dist.data.errors import DataError, open_text
from ispen_dist.data.output_file import replacing
from ispen_dist.data.tables import Matrix, MultiLabelTable, dimensions, first_entry, not_finite

_HEADER = re.compile(rb"\s*(\d+)\s+(\d+)\s+(\d+)\s*")


class _CountedLines(io.BytesIO):
    """Lines that count how many of them were handed out."""

    line = 0

    def __iter__(self) -> Iterator[bytes]:
        while text := self.readline():
            self.line += 1
            yield text


def read_svmlight(
    path: str | Path,
    num_features: int | None = None,
    num_labels: int | None = None,
    *,
    zero_based: bool = True,
    labelled: bool = True,
) -> MultiLabelTable:
    """Read sparse feature vectors and label sets; columns are named by their index in the file.

    A line without labels has none; a file without a single label is unlabelled. Blank lines and
    what follows a `#` are skipped.

    Args:
        path: the file, plain or gzip.
        num_features: D; if not given, from the first line "N D L" or the largest index.
        num_labels: L, likewise.
        zero_based: whether feature indices start at zero. Labels always do.
        labelled: whether the labels are read; if not, any numbers may stand in their place.

    Raises:
        DataError: for a malformed line, an index or label out of range, NaN and infinity.
    """
    lines = open_text(path).getvalue().encode().split(b"\n")
    row_lines = [i for i, line in enumerate(lines, 1) if line.partition(b"#")[0].strip()]
    if row_lines and (header := _HEADER.fullmatch(lines[row_lines[0] - 1])):
        sizes = (len(row_lines) - 1, num_features, num_labels)
        num_features, num_labels = _sizes(path, row_lines[0], header, sizes)
        lines[row_lines.pop(0) - 1] = b""
    if not row_lines:
        raise DataError(path, None, "expected at least one row, got none; is the file cut off?")
    features, labels = _loaded(path, lines, zero_based)
    features = _sized(path, features, row_lines, num_features, zero_based)
    targets = _targets(path, labels if labelled else [()] * len(labels), row_lines, num_labels)
    start = 0 if zero_based else 1
    num_features, num_labels = dimensions(features)[1], dimensions(targets)[1]
    return MultiLabelTable(
        features=features,
        targets=targets if targets.nnz else None,
        label_names=tuple(map(str, range(num_labels))),
        feature_names=tuple(map(str, range(start, start + num_features))),
        path=str(path),
    )


def _sizes(
    path: str | Path, line: int, header: re.Match[bytes], known: tuple[int, int | None, int | None]
) -> tuple[int, int]:
    """Return D and L of the first line, which must agree with the rows and the settings."""
    found = tuple(map(int, header.groups()))
    advice = (
        ("rows", "there are", "is the file cut off, or a row blank?"),
        ("features", "the setting says", "change data.num_features"),
        ("labels", "the setting says", "change data.num_labels"),
    )
    for expected, got, (what, source, do) in zip(known, found, advice, strict=True):
        if expected not in (None, got):
            raise DataError(path, line, f"expected {expected} {what} as {source}, got {got}; {do}")
    return found[1], found[2]


def _loaded(
    path: str | Path, lines: list[bytes], zero_based: bool
) -> tuple[sparse.csr_matrix, Sequence[tuple[float, ...]]]:
    stream = _CountedLines(b"\n".join(lines))
    settings: dict[str, Any] = {"dtype": np.float32, "zero_based": zero_based}
    try:
        features, labels = load_svmlight_file(stream, multilabel=True, **settings)
    except (ValueError, OverflowError) as error:
        text = lines[stream.line - 1].decode().strip()
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise DataError(
            path, stream.line, "expected LABEL,LABEL INDEX:VALUE INDEX:VALUE with rising indices "
            f"from {0 if zero_based else 1}, got {shown!r} ({error}); mend the line",
        ) from None  # fmt: skip
    return sparse.csr_matrix(features), labels


def _sized(
    path: str | Path,
    features: sparse.csr_matrix,
    row_lines: list[int],
    num_features: int | None,
    zero_based: bool,
) -> sparse.csr_matrix:
    """Return the features with D columns, after a look at indices and values."""
    start = 0 if zero_based else 1
    num_rows, num_found = dimensions(features)
    size = num_found if num_features is None else num_features
    if (features.indices >= size).any():
        place = int(np.argmax(features.indices >= size))
        row = int(np.searchsorted(features.indptr, place, side="right")) - 1
        raise DataError(
            path, row_lines[row], f"expected feature indices from {start} to {size - 1 + start}, "
            f"got {features.indices[place] + start}; change data.num_features or data.zero_based",
        )  # fmt: skip
    if (entry := first_entry(features, not_finite)) is not None:
        raise DataError(
            path, row_lines[entry.row], "expected a finite number, "
            f"got {entry.value:g} for feature {entry.column + start}; mend or drop the row",
        )  # fmt: skip
    arrays = (features.data, features.indices, features.indptr)
    return sparse.csr_matrix(arrays, shape=(num_rows, size))


def _targets(
    path: str | Path,
    labels: Sequence[tuple[float, ...]],
    row_lines: list[int],
    num_labels: int | None,
) -> sparse.csr_matrix:
    for row, own in zip(row_lines, labels, strict=True):
        if wrong := [label for label in own if label < 0 or not label.is_integer()]:
            found = f"{wrong[0]:g}"
            raise DataError(path, row, f"expected labels as whole numbers from 0, got {found}")
        if num_labels is not None and own and own[-1] >= num_labels:
            raise DataError(
                path, row, f"expected labels from 0 to {num_labels - 1}, got {own[-1]:g}; "
                "change data.num_labels",
            )  # fmt: skip
        if len(set(own)) < len(own):
            raise DataError(path, row, f"expected each label once, got {list(map(int, own))}")
    flat = [int(label) for own in labels for label in own]
    starts = np.cumsum([0, *map(len, labels)])
    size = max(flat, default=-1) + 1 if num_labels is None else num_labels
    ones = np.ones(len(flat), dtype=np.uint8)
    return sparse.csr_matrix((ones, flat, starts), shape=(len(labels), size))


def write_svmlight(
    path: str | Path,
    table: MultiLabelTable,
    predictions: Matrix,
    probabilities: np.ndarray | None = None,
    *,
    zero_based: bool = True,
) -> None:
    """Write the features with predicted labels.

    Probabilities of the predicted labels follow as a comment, which readers skip:
    `3,17 0:0.5 8:1 # 3:0.91 17:0.55`.

    Args:
        path: where to; the file appears when it is whole.
        table: its own targets are not looked at.
        predictions: (N, L) of 0 and 1, dense or sparse.
        probabilities: (N, L) in [0, 1].
        zero_based: whether feature indices start at zero. Labels always do.

    Raises:
        DataError: for another shape or other values.
    """
    targets = table.with_targets(predictions).targets
    assert targets is not None
    if probabilities is not None:
        table.check_probabilities(probabilities)
    buffer = io.BytesIO()
    dump_svmlight_file(table.features, targets, buffer, multilabel=True, zero_based=zero_based)
    with replacing(path) as partial, partial.open("wb") as file:
        for row, line in enumerate(buffer.getvalue().split(b"\n")[:-1]):
            # A line with neither labels nor features would be blank, and skipped by readers.
            text = line.rstrip() or b" %d:0" % (0 if zero_based else 1)
            file.write(text + _comment(targets[row].indices, row, probabilities) + b"\n")


def _comment(labels: np.ndarray, row: int, probabilities: np.ndarray | None) -> bytes:
    if probabilities is None or not len(labels):
        return b""
    pairs = (f" {label}:{probabilities[row, label]:.6g}" for label in labels)
    return f" #{''.join(pairs)}".encode()
