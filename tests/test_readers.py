"""Readers: counts of the real files, variants that are fine, and malformed files by line."""

import gzip
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from ispen_dist.data.arff import read_arff, read_label_names
from ispen_dist.data.conll import check_tags, read_conll, read_conllu
from ispen_dist.data.errors import DataError, open_text
from ispen_dist.data.npz import read_npz
from ispen_dist.data.svmlight import read_svmlight
from ispen_dist.data.tables import MultiLabelTable, Sentence

LABELS_XML = """<?xml version="1.0" encoding="utf-8"?>
<labels xmlns="http://mulan.sourceforge.net/labels">
<label name="cat"><label name="kitten"></label></label>
</labels>"""
HEADER = "@relation pets\n@attribute cat {0,1}\n@attribute age numeric\n@attribute kitten {0,1}\n"
DENSE = HEADER + "@attribute fur numeric\n@data\n"
WORD = "{}\t{}\t_\t{}\t{}\t_\t_\t_\t_\t_\n"


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


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def written(content: str | bytes, name: str = "file.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return written


# What every reader of text refuses.


UNREADABLE = {
    "empty": (b"", None, "data", "an empty file"),
    "blank": (b" \n\r\n\t\n", None, "data", "an empty file"),
    "byte order mark alone": (b"\xef\xbb\xbf\n", None, "data", "an empty file"),
    "latin-1": ("a\tN\nb\tN\ncaf\u00e9\tN\n".encode("latin-1"), 3, "UTF-8", "byte 0xe9"),
    "utf-16": ("a\tN\n".encode("utf-16"), 1, "UTF-8", "UTF-16"),
    "gzip of nothing": (gzip.compress(b""), None, "data", "an empty file"),
    "gzip of latin-1": (gzip.compress(b"a\tN\n\xe9\tN\n"), 2, "UTF-8", "byte 0xe9"),
    "gzip magic alone": (b"\x1f\x8b", 1, "intact gzip", "cut off"),
}
TEXT_READERS = {
    "conll": read_conll,
    "conllu": read_conllu,
    "arff": lambda path: read_arff(path, None, num_labels=1),
    "svmlight": read_svmlight,
}


@pytest.mark.parametrize("reader", TEXT_READERS)
@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_text(reader, case, write):
    content, line, expected, got = UNREADABLE[case]
    path = write(content)
    check_error(lambda: TEXT_READERS[reader](path), path, line, expected, got)


@pytest.mark.parametrize("reader", [*TEXT_READERS, "npz", "xml"])
def test_missing_file_and_folder(reader, tmp_path):
    read = {**TEXT_READERS, "npz": read_npz, "xml": read_label_names}[reader]
    missing = tmp_path / "nowhere"
    check_error(lambda: read(missing), missing, None, "a file", "nothing there")
    check_error(lambda: read(tmp_path), tmp_path, None, "a file", "a folder")


def test_gzip_cut_anywhere_names_a_line_that_was_reached(write):
    text = "".join(f"word{i * 7919 % 1000}\tN\n" for i in range(3000))
    whole = gzip.compress(text.encode())
    lines = []
    for keep in range(2, len(whole), len(whole) // 40):
        with pytest.raises(DataError, match="expected an intact gzip file, got one cut off") as e:
            open_text(write(whole[:keep]))
        lines.append(e.value.line)
    assert lines == sorted(lines)
    assert lines[0] == 1
    assert 2000 < lines[-1] <= 3001


def test_gzip_with_a_flipped_bit(write):
    whole = bytearray(gzip.compress(b"a\tN\n" * 500, mtime=0))
    whole[-6] ^= 1
    with pytest.raises(DataError, match="cut off or corrupt.*CRC"):
        open_text(write(bytes(whole)))


def test_gzip_is_told_by_its_content_not_its_name(write):
    plain, packed = write(b"a\tN\n", "plain.gz"), write(gzip.compress(b"a\tN\n"), "packed.txt")
    assert read_conll(plain) == read_conll(packed) == [Sentence(("a",), ("N",), 1)]


# CoNLL


TWO = [Sentence(("a", "b"), ("N", "V"), 1), Sentence(("c",), ("N",), 4)]


@pytest.mark.parametrize(
    "content",
    [
        "a\tN\nb\tV\n\nc\tN\n\n",
        "a\tN\nb\tV\n\nc\tN",
        "a\tN\r\nb\tV\r\n\r\nc\tN\r\n",
        "\ufeffa\tN\nb\tV\n\nc\tN\n",
        "a\tN\nb\tV\n\t\nc\tN\n \n\n",
        "a N\nb   V\n\nc N \n",
    ],
    ids=["plain", "no end of line", "crlf", "byte order mark", "blank lines with blanks", "spaces"],
)
def test_conll_variants(content, write):
    assert read_conll(write(content)) == TWO


def test_conll_columns_by_number(write):
    path = write("1\ta\tx\tN\n2\tb\tx\tV\n\n1\tc\tx\tN\n")
    assert read_conll(path, token_column=1, tag_column=3) == TWO
    untagged = [Sentence(s.tokens, None, s.line) for s in TWO]
    assert read_conll(path, token_column=1, tag_column=None) == untagged
    assert read_conll(write("a\nb\n\nc\n")) == untagged


def test_characters_that_only_unicode_calls_line_ends_or_blanks_stay_in_tokens(write):
    odd = ("a\u2028b", "\u00a0", "c\u0085", "\u3000", "d\x0c", "e f", "#tag", "x\ry")
    path = write("".join(f"{token}\tN\n" for token in odd))
    assert read_conll(path)[0].tokens == odd


CONLL_ERRORS = {
    "missing column": ("a\tN\n\nb\n", {}, 3, "2 columns apart by tabs", "1"),
    "extra column": ("a\tN\nb\tN\tx\n", {}, 2, "2 columns apart by tabs", "3"),
    "spaces in a file with tabs": ("a\tN\nb N\n", {}, 2, "2 columns apart by tabs", "1"),
    "spaces, extra": ("a N\nb c N\n", {}, 2, "2 columns apart by spaces", "3"),
    "no such tag column": ("\n\na\tN\n", {"tag_column": 4}, 3, "at least 5 columns", "2; change"),
    "no such token column": ("a\tN\n", {"token_column": 2}, 1, "at least 3 columns", "2; change"),
    "no token": ("a\tN\n\tN\n", {}, 2, "a token in column 0", "nothing"),
    "no tag": ("a\tN\nb\t\n", {}, 2, "a tag in column 1", "nothing"),
}


@pytest.mark.parametrize("case", CONLL_ERRORS)
def test_malformed_conll(case, write):
    content, settings, line, expected, got = CONLL_ERRORS[case]
    path = write(content)
    check_error(lambda: read_conll(path, **settings), path, line, expected, got)


def test_unknown_tag_names_the_line_of_the_token_and_the_nearest_tag(write):
    path = write("a\tNOUN\n\nb\tVERB\nc\tVREB\n")
    sentences = read_conll(path)
    check_tags(sentences, ["NOUN", "VERB", "VREB"], path)
    known = ["NOUN", "PUNCT", "VERB"]
    check = lambda: check_tags(sentences, known, path)  # noqa: E731
    check_error(
        check, path, 4, "one of the 3 tags of the training data", "'VREB'; the nearest is 'VERB'"
    )
    check_tags(read_conll(path, tag_column=None), known, path)


# CoNLL-U


CONLLU = (
    "# text = don't go\n"
    + WORD.format("1-2", "don't", "_", "_")
    + WORD.format(1, "do", "AUX", "VB")
    + WORD.format(2, "n't", "PART", "RB")
    + WORD.format("2.1", "you", "PRON", "PRP")
    + WORD.format(3, "go away", "VERB", "VB")
    + "\n# only a comment\n\n"
    + WORD.format(1, "!", "PUNCT", ".")
)


@pytest.mark.parametrize("tag", ["upos", "xpos"])
def test_conllu_words_are_neither_ranges_nor_empty_nodes(tag, write):
    tags = {"upos": ("AUX", "PART", "VERB"), "xpos": ("VB", "RB", "VB")}[tag]
    first, second = read_conllu(write(CONLLU), tag)
    assert (first.tokens, first.tags) == (("do", "n't", "go away"), tags)
    assert [first.line_of(i) for i in range(3)] == [3, 4, 6]
    assert (second.tokens, second.line_of(0)) == (("!",), 10)


def test_conllu_line_of_an_unknown_tag(write):
    path = write(CONLLU)
    check = lambda: check_tags(read_conllu(path), ["AUX", "PART", "PUNCT"], path)  # noqa: E731
    check_error(check, path, 6, "one of the 3 tags", "'VERB'")


def test_conllu_without_tags_is_unlabelled(write):
    text = WORD.format(1, "a", "_", "NN") + WORD.format(2, "b", "_", "NN")
    assert read_conllu(write(text))[0].tags is None
    assert read_conllu(write(text), "xpos")[0].tags == ("NN", "NN")


CONLLU_ERRORS = {
    "nine columns": ("# c\n1\ta\t_\tN\t_\t_\t_\t_\t_\n", 2, "10 columns", "9"),
    "spaces": ("1 a _ N _ _ _ _ _ _\n", 1, "10 columns apart by tabs", "1"),
    "gap": (WORD.format(1, "a", "N", "_") + WORD.format(3, "b", "N", "_"), 2, "word number 2", "'3'"),
    "no blank line between sentences": (WORD.format(1, "a", "N", "_") * 2, 2, "word number 2", "'1'"),
    "id": (WORD.format("x", "a", "N", "_"), 1, "word number 1", "'x'"),
    "no word": (WORD.format(1, "", "N", "_"), 1, "a word in column 1", "nothing"),
    "untagged among tagged": (
        WORD.format(1, "a", "N", "_") + "\n" + WORD.format(1, "b", "_", "_"),
        3, "a tag in column 3", "'_'",
    ),
    "comments only": ("# a\n\n# b\n", None, "at least one sentence", "comments only"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONLLU_ERRORS)
def test_malformed_conllu(case, write):
    content, line, expected, got = CONLLU_ERRORS[case]
    path = write(content)
    check_error(lambda: read_conllu(path), path, line, expected, got)


# ARFF


def labels_of(table: MultiLabelTable) -> list[list[int]]:
    assert table.targets is not None
    return table.targets.toarray().tolist()


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
    "missing, dense": (DENSE + "0,1,0,1\n0,?,0,1\n", 8, "a number", "missing value in attribute 'age'"),
    "missing, empty": (DENSE + "0,1,0,\n", 7, "a number", "missing value in attribute 'fur'"),
    "missing, sparse": (DENSE + "{3 1}\n{3 ?}\n", 8, "a number", "missing value in attribute 'fur'"),
    "missing label": (DENSE + "?,1,0,1\n", 7, "a number", "missing value in attribute 'cat'"),
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
    "undeclared value": (DENSE + "2,1,0,1\n", 7, "values that the attributes declare", "Data value 2"),
    "label of 2": (
        DENSE.replace("{0,1}", "numeric") + "0,1,0,1\n0,1,2,1\n",
        8, "0 or 1", "2 in attribute 'kitten'",
    ),
    "half a label": (
        DENSE.replace("{0,1}", "integer") + "{0 1}\n{0 0.5}\n", 8, "0 or 1", "0.5 in attribute 'cat'",
    ),
    "zero comes second": (
        DENSE.replace("kitten {0,1}", "kitten {1,0}") + "{1 1}\n",
        4, "0 as the first value of 'kitten'", "'1'",
    ),
    "attribute twice": (HEADER + "@attribute cat numeric\n@data\n", 5, "each attribute name once", "cat"),
    "attribute type": (HEADER + "@attribute day date\n@data\n1\n", 5, "an attribute of type", "date"),
    "attribute without a type": (HEADER + "@attribute fur\n@data\n1\n", 5, "@attribute NAME", "fur"),
    "no data": (DENSE, None, "rows after a line @data", "none"),
    "no line @data": (HEADER, None, "rows after a line @data", "none"),
    "dense row in a sparse file": (DENSE + "{0 1}\n0,1,0,1\n", 8, "well-formed ARFF", "0,1,0,1"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARFF_ERRORS)
def test_malformed_arff(case, write):
    content, line, expected, got = ARFF_ERRORS[case]
    content += "0,1,0,1\n" if content.endswith("@data\n") and case.startswith("attribute") else ""
    path, xml = write(content, "pets.arff"), write(LABELS_XML, "labels.xml")
    check_error(lambda: read_arff(path, xml), path, line, expected, got)


XML_ERRORS = {
    "cut off": ("<labels>\n<label name='a'>\n", 3, "well-formed XML", "no element found"),
    "no labels": ("<labels/>", None, "elements <label", "no labels"),
    "no name": ("<labels><label name='a'/><label/></labels>", None, "elements <label", "label 1"),
    "twice": ("<l><label name='a'/><label name='a'/></l>", None, "each label once", "'a' twice"),
}


@pytest.mark.parametrize("case", XML_ERRORS)
def test_malformed_label_names(case, write):
    content, line, expected, got = XML_ERRORS[case]
    path = write(content)
    check_error(lambda: read_label_names(path), path, line, expected, got)


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
    "one-based zero": ("0 1:1\n0 0:1\n", {"zero_based": False}, 2, "rising indices from 1", "0 0:1"),
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
    "rows of the header": ("3 5 3\n0 0:1\n", {}, 1, "3 rows", "1"),
    "features of the header": ("1 6 3\n0 0:1\n", {}, 1, "num_features 5", "6"),
    "labels of the header": ("1 5 4\n0 0:1\n", {}, 1, "num_labels 3", "4"),
    "comments only": ("# a\n#b\n", {}, None, "at least one row", "comments only"),
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
    "one dimension": (archive(features=X[0], targets=Y), "two dimensions", "shape (2,)"),
    "no rows": (archive(features=X[:0], targets=Y[:0]), "two dimensions", "shape (0, 2)"),
    "rows differ": (archive(features=X, targets=Y[:1]), "targets: expected 2 rows", "1; write"),
    "nan": (archive(features=NOT_A_NUMBER, targets=Y), "features row 1, column 1", "nan"),
    "beyond float32": (archive(features=X * 1e39, targets=Y), "features row 0, column 0", "inf"),
    "label of 2": (archive(features=X, targets=Y * 2), "targets row 0, column 0: expected 0 or 1", "2"),
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


# Real files; the counts are those of their READMEs.


@pytest.mark.parametrize(
    ("file", "num_sentences", "num_tokens", "num_tags"),
    [
        ("twitter_pos/oct27.train", 1000, 14619, 25),
        ("twitter_pos/oct27.dev", 327, 4823, 23),
        ("twitter_pos/oct27.test", 500, 7152, 23),
        ("twitter_pos/daily547.conll", 547, 7707, None),
        ("wnut17/wnut17train.conll", 3394, 62730, 13),
        ("wnut17/emerging.dev.conll", 1009, 15733, None),
        ("wnut17/emerging.test.annotated", 1287, 23394, None),
    ],
)
def test_real_conll(shared_data, file, num_sentences, num_tokens, num_tags):
    sentences = read_conll(shared_data / f"{file}.gz")
    assert len(sentences) == num_sentences
    assert sum(len(s.tokens) for s in sentences) == num_tokens
    tags = {tag for s in sentences for tag in s.tags or ()}
    assert num_tags in (None, len(tags))


@pytest.mark.parametrize(
    ("file", "num_entities"),
    [("wnut17train.conll", 1975), ("emerging.dev.conll", 836), ("emerging.test.annotated", 1079)],
)
def test_real_entities(shared_data, file, num_entities):
    sentences = read_conll(shared_data / "wnut17" / f"{file}.gz")
    assert sum(tag.startswith("B-") for s in sentences for tag in s.tags or ()) == num_entities


@pytest.mark.parametrize(
    ("part", "tag", "num_sentences", "num_words", "num_tags"),
    [
        ("train", "xpos", 12544, 204577, 49),
        ("dev", "upos", 2001, 25147, 17),
        ("test", "upos", 2077, 25094, 17),
    ],
)
def test_real_conllu(shared_data, part, tag, num_sentences, num_words, num_tags):
    path = shared_data / "ud_english_ewt" / f"en_ewt-ud-{part}.conllu.gz"
    sentences = read_conllu(path, tag)
    assert len(sentences) == num_sentences
    assert sum(len(s.tokens) for s in sentences) == num_words
    assert len({t for s in sentences for t in s.tags or ()}) == num_tags


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
    text = gzip.open(path, "rt").read()
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
