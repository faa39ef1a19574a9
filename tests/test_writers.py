"""Writers: what is written reads back the same, and half a file never stands."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from ispen_dist.data.arff import read_arff, write_arff
from ispen_dist.data.conll import read_conll, read_conllu, write_conll, write_conllu
from ispen_dist.data.errors import DataError
from ispen_dist.data.npz import read_npz, write_npz
from ispen_dist.data.output_file import replacing
from ispen_dist.data.svmlight import read_svmlight, write_svmlight
from ispen_dist.data.tables import MultiLabelTable, Sentence

SENTENCES = [Sentence(("a", "\u00a0", "#c d"), None, 1), Sentence(("\u2028",), ("V",), 5)]
TAGS = [("N", "V", "N"), ("X",)]

WORD = "{}\t{}\tl\t{}\tX\tA=b\t0\troot\t_\t{}"
SOURCE = "\r\n".join(
    [
        "\ufeff# text = don't",
        WORD.format("1-2", "don't", "_", "SpaceAfter=No"),
        WORD.format(1, "do", "AUX", "_"),
        WORD.format(2, "n't", "PART", "Prob=0.5|SpaceAfter=No"),
        WORD.format("2.1", "you", "PRON", "_"),
        "",
        "",
        "# last line has no end",
        WORD.format(1, "a b", "NOUN", "Gloss=x"),
    ]
)


# Sentences


def test_conll_reads_back(tmp_path):
    path = tmp_path / "tags.txt"
    write_conll(path, SENTENCES, TAGS)
    assert read_conll(path) == [
        Sentence(s.tokens, tags, s.line) for s, tags in zip(SENTENCES, TAGS, strict=True)
    ]


def test_conll_probabilities_are_the_third_column(tmp_path):
    path = tmp_path / "new" / "folder" / "tags.txt"
    write_conll(path, SENTENCES[1:], TAGS[1:], [[0.98765]])
    assert path.read_text("utf-8") == "\u2028\tX\t0.9877\n\n"


@pytest.mark.parametrize(
    ("tags", "probabilities", "message"),
    [
        (TAGS[:1], None, "tags: expected 2 sentences, got 1"),
        ([("N",), ("X",)], None, r"tags\[0\]: expected 3, one for each token, got 1"),
        (TAGS, [[0.1] * 3, []], r"probabilities\[1\]: expected 1, one for each token, got 0"),
    ],
)
def test_conll_wants_one_tag_for_each_token(tags, probabilities, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_conll(tmp_path / "tags.txt", SENTENCES, tags, probabilities)
    assert list(tmp_path.iterdir()) == []


def test_conllu_copies_everything_but_the_tag(tmp_path):
    source, path = tmp_path / "in.conllu.gz", tmp_path / "out.conllu"
    source.write_bytes(gzip.compress(SOURCE.encode()))
    write_conllu(source, path, [("T1", "T2"), ("T3",)])
    expected = SOURCE.replace("AUX", "T1").replace("PART", "T2").replace("NOUN", "T3")
    assert path.read_bytes() == expected.encode()


def test_conllu_probabilities_go_into_misc(tmp_path):
    source, path = tmp_path / "in.conllu", tmp_path / "out.conllu"
    source.write_bytes(SOURCE.encode())
    write_conllu(source, path, [("AUX", "PART"), ("NOUN",)], [[0.25, 1], [0.12345]])
    expected = SOURCE.replace("AUX\tX\tA=b\t0\troot\t_\t_", "AUX\tX\tA=b\t0\troot\t_\tProb=0.2500")
    expected = expected.replace("Prob=0.5|SpaceAfter=No", "SpaceAfter=No|Prob=1.0000")
    expected = expected.replace("Gloss=x", "Gloss=x|Prob=0.1235")
    assert path.read_bytes().decode() == expected
    write_conllu(path, path, [("AUX", "PART"), ("NOUN",)], [[0.25, 1], [0.12345]])
    assert path.read_bytes().decode() == expected


def test_real_conllu_with_its_own_tags_is_the_same_file(shared_data, tmp_path):
    source, path = shared_data / "ud_english_ewt" / "en_ewt-ud-test.conllu.gz", tmp_path / "copy"
    sentences = read_conllu(source, "xpos")
    write_conllu(source, path, [s.tags for s in sentences], tag="xpos")
    assert path.read_bytes() == gzip.decompress(source.read_bytes())
    write_conllu(source, path, [["Q"] * len(s.tokens) for s in sentences], tag="upos")
    assert {t for s in read_conllu(path, "upos") for t in s.tags or ()} == {"Q"}
    assert read_conllu(path, "xpos") == sentences


# Tables


def table_of(is_sparse: bool) -> MultiLabelTable:
    features = np.array([[0.1, 0, -3e-7], [0, 0, 0], [1 / 3, 16777216, 0]], dtype=np.float32)
    names = ("a", "two words", "50%, {c}")
    return MultiLabelTable(
        sparse.csr_matrix(features) if is_sparse else features, None, ("x", "y z"), names, "table"
    )


PREDICTIONS = np.array([[0, 1], [0, 0], [1, 1]])
PROBABILITIES = np.array([[0.25, 0.75], [0, 1e-5], [1, 0.512345678]])


def check_same(table: MultiLabelTable, other: MultiLabelTable, predictions: np.ndarray) -> None:
    dense, other_dense = (
        t.features if isinstance(t.features, np.ndarray) else t.features.toarray()
        for t in (table, other)
    )
    np.testing.assert_array_equal(other_dense, dense)
    assert other.targets is not None
    np.testing.assert_array_equal(other.targets.toarray(), predictions)


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix, lambda y: y.astype(bool)])
def test_arff_reads_back(is_sparse, kind, tmp_path):
    table, path = table_of(is_sparse), tmp_path / "out.arff"
    write_arff(path, table, kind(PREDICTIONS))
    other = read_arff(path, None, num_labels=2)
    check_same(table, other, PREDICTIONS)
    other.check_columns(table.label_names, table.feature_names)
    assert sparse.issparse(other.features) == is_sparse


@pytest.mark.parametrize("is_sparse", [False, True])
def test_arff_probabilities_take_the_place_of_labels(is_sparse, tmp_path):
    path = tmp_path / "out.arff"
    write_arff(path, table_of(is_sparse), PREDICTIONS, PROBABILITIES)
    # As features, since labels that are not 0 or 1 are refused.
    with pytest.raises(DataError, match=r"expected 0 or 1 as the value of a label, got 0\.25"):
        read_arff(path, None, num_labels=2)
    table = read_arff(path, None, label_names=["none of them"])
    values = table.features if isinstance(table.features, np.ndarray) else table.features.toarray()
    np.testing.assert_allclose(values[:, 3:], PROBABILITIES, rtol=5e-6)


@pytest.mark.parametrize("is_sparse", [False, True])
@pytest.mark.parametrize("zero_based", [False, True])
@pytest.mark.parametrize("probabilities", [None, PROBABILITIES])
def test_svmlight_reads_back(is_sparse, zero_based, probabilities, tmp_path):
    table, path = table_of(is_sparse), tmp_path / "out.svm"
    write_svmlight(path, table, PREDICTIONS, probabilities, zero_based=zero_based)
    check_same(table, read_svmlight(path, 3, 2, zero_based=zero_based), PREDICTIONS)


def test_svmlight_lines(tmp_path):
    path = tmp_path / "out.svm"
    features = np.array([[0.5, 0], [0, 0], [0, 2]], dtype=np.float32)
    table = MultiLabelTable(features, None, ("0", "1"), ("0", "1"))
    write_svmlight(path, table, PREDICTIONS, PROBABILITIES)
    lines = ["1 0:0.5 # 1:0.75", " 0:0", "0,1 1:2 # 0:1 1:0.512346"]
    assert path.read_text() == "".join(f"{line}\n" for line in lines)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_npz_reads_back(is_sparse, tmp_path):
    table, path = table_of(is_sparse), tmp_path / "out"
    write_npz(path, table, PREDICTIONS, PROBABILITIES)
    other = read_npz(path)
    check_same(table, other, PREDICTIONS)
    other.check_columns(table.label_names, table.feature_names)
    with np.load(path, allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["probabilities"], PROBABILITIES.astype(np.float32))


WRITERS = {"arff": write_arff, "svmlight": write_svmlight, "npz": write_npz}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("predictions", "probabilities", "expected", "got"),
    [
        (PREDICTIONS * 256, None, "row 0, label 1: expected 0 or 1", "256"),
        (PROBABILITIES, None, "row 0, label 0: expected 0 or 1", "0.25"),
        (PREDICTIONS[:2], None, "(3, 2) uint8", "(2, 2) uint8"),
        (PREDICTIONS, PROBABILITIES.T, "shape (3, 2)", "(2, 3)"),
        (PREDICTIONS, PROBABILITIES * 2, "row 0, label 1: expected a number in [0, 1]", "1.5"),
        (PREDICTIONS, PROBABILITIES * np.nan, "expected a number in [0, 1]", "nan"),
    ],
)
def test_tables_are_checked_before_they_are_written(
    writer, predictions, probabilities, expected, got, tmp_path
):
    with pytest.raises(DataError) as caught:
        WRITERS[writer](tmp_path / "out", table_of(True), predictions, probabilities)
    before, _, after = str(caught.value).partition(", got ")
    assert expected in before
    assert after.startswith(got)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["bibtex", "scene"])
def test_real_tables_read_back(shared_data, name, tmp_path):
    folder = shared_data / name
    table = read_arff(folder / f"{name}-test.arff.gz", folder / f"{name}.xml").rows(range(300))
    assert table.targets is not None
    gold = table.targets.toarray()
    write_arff(tmp_path / "arff", table, gold)
    again = read_arff(tmp_path / "arff", folder / f"{name}.xml")
    again.check_columns(table.label_names, table.feature_names)
    check_same(table, again, gold)
    write_svmlight(tmp_path / "svm", table, gold)
    sizes = len(table.feature_names), len(table.label_names)
    check_same(table, read_svmlight(tmp_path / "svm", *sizes), gold)


# Whole or not at all


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "tags.txt"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as partial:
            partial.write_text("half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_write_takes_the_place_of_the_old_file(tmp_path):
    path = tmp_path / "tags.txt"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert partial.parent == path.parent
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_writer_leaves_nothing(tmp_path, monkeypatch):
    def broken(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:10])
        raise OSError("No space left on device")

    source, target = tmp_path / "in.conllu", tmp_path / "out.conllu"
    source.write_bytes(SOURCE.encode())
    monkeypatch.setattr(Path, "write_bytes", broken)
    with pytest.raises(OSError, match="No space left"):
        write_conllu(source, target, [("T1", "T2"), ("T3",)])
    assert list(tmp_path.iterdir()) == [source]
