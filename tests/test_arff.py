"""ARFF: labels found by name, counts of the real files, and malformed files by line."""

import gzip
import re
from pathlib import Path

import numpy as np
import pytest
from malformed import check_error, labels_of
from scipy import sparse

from ispen_dist.data.arff import read_arff, read_label_names
from ispen_dist.data.errors import DataError

LABELS_XML = """<?xml version="1.0" encoding="utf-8"?>
<labels xmlns="http://mulan.sourceforge.net/labels">
<label name="cat"><label name="kitten"></label></label>
</labels>"""
HEADER = "@relation pets\n@attribute cat {0,1}\n@attribute age numeric\n@attribute kitten {0,1}\n"
DENSE = HEADER + "@attribute fur numeric\n@data\n"


@pytest.mark.parametrize(
    ("content", "is_sparse"),
    [
        (DENSE + "0,1.5,1,-2\n1,0,0,3e-1\n", False),
        (DENSE + "% a comment\n{1 1.5,2 1,3 -2}\n\n{0 1,3 0.3}\n", True),
        ("\ufeff" + (DENSE + "0,1.5,1,-2\n{0 1,3 .3}").replace("\n", "\r\n"), False),
        (DENSE.replace("@attribute ", "@ATTRIBUTE\t") + "0, 1.5, 1, -2\n'1',0,0,0.3\n", False),
        (DENSE.replace("{0,1}", "integer") + "{ 3 -2, 2 1,1 1.5 }\n{0 1,3 0.3}\n", True),
    ],
    ids=["dense", "sparse", "dense with a sparse row", "tabs and quotes", "unordered"],
)
def test_arff_labels_are_those_of_the_xml_wherever_they_stand(content, is_sparse, write):
    table = read_arff(write(content), write(LABELS_XML, "labels.xml"))
    assert table.label_names == ("cat", "kitten")
    assert table.feature_names == ("age", "fur")
    assert sparse.issparse(table.features) == is_sparse
    dense = table.features.toarray() if is_sparse else table.features
    np.testing.assert_array_equal(dense, np.array([[1.5, -2], [0, 0.3]], dtype=np.float32))
    assert labels_of(table) == [[0, 1], [1, 0]]


def test_arff_empty_sparse_row_is_a_row(write):
    table = read_arff(write(DENSE + "{}\n{0 1}\n{ }\n"), write(LABELS_XML, "labels.xml"))
    assert labels_of(table) == [[0, 0], [1, 0], [0, 0]]
    assert table.features.nnz == 0


def test_arff_labels_by_number_and_by_name(write):
    path = write(DENSE.replace("fur numeric", "fur {0,1}") + "0,1.5,1,0\n")
    last = read_arff(path, None, num_labels=2)
    assert (last.label_names, last.feature_names) == (("kitten", "fur"), ("cat", "age"))
    named = read_arff(path, "never-opened.xml", label_names=["fur", "cat"])
    assert (named.label_names, labels_of(named)) == (("fur", "cat"), [[0, 0]])


def test_arff_without_any_label_is_unlabelled_only_for_a_model(write):
    path = write("@relation r\n@attribute age numeric\n@data\n1\n")
    table = read_arff(path, None, label_names=["cat", "kitten"])
    assert table.targets is None
    assert table.label_names == ("cat", "kitten")
    xml = write(LABELS_XML, "labels.xml")
    check_error(lambda: read_arff(path, xml), path, None, "an attribute for label 'cat'", "none")


def test_arff_label_that_is_no_attribute_names_the_nearest(write):
    path = write(DENSE + "0,1,1,1\n")
    xml = write(LABELS_XML.replace("kitten", "kiten"), "labels.xml")
    check_error(
        lambda: read_arff(path, xml), path, None,
        f"an attribute for label 'kiten' of {xml}", "the nearest is 'kitten'",
    )  # fmt: skip
    with pytest.raises(DataError, match="label 'dog' of the model"):
        read_arff(path, None, label_names=["cat", "dog"])


