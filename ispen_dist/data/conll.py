"""Tagged sentences in columns: CoNLL with the columns one likes, and CoNLL-U.

CoNLL: one token a line, columns apart by tabs, a blank line after each sentence.
CoNLL-U: https://universaldependencies.org/format.html, ten columns, words numbered from 1.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal, TypeVar

from ispen_dist.data.errors import DataError, nearest, open_text, read_text
from ispen_dist.data.output_file import replacing
from ispen_dist.data.tables import Sentence

_NUM_COLUMNS = 10
_FORM, _MISC = 1, 9
_TAG_COLUMN = {"upos": 3, "xpos": 4}
_NOT_A_WORD = re.compile(r"\d+-\d+|\d+\.\d+")
_PROBABILITY = re.compile(r"(^|\|)Prob=[^|]*")

Lines = list[tuple[int, str]]


def _blocks(lines: Sequence[str]) -> Iterator[Lines]:
    """Yield the numbered lines between blank ones."""
    numbered = enumerate(lines, start=1)
    for blank, block in groupby(numbered, key=lambda item: _is_blank(item[1])):
        if not blank:
            yield list(block)


def _is_blank(line: str) -> bool:
    # Not strip(): a no-break space is a token of the Twitter data, and a tab between sentences of
    # WNUT-17 is not.
    return not line.strip(" \t")


@dataclass(frozen=True)
class _Columns:
    """How the lines of one CoNLL file divide; tag is None for an unlabelled file."""

    path: str | Path
    separator: Literal["\t", " "]
    width: int
    token: int
    tag: int | None

    def of(self, line: str, number: int) -> list[str]:
        columns = _divided(line, self.separator)
        if len(columns) != self.width:
            apart = "tabs" if self.separator == "\t" else "spaces"
            raise DataError(
                self.path, number, f"expected {self.width} columns apart by {apart}, as in the "
                f"first line with a token, got {len(columns)}; mend the line",
            )  # fmt: skip
        for what, column in (("token", self.token), ("tag", self.tag)):
            if column is not None and not columns[column]:
                raise DataError(
                    self.path, number, f"expected a {what} in column {column}, got nothing there"
                )
        return columns

    def sentence(self, block: Lines) -> Sentence:
        rows = [self.of(line, number) for number, line in block]
        tags = None if self.tag is None else tuple(row[self.tag] for row in rows)
        return Sentence(tuple(row[self.token] for row in rows), tags, block[0][0])


def _divided(line: str, separator: str) -> list[str]:
    columns = line.split(separator)
    return columns if separator == "\t" else [column for column in columns if column]


def _columns(path: str | Path, blocks: list[Lines], token: int, tag: int | None) -> _Columns:
    has_tab = any("\t" in line for block in blocks for _, line in block)
    separator: Literal["\t", " "] = "\t" if has_tab else " "
    number, line = blocks[0][0]
    width = len(_divided(line, separator))
    if width == 1:
        tag = None
    for setting, column in (("token_column", token), ("tag_column", tag)):
        if column is not None and not 0 <= column < width:
            raise DataError(
                path, number, f"expected at least {column + 1} columns, got {width}; "
                f"change data.{setting}, which is {column}",
            )  # fmt: skip
    return _Columns(path, separator, width, token, tag)


def read_conll(
    path: str | Path, token_column: int = 0, tag_column: int | None = 1
) -> list[Sentence]:
    """Read tagged or untagged sentences.

    Columns are apart by tabs, in a file without any by spaces. Lines with `#` are tokens like
    others, and so are `-DOCSTART-` lines.

    Args:
        path: the file, plain or gzip.
        token_column: zero-based column of the token.
        tag_column: zero-based column of the tag; None reads no tags. A file of a single column has
            none either.

    Raises:
        DataError: for an unreadable file, and for a line with more or fewer columns than the first.
    """
    blocks = list(_blocks(open_text(path).read().split("\n")))
    columns = _columns(path, blocks, token_column, tag_column)
    return [columns.sentence(block) for block in blocks]


def read_conllu(path: str | Path, tag: Literal["upos", "xpos"] | None = "upos") -> list[Sentence]:
    """Read the words of a CoNLL-U file; ranges (3-4) and empty nodes (8.1) are not words.

    Args:
        path: the file, plain or gzip.
        tag: which column holds the tags; None reads none. If it is `_` all through the file, the
            tags are None as well.

    Raises:
        DataError: for an unreadable file, a line without ten columns, words not numbered 1, 2, 3,
            and a missing tag in a tagged file.
    """
    blocks = [_words(path, block) for block in _blocks(open_text(path).read().split("\n"))]
    sentences = [block for block in blocks if block]
    if not sentences:
        raise DataError(path, None, "expected at least one sentence, got comments only")
    column = None if tag is None else _TAG_COLUMN[tag]
    if all(column is None or row[column] == "_" for words in sentences for _, row in words):
        column = None
    return [_conllu_sentence(path, words, column) for words in sentences]


Words = list[tuple[int, list[str]]]


def _words(path: str | Path, block: Lines) -> Words:
    words: Words = []
    for number, line in block:
        if line.startswith("#"):
            continue
        row = line.split("\t")
        if len(row) != _NUM_COLUMNS:
            raise DataError(
                path, number, f"expected {_NUM_COLUMNS} columns apart by tabs, got {len(row)}; "
                "mend the line, or read the file with data.format=conll",
            )  # fmt: skip
        if row[0] != str(len(words) + 1):
            if _NOT_A_WORD.fullmatch(row[0]):
                continue
            raise DataError(
                path, number, f"expected word number {len(words) + 1}, got {row[0]!r}; number the "
                "words of a sentence from 1 and put a blank line after it",
            )  # fmt: skip
        if not row[_FORM]:
            raise DataError(path, number, "expected a word in column 1, got nothing there")
        words.append((number, row))
    return words


def _conllu_sentence(path: str | Path, words: Words, column: int | None) -> Sentence:
    lines, rows = zip(*words, strict=True)
    for number, row in words:
        if column is not None and row[column] in ("", "_"):
            raise DataError(
                path, number, f"expected a tag in column {column}, as in other lines, "
                f"got {row[column]!r}; tag the word or choose another data.tag",
            )  # fmt: skip
    tags = None if column is None else tuple(row[column] for row in rows)
    return Sentence(tuple(row[_FORM] for row in rows), tags, lines[0], lines)


def check_tags(sentences: Sequence[Sentence], known: Sequence[str], path: str | Path) -> None:
    """Raise if a sentence has a tag that the model does not know.

    Args:
        sentences: unlabelled ones pass.
        known: tags of the training data.
        path: where the sentences come from.

    Raises:
        DataError: with file, line of the token, the tag, and the known tag most like it.
    """
    names = frozenset(known)
    for sentence in sentences:
        for position, tag in enumerate(sentence.tags or ()):
            if tag not in names:
                raise DataError(
                    path, sentence.line_of(position),
                    f"expected one of the {len(names)} tags of the training data, got {tag!r}; "
                    f"the nearest is {nearest(tag, known)!r}",
                )  # fmt: skip


def write_conll(
    path: str | Path,
    sentences: Sequence[Sentence],
    tags: Sequence[Sequence[str]],
    probabilities: Sequence[Sequence[float]] | None = None,
) -> None:
    """Write token, tag and, if given, probability of the tag, apart by tabs.

    Args:
        path: where to; the file appears when it is whole.
        sentences: their own tags are not looked at.
        tags: one for each token.
        probabilities: one for each token; written with four digits.

    Raises:
        ValueError: where the numbers of sentences or tokens differ.
    """
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        for sentence, answers in _answers(sentences, tags, probabilities):
            for token, (tag, probability) in zip(sentence.tokens, answers, strict=True):
                last = "" if probability is None else f"\t{probability:.4f}"
                file.write(f"{token}\t{tag}{last}\n")
            file.write("\n")


def write_conllu(
    source_path: str | Path,
    path: str | Path,
    tags: Sequence[Sequence[str]],
    probabilities: Sequence[Sequence[float]] | None = None,
    tag: Literal["upos", "xpos"] = "upos",
) -> None:
    """Copy a CoNLL-U file with other tags; nothing else changes, to the byte.

    Args:
        source_path: the file that was read, plain or gzip.
        path: where to, uncompressed; the file appears when it is whole.
        tags: one for each word of each sentence, as `read_conllu` counts them.
        probabilities: of the tags; they go into MISC as `Prob=0.1234`.
        tag: the column to replace.

    Raises:
        DataError: where the source cannot be read.
        ValueError: where the numbers of sentences or words differ.
    """
    lines = read_text(source_path).split("\n")
    for sentence, answers in _answers(read_conllu(source_path, None), tags, probabilities):
        for position, (answer, probability) in enumerate(answers):
            place = sentence.line_of(position) - 1
            lines[place] = _retagged(lines[place], _TAG_COLUMN[tag], answer, probability)
    with replacing(path) as partial:
        partial.write_bytes("\n".join(lines).encode())


def _retagged(line: str, column: int, tag: str, probability: float | None) -> str:
    row = line.removesuffix("\r").split("\t")
    row[column] = tag
    if probability is not None:
        others = _PROBABILITY.sub("", row[_MISC]).removeprefix("|")
        kept = [] if others in ("", "_") else [others]
        row[_MISC] = "|".join([*kept, f"Prob={probability:.4f}"])
    return "\t".join(row) + ("\r" if line.endswith("\r") else "")


Answers = list[tuple[str, float | None]]
_Value = TypeVar("_Value")


def _answers(
    sentences: Sequence[Sentence],
    tags: Sequence[Sequence[str]],
    probabilities: Sequence[Sequence[float]] | None,
) -> Iterator[tuple[Sentence, Answers]]:
    """Yield each sentence with the tags and probabilities of its tokens."""
    _check_lengths("tags", sentences, tags)
    if probabilities is None:
        for sentence, row in zip(sentences, tags, strict=True):
            yield sentence, [(tag, None) for tag in row]
        return
    _check_lengths("probabilities", sentences, probabilities)
    for sentence, row, chances in zip(sentences, tags, probabilities, strict=True):
        yield sentence, list(zip(row, chances, strict=True))


def _check_lengths(
    name: str, sentences: Sequence[Sentence], values: Sequence[Sequence[_Value]]
) -> None:
    if len(values) != len(sentences):
        raise ValueError(f"{name}: expected {len(sentences)} sentences, got {len(values)}")
    for place, (sentence, row) in enumerate(zip(sentences, values, strict=True)):
        if len(row) != len(sentence.tokens):
            raise ValueError(
                f"{name}[{place}]: expected {len(sentence.tokens)}, one for each token, "
                f"got {len(row)}"
            )
