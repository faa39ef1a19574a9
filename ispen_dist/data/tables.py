"""What the readers return: sentences with tags, and tables of features and label sets.

Shape suffixes: N examples, D features, L labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from scipy import sparse

from ispen_dist.data.errors import DataError

Matrix: TypeAlias = np.ndarray | sparse.csr_matrix


@dataclass(frozen=True)
class Sentence:
    """Tokens of one sentence.

    Attributes:
        tokens: at least one.
        tags: one for each token, or None where the data is unlabelled.
        line: one-based line of the first token.
        token_lines: line of every token; empty where they follow each other without a gap.
    """

    tokens: tuple[str, ...]
    tags: tuple[str, ...] | None
    line: int
    token_lines: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("Sentence.tokens: expected at least one token, got none")
        for name, values in (("tags", self.tags), ("token_lines", self.token_lines or None)):
            if values is not None and len(values) != len(self.tokens):
                raise ValueError(
                    f"Sentence.{name}: expected {len(self.tokens)}, one for each token, "
                    f"got {len(values)}"
                )

    def line_of(self, position: int) -> int:
        """Return the line of the token at a position.

        Example:
            >>> Sentence(("all", "good"), None, line=7).line_of(1)
            8
        """
        return self.token_lines[position] if self.token_lines else self.line + position


def dimensions(matrix: Matrix) -> tuple[int, int]:
    """Return the numbers of rows and columns."""
    shape = matrix.shape
    # SciPy's declaration allows None.
    assert shape is not None
    return shape[0], shape[1]


@dataclass(frozen=True)
class Entry:
    """One number of a matrix: where it stands, counted from zero, and its value."""

    row: int
    column: int
    value: float


def first_entry(matrix: Matrix, is_wrong: Callable[[np.ndarray], np.ndarray]) -> Entry | None:
    """Return the first stored number, row by row, for which the predicate holds, or None.

    Args:
        matrix: dense or CSR.
        is_wrong: maps an array of values to an array of booleans of the same shape.
    """
    values = matrix.data if isinstance(matrix, sparse.csr_matrix) else matrix.ravel()
    wrong = is_wrong(values)
    if not wrong.any():
        return None
    place = int(np.argmax(wrong))
    if isinstance(matrix, sparse.csr_matrix):
        row = int(np.searchsorted(matrix.indptr, place, side="right")) - 1
        return Entry(row, int(matrix.indices[place]), values[place].item())
    row, column = divmod(place, dimensions(matrix)[1])
    return Entry(row, column, values[place].item())


def not_finite(values: np.ndarray) -> np.ndarray:
    """Return where values are NaN or infinite."""
    return ~np.isfinite(values)


def not_binary(values: np.ndarray) -> np.ndarray:
    """Return where values are neither 0 nor 1."""
    return (values != 0) & (values != 1)


@dataclass(frozen=True, eq=False)
class MultiLabelTable:
    """Feature vectors with their label sets.

    Attributes:
        features: (N, D) float32, dense or CSR, finite.
        targets: (N, L) uint8 CSR of 0 and 1, or None where the data is unlabelled.
        label_names: names of the L labels.
        feature_names: names of the D features.
        path: the file it was read from, for messages.
    """

    features: Matrix
    targets: sparse.csr_matrix | None
    label_names: tuple[str, ...]
    feature_names: tuple[str, ...]
    path: str = "(in memory)"

    def __post_init__(self) -> None:
        num_rows = len(self)
        self._check_matrix("features", self.features, np.float32, num_rows, self.feature_names)
        if self.targets is not None:
            self._check_matrix("targets", self.targets, np.uint8, num_rows, self.label_names)
            self._check_values("targets", self.targets, not_binary, "0 or 1")
        self._check_values("features", self.features, not_finite, "a finite number")

    def _check_matrix(
        self, name: str, matrix: Matrix, dtype: type, num_rows: int, names: tuple[str, ...]
    ) -> None:
        expected = (num_rows, len(names))
        if matrix.shape != expected or matrix.dtype != dtype:
            raise DataError(
                self.path, None, f"{name}: expected {expected} {np.dtype(dtype)}, "
                f"got {matrix.shape} {matrix.dtype}",
            )  # fmt: skip
        if len(set(names)) != len(names):
            twice = next(word for word in names if names.count(word) > 1)
            raise DataError(
                self.path, None, f"{name}: expected distinct column names, got {twice!r} twice"
            )

    def _check_values(
        self,
        name: str,
        matrix: Matrix,
        is_wrong: Callable[[np.ndarray], np.ndarray],
        expected: str,
    ) -> None:
        if (entry := first_entry(matrix, is_wrong)) is not None:
            raise DataError(
                self.path, None, f"{name} row {entry.row}, column {entry.column}: "
                f"expected {expected}, got {entry.value:g}; mend or drop the row",
            )  # fmt: skip

    def __len__(self) -> int:
        """N."""
        return dimensions(self.features)[0]

    def rows(self, indices: Sequence[int] | np.ndarray) -> "MultiLabelTable":
        """Return the table of the given rows, in the given order."""
        chosen = np.asarray(indices, dtype=np.int64)
        targets = None if self.targets is None else self.targets[chosen]
        return replace(self, features=self.features[chosen], targets=targets)

    def with_targets(self, targets: Matrix) -> "MultiLabelTable":
        """Return the table with other label sets, for writing predictions.

        Args:
            targets: (N, L) of 0 and 1 in any type, dense or sparse.

        Raises:
            DataError: for another shape and for other values.
        """
        if (entry := first_entry(sparse.csr_matrix(targets), not_binary)) is not None:
            # Before the cast to uint8, which would make 256 a zero.
            raise DataError(
                self.path, None, f"row {entry.row}, label {entry.column}: expected 0 or 1, "
                f"got {entry.value:g}; apply the threshold first",
            )  # fmt: skip
        return replace(self, targets=sparse.csr_matrix(targets, dtype=np.uint8))

    def check_probabilities(self, probabilities: np.ndarray) -> None:
        """Raise unless these are (N, L) numbers in [0, 1].

        Raises:
            DataError: with what was found instead.
        """
        expected = (len(self), len(self.label_names))
        if probabilities.shape != expected:
            raise DataError(
                self.path, None, f"probabilities: expected shape {expected}, "
                f"got {probabilities.shape}",
            )  # fmt: skip
        if (entry := first_entry(probabilities, lambda p: ~((p >= 0) & (p <= 1)))) is not None:
            raise DataError(
                self.path, None, f"probabilities row {entry.row}, label {entry.column}: "
                f"expected a number in [0, 1], got {entry.value:g}",
            )  # fmt: skip

    def check_columns(self, label_names: Sequence[str], feature_names: Sequence[str]) -> None:
        """Raise unless the columns are these, in this order.

        The labels of unlabelled data are not looked at.

        Raises:
            DataError: with the first column that differs.
        """
        if self.targets is not None:
            self._check_names("label", self.label_names, label_names)
        self._check_names("feature", self.feature_names, feature_names)

    def _check_names(self, kind: str, own: Sequence[str], expected: Sequence[str]) -> None:
        if tuple(own) == tuple(expected):
            return
        if len(own) != len(expected):
            problem = f"expected {len(expected)} {kind}s, got {len(own)}"
        else:
            place = next(i for i, name in enumerate(own) if name != expected[i])
            problem = f"expected {kind} {place} to be {expected[place]!r}, got {own[place]!r}"
        raise DataError(
            self.path, None, f"{problem}; use files with the same columns in the same order"
        )

    def concatenate(self, others: Sequence["MultiLabelTable"]) -> "MultiLabelTable":
        """Return this table with the rows of others below it, as split files count them.

        Raises:
            DataError: where columns differ, or only some of the tables are labelled.
        """
        for other in others:
            if (other.targets is None) != (self.targets is None):
                pair = ("no labels", "some") if self.targets is None else ("labels", "none")
                raise DataError(
                    other.path, None, f"expected {pair[0]}, as in {self.path}, got {pair[1]}; "
                    "label all files or none of them",
                )  # fmt: skip
            other.check_columns(self.label_names, self.feature_names)
        if not others:
            return self
        tables = [self, *others]
        targets = [table.targets for table in tables if table.targets is not None]
        return replace(
            self,
            features=_stacked([table.features for table in tables]),
            targets=_stacked(targets) if targets else None,
        )


def _stacked(parts: Sequence[Matrix]) -> Matrix:
    dense = [part for part in parts if isinstance(part, np.ndarray)]
    if len(dense) == len(parts):
        return np.concatenate(dense)
    return sparse.csr_matrix(sparse.vstack(parts, format="csr"))