ARFF_ERRORS = {
    "too few values": (DENSE + "0,1,0,1\n0,1,0\n", 8, "4 values", "3"),
    "too many values": (DENSE + "0,1,0,1,1\n", 7, "4 values", "5"),
    "index out of range": (DENSE + "{0 1}\n%\n{1 2,4 1}\n", 9, "indices from 0 to 3", "4"),
    "index twice": (DENSE + "{1 2,1 3}\n", 7, "each attribute index once", "{1 2,1 3}"),
    "negative index": (DENSE + "{-1 2}\n", 7, "well-formed ARFF", "{-1 2}"),
    "missing, dense": (DENSE + "0,1,0,1\n0,?,0,1\n", 8, "a number", "value in attribute 'age'"),
    "missing, empty": (DENSE + "0,1,0,\n", 7, "a number", "value in attribute 'fur'"),
    "missing, sparse": (DENSE + "{3 1}\n{3 ?}\n", 8, "a number", "value in attribute 'fur'"),
    "missing label": (DENSE + "?,1,0,1\n", 7, "a number", "value in attribute 'cat'"),
    "nan": (DENSE + "0,1,0,1\n0,nan,0,1\n", 8, "a finite number", "nan in attribute 'age'"),
    "nan, sparse": (DENSE + "{3 1}\n{1 1,3 NaN}\n", 8, "a finite number", "nan in attribute 'fur'"),
    "infinite": (DENSE + "0,-inf,0,1\n", 7, "a finite number", "-inf in attribute 'age'"),
    "beyond float32": (DENSE + "0,1,0,1e39\n", 7, "a finite number", "inf in attribute 'fur'"),
    "word": (DENSE + "0,old,0,1\n", 7, "numbers", "0,old,0,1"),
    "text attribute": (
        DENSE.replace("fur numeric", "fur string") + "0,1,0,100% fur\n0,1,0,1\n",
        7, "well-formed ARFF", "100% fur",
    ),
    "nominal words": (
        DENSE.replace("fur numeric", "fur {long,short}") + "0,1,0,long\n",
        7, "a number", "'long' in attribute 'fur'",
    ),
    "undeclared value": (DENSE + "2,1,0,1\n", 7, "values that the attr", "Data value 2"),
    "label of 2": (
        DENSE.replace("{0,1}", "numeric") + "0,1,0,1\n0,1,2,1\n",
        8, "0 or 1", "2 in attribute 'kitten'",
    ),
    "half a label": (
        DENSE.replace("{0,1}", "integer") + "{0 1}\n{0 0.5}\n",
        8, "0 or 1", "0.5 in attribute 'cat'",
    ),
    "zero comes second": (
        DENSE.replace("kitten {0,1}", "kitten {1,0}") + "{1 1}\n",
        4, "0 as the first value of 'kitten'", "'1'",
    ),
    "attribute twice": (HEADER + "@attribute cat real\n@data\n1", 5, "each attribute name", "cat"),
    "attribute type": (HEADER + "@attribute day date\n@data\n1", 5, "of type numeric", "date"),
    "attribute without a type": (HEADER + "@attribute fur\n@data\n1", 5, "@attribute NAME", "fur"),
    "no values declared": (HEADER.replace("{0,1}", "{}") + "@data\n0,1,0", 2, "ARFF", "cat {}"),
    "misspelt keyword": (HEADER + "@atribute fur real\n@data\n{1 1}", 5, "@attribute", "fur real"),
    "no data": (DENSE, None, "rows after a line @data", "none"),
    "no line @data": (HEADER, None, "rows after a line @data", "none"),
    "dense row in a sparse file": (DENSE + "{0 1}\n0,1,0,1\n", 8, "well-formed ARFF", "0,1,0,1"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARFF_ERRORS)
def test_malformed_arff(case, write):
    content, line, expected, got = ARFF_ERRORS[case]
    path, xml = write(content, "pets.arff"), write(LABELS_XML, "labels.xml")
    check_error(lambda: read_arff(path, xml), path, line, expected, got)


XML_ERRORS = {
    "cut off": ("<labels>\n<label name='a'>\n", 3, "well-formed XML", "no element found"),
    "no labels": ("<labels/>", None, "elements <label", "no labels"),
    "no name": ("<labels><label name='a'/><label/></labels>", None, "elements <label", "label 1"),
    "empty name": ("<labels><label name=''/></labels>", None, "elements <label", "label 0"),
    "twice": ("<l><label name='a'/><label name='a'/></l>", None, "each label once", "'a' twice"),
}


@pytest.mark.parametrize("case", XML_ERRORS)
def test_malformed_label_names(case, write):
    content, line, expected, got = XML_ERRORS[case]
    path = write(content)
    check_error(lambda: read_label_names(path), path, line, expected, got)


# Real files; the counts are those of their READMEs.


@pytest.mark.parametrize(
    ("name", "sizes", "num_features", "num_labels", "cardinality", "num_sets"),
    [
        ("bibtex", (4880, 2515), 1836, 159, 2.402, 2856),
        ("delicious", (12920, 3185), 500, 983, 19.020, 15806),
        ("yeast", (1500, 917), 103, 14, 4.237, 198),
        ("scene", (1211, 1196), 294, 6, 1.074, None),
    ],
)
def test_real_arff(shared_data, name, sizes, num_features, num_labels, cardinality, num_sets):
    folder = shared_data / name
    train, test = (
        read_arff(folder / f"{name}-{part}.arff.gz", folder / f"{name}.xml")
        for part in ("train", "test")
    )
    assert (len(train), len(test)) == sizes
    table = train.concatenate([test])
    assert table.features.shape == (sum(sizes), num_features)
    assert table.targets is not None
    assert table.targets.shape == (sum(sizes), num_labels)
    assert round(table.targets.nnz / len(table), 3) == cardinality
    own = np.split(table.targets.indices, table.targets.indptr[1:-1])
    assert num_sets in (None, len({row.tobytes() for row in own}))
    if name == "delicious":
        assert sum(len(row) == 0 for row in own) == 14


def rows_by_hand(path: Path) -> tuple[list[str], np.ndarray]:
    """Attribute names and values, taken apart without liac-arff."""
    text = gzip.decompress(path.read_bytes()).decode()
    header, _, body = text.partition("@data\n")
    names = re.findall(r"@attribute (\S+)", header)
    values = np.zeros((len(body.strip().split("\n")), len(names)), dtype=np.float32)
    for row, line in enumerate(body.strip().split("\n")):
        if line.startswith("{"):
            pairs = [pair.split(" ") for pair in line[1:-1].split(",")]
            values[row, [int(i) for i, _ in pairs]] = [float(v) for _, v in pairs]
        else:
            values[row] = [float(v) for v in line.split(",")]
    return names, values


@pytest.mark.parametrize("name", ["bibtex", "yeast"])
def test_real_arff_number_by_number(shared_data, name):
    path = shared_data / name / f"{name}-test.arff.gz"
    table = read_arff(path, shared_data / name / f"{name}.xml")
    names, values = rows_by_hand(path)
    place = {attribute: i for i, attribute in enumerate(names)}
    features = (
        table.features if isinstance(table.features, np.ndarray) else table.features.toarray()
    )
    np.testing.assert_array_equal(features, values[:, [place[n] for n in table.feature_names]])
    np.testing.assert_array_equal(
        labels_of(table), values[:, [place[n] for n in table.label_names]]
    )
