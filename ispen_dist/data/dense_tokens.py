"""Sequences whose tokens are vectors of numbers, such as pictures of letters, as NumPy archives.

Keys, all with one entry per token, the tokens of a sequence one after another: an array of numbers
(N, ...) under a name of one's choice, `word` (N,), the same whole number for all tokens of a
sequence, and `label` (N,) of whole numbers from 0. With `fold` (N,) of whole numbers sequences can
be told apart for training and test. A file without labels is unlabelled. Other keys are not read.

Shapes: N tokens, D numbers of a token, S sequences.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.npyio import NpzFile

from ispen_dist.data.archives import array_of, open_archive
from ispen_dist.data.batch import Batch, rows_to_read
from ispen_dist.data.datasets import TaggingCodec
from ispen_dist.data.errors import DataError
from ispen_dist.data.output_file import replacing
from ispen_dist.data.tables import first_entry, not_finite


@dataclass(frozen=True, eq=False)
class DenseTokens:
    """Sequences of vectors, with a label for each.

    Attributes:
        features: (N, D) float32, finite.
        bounds: (S + 1,) int64, sequence s has the tokens from bounds[s] up to bounds[s + 1].
        labels: (N,) int64 from 0, or None where the data is unlabelled.
        folds: (S,) int64, or None where the file names none.
        path: the file it was read from, for messages.
    """

    features: np.ndarray
    bounds: np.ndarray
    labels: np.ndarray | None
    folds: np.ndarray | None
    path: str = "(in memory)"

    def __len__(self) -> int:
        """S."""
        return len(self.bounds) - 1

    def require_labels(self) -> np.ndarray:
        """Return the labels.

        Raises:
            DataError: where there are none.
        """
        if self.labels is None:
            raise DataError(
                self.path, None, "expected an array 'label', got features only; name a labelled "
                "file",
            )  # fmt: skip
        return self.labels

    def in_folds(self, folds: Collection[int]) -> np.ndarray:
        """Return the numbers of the sequences in some folds, int64.

        Raises:
            DataError: for a fold that the file does not have.
        """
        own = np.empty(0, dtype=np.int64) if self.folds is None else self.folds
        known = np.unique(own).tolist()
        for fold in folds:
            if fold not in known:
                raise DataError(
                    self.path, None, f"fold: expected {fold} among the folds, as data.train_folds "
                    f"or data.test_folds says, got {known}; change them",
                )  # fmt: skip
        return np.flatnonzero(np.isin(own, list(folds)))

    def tokens_of(self, sequences: np.ndarray) -> np.ndarray:
        """Return the numbers of the tokens of some sequences, int64."""
        return np.concatenate([np.arange(self.bounds[s], self.bounds[s + 1]) for s in sequences])


def read_dense_tokens(path: str | Path, key: str, *, labelled: bool = True) -> DenseTokens:
    """Read sequences of vectors.

    Args:
        path: the file.
        key: name of the array of the tokens' numbers.
        labelled: whether the labels are read.

    Raises:
        DataError: for arrays of objects, other shapes, NaN or infinity, labels that are no whole
            numbers from 0, and a sequence that does not stand together.
    """
    archive = open_archive(path, f"{key}=..., word=..., label=...")
    features = array_of(path, archive, key)
    if features.dtype.kind not in "biuf" or features.ndim < 2 or 0 in features.shape:
        raise DataError(
            path, None, f"{key}: expected numbers, one row for each token, got {features.dtype} "
            f"of shape {features.shape}",
        )  # fmt: skip
    features = features.reshape(len(features), -1).astype(np.float32)
    if (entry := first_entry(features, not_finite)) is not None:
        raise DataError(
            path, None, f"{key} token {entry.row}, number {entry.column}: expected a finite number,"
            f" got {entry.value:g}; mend or drop the sequence",
        )  # fmt: skip
    bounds = _bounds(path, _whole(path, archive, "word", len(features)))
    has_labels = labelled and "label" in archive
    labels = _whole(path, archive, "label", len(features)) if has_labels else None
    folds = _whole(path, archive, "fold", len(features)) if "fold" in archive else None
    if folds is not None:
        folds = folds[bounds[:-1]]
    return DenseTokens(features, bounds, labels, folds, str(path))


def _whole(path: str | Path, archive: NpzFile, key: str, number: int) -> np.ndarray:
    array = array_of(path, archive, key)
    if array.dtype.kind not in "iu" or array.shape != (number,):
        raise DataError(
            path, None, f"{key}: expected {number} whole numbers, one for each token, got "
            f"{array.dtype} of shape {array.shape}",
        )  # fmt: skip
    if array.min() < 0:
        token = int(array.argmin())
        raise DataError(path, None, f"{key}[{token}]: expected a number from 0, got {array[token]}")
    return array.astype(np.int64)


def _bounds(path: str | Path, word: np.ndarray) -> np.ndarray:
    starts = np.flatnonzero(np.diff(word, prepend=-1))
    if len(np.unique(word)) != len(starts):
        values, counts = np.unique(word[starts], return_counts=True)
        raise DataError(
            path, None, "word: expected the tokens of a sequence one after another, got "
            f"{values[counts > 1][0]} in two places; sort them",
        )  # fmt: skip
    return np.append(starts, len(word))


@dataclass(frozen=True)
class DenseTaggingDataset:
    """Sequences of vectors with their tags.

    Attributes:
        table: the sequences.
        codec: names of the tags, which are the labels as text.
        pad_to: token dimension is rounded up to a multiple of this, to keep shapes few.
    """

    table: DenseTokens
    codec: TaggingCodec
    pad_to: int = 8

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.table)

    @cached_property
    def _targets(self) -> np.ndarray:
        """Numbers of the tags; labels that the codec does not know are those of no row in use."""
        if self.table.labels is None:
            return np.zeros(len(self.table.features), dtype=np.int64)
        number = {int(tag): i for i, tag in enumerate(self.codec.tags)}
        return np.array([number.get(label, 0) for label in self.table.labels.tolist()])

    def collate(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Return a padded batch, see `Batch`."""
        chosen, weight = rows_to_read(rows)
        bounds = self.table.bounds
        lengths = bounds[chosen + 1] - bounds[chosen]
        num_tokens = -(-int(lengths.max()) // self.pad_to) * self.pad_to
        mask = np.arange(num_tokens) < lengths[:, None]
        token = np.where(mask, bounds[chosen][:, None] + np.arange(num_tokens), 0)
        inputs = {
            "features": torch.from_numpy(self.table.features[token] * mask[..., None]).float(),
            "mask": torch.from_numpy(mask),
        }
        target = torch.from_numpy(self._targets[token] * mask)
        return Batch(inputs, target, weight, torch.from_numpy(chosen))


def write_dense_tokens(
    path: str | Path,
    table: DenseTokens,
    key: str,
    labels: np.ndarray,
    probabilities: np.ndarray | None = None,
) -> None:
    """Write the sequences with predicted labels, and `probabilities` of them if given.

    Args:
        path: where to; the file appears when it is whole.
        table: its own labels are not looked at.
        key: name of the array of the tokens' numbers.
        labels: (N,) whole numbers.
        probabilities: (N,) in [0, 1], written as float32.
    """
    word = np.repeat(np.arange(len(table)), np.diff(table.bounds))
    arrays: dict[str, Any] = {key: table.features, "word": word, "label": labels}
    if probabilities is not None:
        arrays["probabilities"] = np.asarray(probabilities, dtype=np.float32)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
