"""svmlight files, NumPy archives, and the tables that they become."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from malformed import check_error, labels_of
from scipy import sparse

from ispen_dist.data.npz import read_npz
from ispen_dist.data.svmlight import read_svmlight
from ispen_dist.data.tables import MultiLabelTable, Sentence

# svmlight


SVMLIGHT = "1,0 0:0.5 2:1\n 1:2 # nothing\n# a comment\n2\n"


@pytest.mark.parametrize("header", ["", "3 3 3\n", "# sizes\n3 3 3\n"])
def test_svmlight(header, write):
    table = read_svmlight(write(header + SVMLIGHT), 3, 3)
    assert table.features.toarray().tolist() == [[0.5, 0, 1], [0, 2, 0], [0, 0, 0]]
    assert labels_of(table) == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert table.feature_names == table.label_names == ("0", "1", "2")


def test_svmlight_sizes_from_header_or_content(write):
    assert read_svmlight(write("3 9 7\n" + SVMLIGHT)).features.shape == (3, 9)
    assert len(read_svmlight(write("3 9 7\n" + SVMLIGHT)).label_names) == 7
    assert read_svmlight(write(SVMLIGHT)).features.shape == (3, 3)


def test_svmlight_one_based(write):
    table = read_svmlight(write("0 1:5 3:7\r\n"), 3, 1, zero_based=False)
    assert table.features.toarray().tolist() == [[5, 0, 7]]
    assert table.feature_names == ("1", "2", "3")


def test_svmlight_without_any_label_is_unlabelled(write):
    table = read_svmlight(write(" 0:1\n 1:1\n"), 2, 4)
    assert table.targets is None
    assert table.label_names == ("0", "1", "2", "3")


SVMLIGHT_ERRORS = {
    "index out of range": ("0 0:1\n0 1:1 5:1\n", {}, 2, "feature indices from 0 to 4", "5"),
    "one-based, out of range": (
        "0 1:1\n0 6:1\n", {"zero_based": False}, 2, "feature indices from 1 to 5", "6",
    ),
    "one-based zero": ("0 1:1\n0 0:1\n", {"zero_based": False}, 2, "indices from 1", "0 0:1"),
    "label out of range": ("\n0 0:1\n# c\n1,3 0:1\n", {}, 4, "labels from 0 to 2", "3"),
    "negative label": ("-1 0:1\n", {}, 1, "whole numbers from 0", "-1"),
    "half a label": ("0.5 0:1\n", {}, 1, "whole numbers from 0", "0.5"),
    "nan as a label": ("0 0:1\nnan 0:1\n", {}, 2, "whole numbers from 0", "nan"),
    "label twice": ("1,1 0:1\n", {}, 1, "each label once", "[1, 1]"),
    "nan": ("0 0:1\n0 0:1 2:nan\n", {}, 2, "a finite number", "nan for feature 2"),
    "infinite": ("0 0:inf\n", {}, 1, "a finite number", "inf for feature 0"),
    "beyond float32": ("0 0:1e39\n", {}, 1, "a finite number", "inf for feature 0"),
    "no value": ("0 0:1\n\n0 0:1 3\n", {}, 3, "INDEX:VALUE", "'0 0:1 3'"),
    "words": ("0 0:1\ncat 0:1\n", {}, 2, "LABEL,LABEL", "'cat 0:1'"),
    "blank after a comma": ("0, 1 0:1\n", {}, 1, "LABEL,LABEL", "'0, 1 0:1'"),
    "falling indices": ("0 2:1 1:1\n", {}, 1, "rising indices", "'0 2:1 1:1'"),
    "index twice": ("0 2:1 2:1\n", {}, 1, "rising indices", "'0 2:1 2:1'"),
    "index beyond 32 bits": ("0 0:1\n0 99999999999:1\n", {}, 2, "INDEX:VALUE", "99999999999"),
    "rows of the header": ("3 5 3\n0 0:1\n", {}, 1, "1 rows as there are", "3"),
    "features of the header": ("1 6 3\n0 0:1\n", {}, 1, "5 features", "6"),
    "labels of the header": ("1 5 4\n0 0:1\n", {}, 1, "3 labels", "4"),
    "comments only": ("# a\n#b\n", {}, None, "at least one row", "none"),
    "header only": ("0 5 3\n", {}, None, "at least one row", "none"),
}  # fmt: skip


@pytest.mark.parametrize("case", SVMLIGHT_ERRORS)
def test_malformed_svmlight(case, write):
    content, settings, line, expected, got = SVMLIGHT_ERRORS[case]
    path = write(content)
    check_error(lambda: read_svmlight(path, 5, 3, **settings), path, line, expected, got)


# npz


X, Y = np.array([[0.5, 0], [1, 2]]), np.array([[1, 0, 1], [0, 0, 1]])


def archive(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def single_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, X)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_npz(dtype, write):
    table = read_npz(write(archive(features=X, targets=Y.astype(dtype))))
    np.testing.assert_array_equal(table.features, X.astype(np.float32))
    assert labels_of(table) == Y.tolist()
    assert table.label_names == ("0", "1", "2")


def test_npz_names_and_no_targets(write):
    named = archive(features=X, targets=Y, label_names=["a", "b", "c"], feature_names=["x", "y"])
    table = read_npz(write(named))
    assert (table.label_names, table.feature_names) == (("a", "b", "c"), ("x", "y"))
    unlabelled = read_npz(write(archive(features=X)), label_names=["a", "b"])
    assert unlabelled.targets is None
    assert unlabelled.label_names == ("a", "b")


NOT_A_NUMBER = np.array([[0.5, 0], [1, np.nan]])
NPZ_ERRORS = {
    "objects": (
        archive(features=np.array([[{}]], dtype=object), targets=Y),
        "an array of numbers under 'features'", "pickled objects, which are never loaded",
    ),
    "objects as targets": (
        archive(features=X, targets=np.array([[1, 0], [0]], dtype=object)),
        "an array of numbers under 'targets'", "pickled objects, which are never loaded",
    ),
    "a pickle": (b"\x80\x04]\x94.", "an intact npz archive", "pickled objects"),
    "one array": (single_array(), "an npz archive", "a single array"),
    "cut off": (archive(features=X, targets=Y)[:-40], "an intact npz archive", ": "),
    "damaged": (
        archive(features=X).replace(X.tobytes(), (X + 1).tobytes()),
        "an array of numbers under 'features'", "Bad CRC",
    ),
    "other keys": (archive(x=X, y=Y), "an array 'features'", "x, y; rename"),
    "one dimension": (archive(features=X[0], targets=Y), "dimensions row column", "shape (2,)"),
    "no rows": (archive(features=X[:0], targets=Y[:0]), "dimensions row column", "shape (0, 2)"),
    "rows differ": (archive(features=X, targets=Y[:1]), "targets: expected 2 rows", "1; write"),
    "nan": (archive(features=NOT_A_NUMBER, targets=Y), "features row 1, column 1", "nan"),
    "beyond float32": (archive(features=X * 1e39, targets=Y), "features row 0, column 0", "inf"),
    "label of 2": (archive(features=X, targets=Y * 2), "row 0, column 0: expected 0 or 1", "2"),
    "label of 256": (archive(features=X, targets=Y * 256), "targets row 0, column 0", "256"),
    "text": (archive(features=[["a"]], targets=Y), "features: expected numbers", "<U1"),
    "complex": (archive(features=X * 1j, targets=Y), "features: expected numbers", "complex128"),
    "too few names": (archive(features=X, targets=Y, label_names=["a"]), "3 strings", "shape (1,)"),
    "numbers as names": (archive(features=X, feature_names=[1, 2]), "2 strings", "int64"),
    "a name twice": (archive(features=X, feature_names=["a", "a"]), "distinct column names", "'a'"),
}  # fmt: skip


@pytest.mark.parametrize("case", NPZ_ERRORS)
def test_malformed_npz(case, write):
    content, expected, got = NPZ_ERRORS[case]
    path = write(content, "table.npz")
    check_error(lambda: read_npz(path), path, None, expected, got)


def test_npz_with_other_labels_than_the_model(write):
    path = write(archive(features=X, targets=Y))
    assert read_npz(path, label_names=["a", "b", "c"]).label_names == ("a", "b", "c")
    check_error(
        lambda: read_npz(path, ["a", "b"]), path, None, "the 2 labels of the model", "3 others"
    )


# Tables


def table_of(
    path: str, label: str = "cat", feature: str = "age", labelled: bool = True
) -> MultiLabelTable:
    targets = sparse.csr_matrix(np.array([[1], [0]], dtype=np.uint8)) if labelled else None
    features = np.array([[1.0], [2.0]], dtype=np.float32)
    return MultiLabelTable(features, targets, (label,), (feature,), path)


def test_tables_below_one_another_and_rows_of_them():
    first, second = table_of("a"), table_of("b")
    sparse_one = MultiLabelTable(
        sparse.csr_matrix(first.features * 4), first.targets, ("cat",), ("age",), "c"
    )
    assert first.concatenate([]) is first
    assert first.concatenate([second]).features.tolist() == [[1], [2], [1], [2]]
    whole = first.concatenate([second, sparse_one])
    assert len(whole) == 6
    part = whole.rows([5, 0])
    assert part.features.toarray().tolist() == [[8], [1]]
    assert labels_of(part) == [[0], [1]]
    assert table_of("a", labelled=False).rows([1]).targets is None


@pytest.mark.parametrize(
    ("other", "expected", "got"),
    [
        ({"label": "dog"}, "label 0 to be 'cat'", "'dog'"),
        ({"feature": "size"}, "feature 0 to be 'age'", "'size'"),
        ({"labelled": False}, "labels, as in a", "none"),
    ],
)
def test_tables_that_do_not_fit_together(other, expected, got):
    second = table_of("b", **other)
    check_error(lambda: table_of("a").concatenate([second]), Path("b"), None, expected, got)


@pytest.mark.parametrize(
    ("features", "targets", "expected", "got"),
    [
        (np.array([[np.nan]], np.float32), [[1]], "a finite number", "nan"),
        (np.array([[1.0]], np.float32), [[2]], "0 or 1", "2"),
        (np.array([[1.0]], np.float64), [[1]], "(1, 1) float32", "(1, 1) float64"),
        (np.array([[1.0]], np.float32), [[1, 0]], "(1, 1) uint8", "(1, 2) uint8"),
        (np.array([[1.0], [2.0]], np.float32), [[1]], "(2, 1) uint8", "(1, 1) uint8"),
    ],
)
def test_tables_are_checked(features, targets, expected, got):
    build = lambda: MultiLabelTable(  # noqa: E731
        features, sparse.csr_matrix(np.array(targets, dtype=np.uint8)), ("cat",), ("age",), "file"
    )
    check_error(build, Path("file"), None, expected, got)


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens": (), "tags": None},
        {"tokens": ("a",), "tags": ()},
        {"tokens": ("a",), "tags": ("N", "V")},
    ],
)
def test_sentences_are_checked(settings):
    with pytest.raises(ValueError, match=r"Sentence\.(tokens|tags): expected .*, got"):
        Sentence(**settings, line=1)
