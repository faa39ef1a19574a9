"""Tokens as hashed features: a fixed number of small integers per token, with no vocabulary.

Each token is described by F strings (its spelling, affixes, shape and kind, and the spelling of
its neighbours), and each string is hashed into one of `num_buckets` rows of an embedding table.
CRC-32 is the hash because it is the same in every process and on every machine, which Python's
`hash` is not.
"""

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np

_KINDS = (
    ("url", re.compile(r"(https?:|www\.)\S*|\S+\.(com|net|org|ly|me|fm|tv|gd)(/\S*)?", re.I)),
    ("mention", re.compile(r"@\w+")),
    ("hashtag", re.compile(r"#\w+")),
    ("number", re.compile(r"[$+-]?\d[\d.,:/%-]*(st|nd|rd|th|s|am|pm|k|m|%)?", re.I)),
    (
        "emoticon",
        re.compile(r"[<>]?[:;=8xX][-o*'^]?[()\[\]dDpP/\\|@3*oO]+|[(\[][-o]?[:;=]|<3+|[xX]+[dD]+"),
    ),
    ("word", re.compile(r"[^\W\d_]+")),
    ("punctuation", re.compile(r"[\W_]+")),
)
"""Tried in order; a token that none of them matches in full is `mixed`."""

_PLACEHOLDER = {"url": "<url>", "mention": "<mention>"}
_SHAPES = ((str.isupper, "X"), (str.isalpha, "x"), (str.isdigit, "0"))
_NUM_WHOLE_TOKEN = 8
_NEIGHBOURS = (("previous", -1), ("next", 1))
_EDGE = "<edge>"


def kind(token: str) -> str:
    """Return url, mention, hashtag, number, emoticon, word, punctuation or mixed."""
    return next((name for name, pattern in _KINDS if pattern.fullmatch(token)), "mixed")


def shape(token: str) -> str:
    """Return the token with letters as X and x, digits as 0 and the rest as it is."""
    return "".join(next((s for is_a, s in _SHAPES if is_a(c)), c) for c in token)


def collapsed(text: str) -> str:
    """Return the text with every run of one character cut to a single one."""
    return "".join(character for character, _ in groupby(text))


def normalised(token: str) -> str:
    """Return the token in lower case, digits as 0, URLs and mentions as placeholders."""
    return _PLACEHOLDER.get(kind(token), re.sub(r"\d", "0", token.lower()))


def _case(token: str) -> str:
    letters = "".join(filter(str.isalpha, token))
    if not letters:
        return "none"
    if letters.islower():
        return "lower"
    if letters.isupper():
        return "upper" if len(letters) > 1 else "initial"
    return "title" if letters[0].isupper() and letters[1:].islower() else "mixed"


def _marks(token: str) -> str:
    repeated = any(len(list(run)) > 2 for _, run in groupby(token.lower()))
    marks = "".join(mark for mark in "'-._/&" if mark in token)
    return f"{marks}{'0' if any(map(str.isdigit, token)) else ''}{'+' if repeated else ''}"


@dataclass(frozen=True)
class HashedTokenFeatures:
    """Turns tokens into hashed feature ids.

    URLs and mentions share one spelling each, since theirs is new almost every time.

    Attributes:
        num_buckets: rows of the embedding table; ids are 1 to `num_buckets - 1`, and 0 says that
            a feature is absent (a suffix of three characters of a word of two).
        max_affix: longest prefix and suffix, in characters.

    Example:
        >>> features = HashedTokenFeatures(num_buckets=1024, max_affix=3)
        >>> features.ids(["I", "win"]).shape == (2, features.num_features)
        True
    """

    num_buckets: int = 16384
    max_affix: int = 4

    def __post_init__(self) -> None:
        if self.num_buckets < 2:
            raise ValueError(f"num_buckets: expected at least 2, got {self.num_buckets}")
        if self.max_affix < 1:
            raise ValueError(f"max_affix: expected at least 1, got {self.max_affix}")

    @property
    def num_features(self) -> int:
        """F, the number of ids per token."""
        return _NUM_WHOLE_TOKEN + 2 * self.max_affix + len(_NEIGHBOURS)

    def ids(self, tokens: Sequence[str]) -> np.ndarray:
        """Return the feature ids of a sequence of tokens: (T, F) int64, 0 for absent."""
        edged = [None, *tokens, None]
        rows = [
            _token_ids(self, token)
            + tuple(_neighbour_id(self, side, edged[1 + t + step]) for side, step in _NEIGHBOURS)
            for t, token in enumerate(tokens)
        ]
        return np.array(rows, dtype=np.int64).reshape(len(rows), self.num_features)

    def strings(self, token: str) -> Iterator[str | None]:
        """Yield the feature strings of a token itself, None where one is absent."""
        what, lower, drawn = kind(token), normalised(token), shape(token)
        yield f"word={_PLACEHOLDER.get(what, token)}"
        yield f"lower={lower}"
        yield f"collapsed={collapsed(lower)}"
        yield f"shape={drawn}"
        yield f"outline={collapsed(drawn)}"
        yield f"kind={what}"
        yield f"case={_case(token)}"
        yield f"marks={_marks(token)}"
        for length in range(1, self.max_affix + 1):
            present = length <= len(lower) and what not in _PLACEHOLDER
            yield f"prefix={lower[:length]}" if present else None
            yield f"suffix={lower[-length:]}" if present else None

    def bucket(self, feature: str | None) -> int:
        """Return the id of a feature string, 0 for None."""
        if feature is None:
            return 0
        return 1 + zlib.crc32(feature.encode()) % (self.num_buckets - 1)


@lru_cache(maxsize=1 << 17)
def _token_ids(features: HashedTokenFeatures, token: str) -> tuple[int, ...]:
    return tuple(features.bucket(feature) for feature in features.strings(token))


@lru_cache(maxsize=1 << 17)
def _neighbour_id(features: HashedTokenFeatures, side: str, token: str | None) -> int:
    spelling = _EDGE if token is None else normalised(token)
    return features.bucket(f"{side}={spelling}")
