"""Readers of sentences, and what every reader refuses: malformed files by file and line."""

import gzip

import pytest
from malformed import check_error

from ispen_dist.data.arff import read_arff, read_label_names
from ispen_dist.data.conll import check_tags, read_conll, read_conllu
from ispen_dist.data.errors import DataError, open_text
from ispen_dist.data.npz import read_npz
from ispen_dist.data.svmlight import read_svmlight
from ispen_dist.data.tables import Sentence

WORD = "{}\t{}\t_\t{}\t{}\t_\t_\t_\t_\t_\n"


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
    with pytest.raises(DataError, match=r"cut off or corrupt.*CRC"):
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


A_WORD = WORD.format(1, "a", "N", "_")
CONLLU_ERRORS = {
    "nine columns": ("# c\n1\ta\t_\tN\t_\t_\t_\t_\t_\n", 2, "10 columns", "9"),
    "spaces": ("1 a _ N _ _ _ _ _ _\n", 1, "10 columns apart by tabs", "1"),
    "gap": (A_WORD + WORD.format(3, "b", "N", "_"), 2, "word number 2", "'3'"),
    "no blank line between sentences": (A_WORD * 2, 2, "word number 2", "'1'"),
    "id": (WORD.format("x", "a", "N", "_"), 1, "word number 1", "'x'"),
    "no word": (WORD.format(1, "", "N", "_"), 1, "a word in column 1", "nothing"),
    "untagged among tagged": (
        A_WORD + "\n" + WORD.format(1, "b", "_", "_"),
        3, "a tag in column 3", "'_'",
    ),
    "comments only": ("# a\n\n# b\n", None, "at least one sentence", "comments only"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONLLU_ERRORS)
def test_malformed_conllu(case, write):
    content, line, expected, got = CONLLU_ERRORS[case]
    path = write(content)
    check_error(lambda: read_conllu(path), path, line, expected, got)


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
