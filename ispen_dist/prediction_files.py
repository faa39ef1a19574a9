"""Predictions written in the format of the task, for a file that may be unlabelled."""

import errno
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from ispen_dist.config import ConfigError
from ispen_dist.data.arff import write_arff
from ispen_dist.data.conll import write_conll, write_conllu
from ispen_dist.data.datasets import Dataset, MultiLabelDataset, TaggingDataset
from ispen_dist.data.dense_tokens import DenseTaggingDataset, write_dense_tokens
from ispen_dist.data.images import write_images
from ispen_dist.data.loading import load_file
from ispen_dist.data.npz import write_npz
from ispen_dist.data.output_file import standard_output
from ispen_dist.data.segmentation import SegmentationDataset
from ispen_dist.data.svmlight import write_svmlight
from ispen_dist.decisions import decide
from ispen_dist.predictor import Predictor


def predict_file(
    predictor: Predictor,
    source: Path,
    target: Path | None,
    *,
    probabilities: bool = False,
    threshold: float | None = None,
) -> None:
    """Read a file, predict every example, and write it back with the predicted structures.

    Args:
        predictor: the trained model; its configuration tells the format.
        source: file to read; structures it may already have are not looked at.
        target: file to write, whole or not at all; None writes text formats to standard output.
        probabilities: also write the probability of each decision.
        threshold: decision threshold of labels; None decides as the run did. Not for tagging.

    Raises:
        DataError: for a malformed file.
        ConfigError: for a target that cannot be written, a binary format on standard output, and a
            threshold of tags or outside (0, 1).
    """
    if threshold is not None and not 0.0 < threshold < 1.0:
        raise ConfigError(f"--threshold: expected a number between 0 and 1, got {threshold:g}")
    if threshold is not None and predictor.config.data.task == "tagging":
        raise ConfigError(
            f"--threshold: expected none, as tags are not decided by one, got {threshold:g}"
        )
    if target is not None:
        try:
            _check_target(target)
            _write(predictor, source, target, probabilities, threshold)
        except OSError as error:
            raise ConfigError(
                f"--output: expected a file that can be written, got {target}: {error.strerror}"
            ) from None
        return
    if predictor.config.data.format == "npz":
        raise ConfigError("--output: expected a file to write, as .npz is binary, got none")
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "predictions"
        _write(predictor, source, whole, probabilities, threshold)
        with whole.open(encoding="utf-8") as file, standard_output():
            shutil.copyfileobj(file, sys.stdout)


def _check_target(target: Path) -> None:
    """Raise OSError, before anything is predicted, where there can be no such file."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    target.parent.mkdir(parents=True, exist_ok=True)


def _write(
    predictor: Predictor, source: Path, target: Path, probabilities: bool, threshold: float | None
) -> None:
    dataset = load_file(predictor.config, predictor.codec, source, labelled=False)
    if isinstance(dataset, TaggingDataset):
        _write_tags(predictor, dataset, source, target, probabilities)
    elif isinstance(dataset, DenseTaggingDataset):
        _write_dense(predictor, dataset, target, probabilities)
    elif isinstance(dataset, MultiLabelDataset):
        _write_labels(predictor, dataset, target, probabilities, threshold)
    elif isinstance(dataset, SegmentationDataset):
        chance = _chances(predictor, dataset)
        shown = chance if probabilities else None
        write_images(target, dataset.table, chance > (threshold or 0.5), shown)


def _chances(predictor: Predictor, dataset: Dataset) -> np.ndarray:
    return np.concatenate([ybar.cpu().numpy() for _, ybar in predictor.predict(dataset)])


def _write_tags(
    predictor: Predictor, dataset: TaggingDataset, source: Path, target: Path, probabilities: bool
) -> None:
    tags, chances = _tags(predictor, dataset)
    shown = chances if probabilities else None
    data = predictor.config.data
    if data.format == "conllu":
        write_conllu(source, target, tags, shown, tag=data.tag)
    else:
        write_conll(target, dataset.sentences, tags, shown)


def _tags(
    predictor: Predictor, dataset: TaggingDataset | DenseTaggingDataset
) -> tuple[list[list[str]], list[list[float]]]:
    """Return the most probable tag of each token of each sequence, and its probability."""
    tags: list[list[str]] = []
    chances: list[list[float]] = []
    for batch, ybar in predictor.predict(dataset):
        best = ybar.max(-1)
        lengths = batch.inputs["mask"].sum(-1).tolist()
        for length, chance, number in zip(
            lengths, best.values.tolist(), best.indices.tolist(), strict=True
        ):
            tags.append([dataset.codec.tags[i] for i in number[:length]])
            chances.append(chance[:length])
    return tags, chances


def _write_dense(
    predictor: Predictor, dataset: DenseTaggingDataset, target: Path, probabilities: bool
) -> None:
    tags, chances = _tags(predictor, dataset)
    labels = np.array([int(tag) for row in tags for tag in row])
    shown = np.concatenate(chances) if probabilities else None
    write_dense_tokens(target, dataset.table, predictor.config.data.features_key, labels, shown)


def _write_labels(
    predictor: Predictor,
    dataset: MultiLabelDataset,
    target: Path,
    probabilities: bool,
    threshold: float | None,
) -> None:
    chance = _chances(predictor, dataset)
    decoder, choices = predictor.config.inference.decoder, predictor.choices
    if threshold is not None:
        decoder, choices = "threshold", {"threshold": threshold}
    predicted = decide(torch.from_numpy(chance), decoder, choices).numpy().astype(np.uint8)
    shown = chance if probabilities else None
    data = predictor.config.data
    if data.format == "arff":
        write_arff(target, dataset.table, predicted, shown)
    elif data.format == "svmlight":
        write_svmlight(target, dataset.table, predicted, shown, zero_based=data.zero_based)
    else:
        write_npz(target, dataset.table, predicted, shown)
