"""Multi-label tables as NumPy archives. Pickled objects in them are never loaded.

Keys: `features` (N, D) and `targets` (N, L) of 0 and 1, numbers of any type; `label_names` (L,) and
`feature_names` (D,) as strings, numbers in their place where they are left out. A file without
targets is unlabelled. Other keys are not read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from scipy import sparse

from ispen_dist.data.archives import array_of, numbers_of, open_archive
from ispen_dist.data.errors import DataError
from ispen_dist.data.output_file import replacing
from ispen_dist.data.tables import Matrix, MultiLabelTable, first_entry, not_binary, not_finite

_TABLE = "row column"


def read_npz(
    path: str | Path, label_names: Sequence[str] | None = None, *, labelled: bool = True
) -> MultiLabelTable:
    """Read dense feature vectors and label sets.

    Args:
        path: the file.
        label_names: labels of a trained model; the file's own must be the same, if it has any.
        labelled: whether the targets are read.

    Raises:
        DataError: for arrays of objects, other shapes, and NaN, infinity or other targets than 0
            and 1, with the zero-based row.
    """
    archive = open_archive(path, "features=..., targets=...")
    features = numbers_of(path, archive, "features", _TABLE)
    has_targets = labelled and "targets" in archive
    targets = numbers_of(path, archive, "targets", _TABLE) if has_targets else None
    if targets is not None and len(targets) != len(features):
        raise DataError(
            path, None, f"targets: expected {len(features)} rows, as features has, "
            f"got {len(targets)}; write both from the same examples",
        )  # fmt: skip
    with np.errstate(over="ignore"):
        features = features.astype(np.float32)
    _check(path, "features", features, "a finite number")
    if targets is not None:
        _check(path, "targets", targets, "0 or 1")
    return MultiLabelTable(
        features=features,
        targets=None if targets is None else sparse.csr_matrix(targets.astype(np.uint8)),
        label_names=_label_names(path, archive, targets, label_names),
        feature_names=_names(path, archive, "feature_names", features.shape[1]),
        path=str(path),
    )


def _check(path: str | Path, key: str, matrix: np.ndarray, expected: str) -> None:
    is_wrong = not_finite if key == "features" else not_binary
    if (entry := first_entry(matrix, is_wrong)) is not None:
        raise DataError(
            path, None, f"{key} row {entry.row}, column {entry.column}: expected {expected}, "
            f"got {entry.value:g}; mend or drop the row",
        )  # fmt: skip


def _names(path: str | Path, archive: NpzFile, key: str, number: int) -> tuple[str, ...]:
    if key not in archive:
        return tuple(map(str, range(number)))
    names = array_of(path, archive, key)
    if names.dtype.kind != "U" or names.shape != (number,):
        raise DataError(
            path, None, f"{key}: expected {number} strings, got {names.dtype} of shape "
            f"{names.shape}; write numpy.array([...], dtype=str)",
        )  # fmt: skip
    return tuple(names.tolist())


def _label_names(
    path: str | Path,
    archive: NpzFile,
    targets: np.ndarray | None,
    expected: Sequence[str] | None,
) -> tuple[str, ...]:
    if targets is None:
        return tuple(expected or ())
    found = _names(path, archive, "label_names", targets.shape[1])
    if expected is None:
        return found
    if found != tuple(expected) and ("label_names" in archive or len(found) != len(expected)):
        raise DataError(
            path, None, f"expected the {len(expected)} labels of the model, got {len(found)} "
            "others; use data with the same labels in the same order",
        )  # fmt: skip
    return tuple(expected)


def write_npz(
    path: str | Path,
    table: MultiLabelTable,
    predictions: Matrix,
    probabilities: np.ndarray | None = None,
) -> None:
    """Write features, predicted labels as `targets`, `probabilities` if given, and the names.

    Args:
        path: where to; the file appears when it is whole.
        table: its own targets are not looked at.
        predictions: (N, L) of 0 and 1, dense or sparse.
        probabilities: (N, L) in [0, 1], written as float32.

    Raises:
        DataError: for another shape or other values.
    """
    table = table.with_targets(predictions)
    assert table.targets is not None
    features = table.features
    arrays: dict[str, Any] = {
        "features": features.toarray() if isinstance(features, sparse.csr_matrix) else features,
        "targets": table.targets.toarray(),
        "label_names": np.array(table.label_names, dtype=str),
        "feature_names": np.array(table.feature_names, dtype=str),
    }
    if probabilities is not None:
        table.check_probabilities(probabilities)
        arrays["probabilities"] = np.asarray(probabilities, dtype=np.float32)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
