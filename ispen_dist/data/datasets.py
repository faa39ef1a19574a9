"""Data sets in memory, and the codecs that turn structures into numbers and back.

A codec is everything that must be kept beside the weights to read new files: label names, feature
sizes. It is a frozen dataclass of plain values and travels in `model/config.json`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from scipy import sparse

from ispen_dist.data.batch import Batch, rows_to_read
from ispen_dist.data.segmentation import SegmentationCodec
from ispen_dist.data.subwords import Subwords
from ispen_dist.data.tables import MultiLabelTable, Sentence
from ispen_dist.data.token_features import HashedTokenFeatures


class Dataset(Protocol):
    """Examples that can be put together into batches."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def collate(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Return the batch of the given rows; a filler of weight 0 where there are none."""
        ...


@dataclass(frozen=True)
class DenseTokenFeatures:
    """Tokens that are vectors of numbers.

    Attributes:
        size: D, numbers of a token.
    """

    size: int


@dataclass(frozen=True)
class TaggingCodec:
    """Names of the tags and the token features.

    Attributes:
        tags: tag names; a tag's number is its place.
        features: the hashed token features, or the size of tokens that are vectors.
        spans: whether the tags spell entities, `O`, `B-TYPE` and `I-TYPE`.
        subwords: tokenizer of a pretrained encoder, where a network is one.
    """

    tags: tuple[str, ...]
    features: HashedTokenFeatures | DenseTokenFeatures
    spans: bool = False
    subwords: Subwords | None = None

    @property
    def num_inputs(self) -> int:
        """Rows of the embedding table, or D of tokens that are vectors."""
        if isinstance(self.features, DenseTokenFeatures):
            return self.features.size
        return self.features.num_buckets

    @property
    def num_outputs(self) -> int:
        """K."""
        return len(self.tags)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Tag names."""
        return self.tags


@dataclass(frozen=True)
class MultiLabelCodec:
    """Names of the labels and of the features.

    Attributes:
        labels: label names; a label's number is its place.
        feature_names: names of the input columns.
    """

    labels: tuple[str, ...]
    feature_names: tuple[str, ...]

    @property
    def num_inputs(self) -> int:
        """D."""
        return len(self.feature_names)

    @property
    def num_outputs(self) -> int:
        """L."""
        return len(self.labels)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Label names."""
        return self.labels


Codec = TaggingCodec | MultiLabelCodec | SegmentationCodec


@dataclass(frozen=True)
class TaggingDataset:
    """Sentences with their tags.

    Attributes:
        sentences: tokens and tags; tags may be None where the data is unlabelled.
        codec: numbers of the tags, and the token features.
        pad_to: token dimension is rounded up to a multiple of this, to keep shapes few.
    """

    sentences: tuple[Sentence, ...]
    codec: TaggingCodec
    pad_to: int = 8

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self.sentences)

    @cached_property
    def _encoded(self) -> list[tuple[np.ndarray, np.ndarray]]:
        number = {tag: i for i, tag in enumerate(self.codec.tags)}
        features = self.codec.features
        assert isinstance(features, HashedTokenFeatures)
        encoded = []
        for sentence in self.sentences:
            tags = sentence.tags or (self.codec.tags[0],) * len(sentence.tokens)
            target = np.array([number[tag] for tag in tags], dtype=np.int64)
            encoded.append((features.ids(sentence.tokens), target))
        return encoded

    def collate(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Return a padded batch, see `Batch`."""
        chosen, weight = rows_to_read(rows)
        examples = [self._encoded[row] for row in chosen]
        longest = max(len(target) for _, target in examples)
        length = -(-longest // self.pad_to) * self.pad_to
        ids = np.zeros((len(chosen), length, examples[0][0].shape[1]), dtype=np.int64)
        target = np.zeros((len(chosen), length), dtype=np.int64)
        mask = np.zeros((len(chosen), length), dtype=bool)
        for i, (example_ids, example_target) in enumerate(examples):
            ids[i, : len(example_ids)] = example_ids
            target[i, : len(example_target)] = example_target
            mask[i, : len(example_target)] = True
        inputs = {"features": torch.from_numpy(ids), "mask": torch.from_numpy(mask)}
        if self.codec.subwords is not None:
            inputs |= self._subword_inputs(chosen, length)
        return Batch(inputs, torch.from_numpy(target), weight, torch.from_numpy(chosen))

    @cached_property
    def _subwords(self) -> list[tuple[np.ndarray, np.ndarray]]:
        assert self.codec.subwords is not None
        return [self.codec.subwords.encode(s.tokens, s.line) for s in self.sentences]

    def _subword_inputs(self, rows: np.ndarray, num_tokens: int) -> dict[str, torch.Tensor]:
        examples = [self._subwords[row] for row in rows]
        longest = max(len(ids) for ids, _ in examples)
        assert self.codec.subwords is not None
        # No padding beyond the encoder's table of positions.
        length = min(-(-longest // self.pad_to) * self.pad_to, self.codec.subwords.max_length)
        ids = np.zeros((len(rows), length), dtype=np.int64)
        mask = np.zeros((len(rows), length), dtype=bool)
        starts = np.zeros((len(rows), num_tokens), dtype=np.int64)
        for i, (example_ids, places) in enumerate(examples):
            ids[i, : len(example_ids)] = example_ids
            mask[i, : len(example_ids)] = True
            starts[i, : len(places)] = places
        arrays = {"subwords": ids, "subword_mask": mask, "starts": starts}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@dataclass(frozen=True)
class MultiLabelDataset:
    """Feature rows with their label sets.

    Attributes:
        table: features (N, D) and targets (N, L), dense or sparse; a batch is always dense.
        codec: names of labels and features.
    """

    table: MultiLabelTable
    codec: MultiLabelCodec

    def __len__(self) -> int:
        """Number of examples."""
        return self.table.features.shape[0]

    def collate(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Return a dense batch, see `Batch`."""
        chosen, weight = rows_to_read(rows)
        features = _dense(self.table.features, chosen)
        if self.table.targets is None:
            target = torch.zeros(len(chosen), self.codec.num_outputs)
        else:
            target = _dense(self.table.targets, chosen)
        return Batch({"features": features}, target, weight, torch.from_numpy(chosen))


def _dense(matrix: np.ndarray | sparse.csr_matrix, rows: np.ndarray) -> torch.Tensor:
    part = matrix[rows]
    dense = part.toarray() if sparse.issparse(part) else part
    return torch.from_numpy(np.ascontiguousarray(dense, dtype=np.float32))


@dataclass(frozen=True)
class Subset:
    """A part of a data set by row numbers.

    Attributes:
        whole: the data set.
        rows: which rows belong, int64.
    """

    whole: Dataset
    rows: np.ndarray

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.rows)

    def collate(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Return the batch of the given rows of the part."""
        return self.whole.collate(self.rows[np.asarray(rows, dtype=np.int64)])


def whole_of(dataset: Dataset) -> Dataset:
    """Return the data set that a part, or a part of a part, is of: the one that rows count in."""
    while isinstance(dataset, Subset):
        dataset = dataset.whole
    return dataset
