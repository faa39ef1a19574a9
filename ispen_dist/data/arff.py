"""Multi-label ARFF files with the Mulan XML file that names the labels."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import arff
import numpy as np
from scipy import sparse

from ispen_dist.data.arff_content import ArffContent, read_content
from ispen_dist.data.errors import DataError, nearest, read_bytes
from ispen_dist.data.output_file import replacing
from ispen_dist.data.tables import (
    Entry,
    Matrix,
    MultiLabelTable,
    first_entry,
    not_binary,
    not_finite,
)


def read_arff(
    path: str | Path,
    labels_xml: str | Path | None,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    *,
    labelled: bool = True,
) -> MultiLabelTable:
    """Read feature vectors and label sets; a sparse file gives CSR features.

    All attributes have to be numbers, which nominal values such as {0,1} are too.

    Args:
        path: the file, plain or gzip.
        labels_xml: Mulan's list of labels. They may stand anywhere among the attributes; the order
            of the XML file counts, and its hierarchy does not.
        num_labels: without the XML file, how many of the last attributes are labels.
        label_names: labels of a trained model, instead of either. Here, and only here, a file with
            none of them passes as unlabelled.
        labelled: whether the labels are read; if not, their values may be missing.

    Raises:
        DataError: for a malformed or missing value, a label other than 0 and 1, and for a label
            that is no attribute.
    """
    content = read_content(path, () if labelled else label_names or ())
    names, is_label = _labels(content, labels_xml, num_labels, label_names)
    feature_columns = [i for i, name in enumerate(content.names) if name not in is_label]
    if not feature_columns:
        raise DataError(path, None, "expected attributes besides the labels, got labels only")
    if (entry := first_entry(content.matrix, not_finite)) is not None:
        raise content.error(entry, "a finite number")
    return MultiLabelTable(
        features=content.matrix[:, feature_columns],
        targets=_targets(content, names) if is_label and labelled else None,
        label_names=names,
        feature_names=tuple(content.names[i] for i in feature_columns),
        path=str(path),
    )


def _labels(
    content: ArffContent,
    labels_xml: str | Path | None,
    num_labels: int | None,
    label_names: Sequence[str] | None,
) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the names of the labels, and those of them that the file has: all or none."""
    if label_names is not None:
        names, source = tuple(label_names), "the model"
        if not set(names) & set(content.names):
            return names, frozenset()
    elif labels_xml is not None:
        names, source = read_label_names(labels_xml), str(labels_xml)
    elif num_labels is not None:
        if not 0 < num_labels < len(content.names):
            raise DataError(
                content.path, None, f"expected more than num_labels={num_labels} attributes, "
                f"and a label at least, got {len(content.names)}; change num_labels",
            )  # fmt: skip
        names, source = tuple(content.names[-num_labels:]), "num_labels"
    else:
        raise ValueError("read_arff: expected labels_xml, num_labels or label_names, got none")
    attributes = frozenset(content.names)
    for name in names:
        if name not in attributes:
            raise DataError(
                content.path, None, f"expected an attribute for label {name!r} of {source}, got "
                f"none of that name; the nearest is {nearest(name, content.names)!r}",
            )  # fmt: skip
    return names, frozenset(names)


def _targets(content: ArffContent, names: Sequence[str]) -> sparse.csr_matrix:
    place = {name: i for i, name in enumerate(content.names)}
    columns = [place[name] for name in names]
    targets = sparse.csr_matrix(content.matrix[:, columns])
    if (entry := first_entry(targets, not_binary)) is not None:
        entry = Entry(entry.row, columns[entry.column], entry.value)
        raise content.error(entry, "0 or 1 as the value of a label")
    targets.eliminate_zeros()
    return sparse.csr_matrix(targets, dtype=np.uint8)


def read_label_names(path: str | Path) -> tuple[str, ...]:
    """Read the names in a Mulan XML file, in order, whatever their nesting.

    Raises:
        DataError: for XML that is not well formed, no labels, one without a name, or a name twice.
    """
    try:
        root = ElementTree.fromstring(read_bytes(path))
    except ElementTree.ParseError as error:
        reason = str(error).partition(":")[0]
        raise DataError(
            path, error.position[0], f"expected well-formed XML, got: {reason}"
        ) from None
    labels = [node for node in root.iter() if node.tag.rpartition("}")[2] == "label"]
    names = [label.get("name") for label in labels]
    if not names or not all(names):
        nameless = next((i for i, name in enumerate(names) if not name), None)
        found = "no labels" if nameless is None else f"label {nameless} without one"
        raise DataError(path, None, f'expected elements <label name="...">, got {found}')
    present = tuple(name for name in names if name)
    name, times = Counter(present).most_common(1)[0]
    if times > 1:
        raise DataError(path, None, f"expected each label once, got {name!r} twice")
    return present


def write_arff(
    path: str | Path,
    table: MultiLabelTable,
    predictions: Matrix,
    probabilities: np.ndarray | None = None,
) -> None:
    """Write the features with predicted labels, sparse if the features are.

    Attributes have the names they had, features first, then labels. Features are declared numeric,
    labels {0,1}; or numeric, with six digits, where probabilities take the predictions' place.

    Args:
        path: where to; the file appears when it is whole.
        table: its own targets are not looked at.
        predictions: (N, L) of 0 and 1, dense or sparse.
        probabilities: (N, L) in [0, 1], to write instead.

    Raises:
        DataError: for another shape or other values.
    """
    table = table.with_targets(predictions)
    kind: Any = ["0", "1"] if probabilities is None else "NUMERIC"
    content = {
        "relation": "predictions",
        "attributes": [(name, "NUMERIC") for name in table.feature_names]
        + [(name, kind) for name in table.label_names],
        "data": _written_rows(table, probabilities),
    }
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        arff.dump(content, file)


def _written_rows(
    table: MultiLabelTable, probabilities: np.ndarray | None
) -> list[dict[int, Any]] | list[list[Any]]:
    assert table.targets is not None
    if probabilities is None:
        labels: Any = table.targets.astype(np.int64).toarray()
    else:
        table.check_probabilities(probabilities)
        labels = [[f"{value:.6g}" for value in row] for row in probabilities]
    if not sparse.issparse(table.features):
        return [[*row, *own] for row, own in zip(table.features, labels, strict=True)]
    first = len(table.feature_names)
    rows = []
    for row, own in zip(table.features, labels, strict=True):
        entries = dict(zip(row.indices.tolist(), row.data, strict=True))
        entries.update((first + j, value) for j, value in enumerate(own) if value)
        rows.append(entries)
    return rows
