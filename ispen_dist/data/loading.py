"""From the `data` section to data sets: paths, splits and codecs."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np

from ispen_dist.config import Config, ConfigError, DataConfig
from ispen_dist.config.checks import check
from ispen_dist.data.arff import read_arff
from ispen_dist.data.conll import check_tags, read_conll, read_conllu
from ispen_dist.data.datasets import (
    Codec,
    Dataset,
    DenseTokenFeatures,
    MultiLabelCodec,
    MultiLabelDataset,
    Subset,
    TaggingCodec,
    TaggingDataset,
)
from ispen_dist.data.dense_tokens import (
    DenseTaggingDataset,
    DenseTokens,
    read_dense_tokens,
)
from ispen_dist.data.errors import DataError
from ispen_dist.data.images import ImageTable, read_images
from ispen_dist.data.npz import read_npz
from ispen_dist.data.segmentation import SegmentationCodec, SegmentationDataset
from ispen_dist.data.splits import read_split_file, seeded_split, split_names
from ispen_dist.data.subwords import read_subwords
from ispen_dist.data.svmlight import read_svmlight
from ispen_dist.data.tables import MultiLabelTable, Sentence
from ispen_dist.data.token_features import HashedTokenFeatures


@dataclass(frozen=True)
class Splits:
    """The data sets of a run.

    Attributes:
        train: for the inner problem, and for the outer one unless examples are held out; dev
            besides with `data.train_on_dev`.
        dev: selects the model and tunes the threshold.
        test: read once, at the end; None where there is none.
        codec: numbers of tags or labels, and of features.
    """

    train: Dataset
    dev: Dataset
    test: Dataset | None
    codec: Codec

    @property
    def digest(self) -> str:
        """12 hex digits that change with labels, features and the numbers of examples."""
        basis = [asdict(self.codec), len(self.train), len(self.dev)]
        return hashlib.sha256(json.dumps(basis).encode()).hexdigest()[:12]


def data_path(config: DataConfig, name: str) -> Path:
    """Return the path of a data file; relative ones are below `data.root`."""
    return _root(config) / name


def _root(config: DataConfig) -> Path:
    if config.root.startswith("package:"):
        name = config.root.removeprefix("package:")
        folder = Path(str(resources.files("ispen_dist.data"))) / "embedded"
        if not (folder / name).is_dir():
            embedded = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir()))
            raise ConfigError(
                f"data.root: expected an embedded data set, one of {embedded}, got {name!r}"
            )
        return folder / name
    return Path(config.root or os.environ.get("ISPEN_DATA") or "../shared/data")


def load_splits(config: Config) -> Splits:
    """Read all files of the configuration and build the data sets.

    Raises:
        DataError: for a malformed file, with file and line.
        ConfigError: for a setting that does not fit the data.
    """
    splits = {
        "tagging": _tagging_splits,
        "multilabel": _multilabel_splits,
        "segmentation": _segmentation_splits,
    }
    return splits[config.data.task](config)


def has_test(config: DataConfig) -> bool:
    """Whether `load_splits` gives a test set; no more of the data is read than the split file.

    Raises:
        DataError: for a malformed split file.
    """
    if config.test or config.test_folds:
        return True
    split_file = config.split_file
    return bool(split_file) and "test" in split_names(data_path(config, split_file))


def load_named(config: Config, codec: Codec, name: str) -> Dataset:
    """Read one evaluation set by name: `train`, `dev`, `test`, or a key of `data.extra`.

    Raises:
        ConfigError: for a name the configuration does not know.
        DataError: where it is a part of training data that has changed since.
    """
    data = config.data
    files = {"dev": data.dev, "test": data.test, **data.extra}
    if files.get(name):
        return load_file(config, codec, data_path(data, files[name]))
    splits = load_splits(config)
    if splits.codec != codec:
        raise DataError(
            data_path(data, data.train[0]), None, "expected the labels and features of the model, "
            "got others; restore the training data, or name a file under data.extra",
        )  # fmt: skip
    known = {"train": splits.train, "dev": splits.dev}
    if splits.test is not None:
        known["test"] = splits.test
    if name not in known:
        names = ", ".join([*known, *config.data.extra])
        raise ConfigError(f"--split: expected one of {names}, got {name!r}")
    return known[name]


def load_file(config: Config, codec: Codec, path: Path, *, labelled: bool = True) -> Dataset:
    """Read one file in the format of the task, with a known codec.

    Args:
        config: settings of the run.
        codec: tags or labels, and features, of the training data.
        path: the file.
        labelled: whether the structures are needed; if not, those the file has are not looked at.

    Raises:
        DataError: for a malformed file, unknown labels, or a file without labels that needs them.
    """
    if isinstance(codec, TaggingCodec) and isinstance(codec.features, DenseTokenFeatures):
        return _read_dense(config.data, codec, path, labelled)
    if isinstance(codec, TaggingCodec):
        sentences = _read_sentences(config.data, path, labelled)
        if labelled:
            _require_tags(sentences, path)
            check_tags(sentences, codec.tags, path)
        return TaggingDataset(tuple(sentences), codec)
    if isinstance(codec, SegmentationCodec):
        images = _read_images(config.data, path) if labelled else read_images(path, labelled=False)
        images.check_size(codec.size)
        if labelled:
            images.check_stride(codec.output_stride)
        return SegmentationDataset(images, codec)
    table = _read_table(config.data, path, codec, labelled)
    table.check_columns(codec.labels, codec.feature_names)
    if labelled:
        _require_targets(table, path)
    return MultiLabelDataset(table, codec)


def _require_tags(sentences: Sequence[Sentence], path: Path) -> None:
    for sentence in sentences:
        if sentence.tags is None:
            raise DataError(
                path, sentence.line, "expected a tag for every token, got none; check "
                "data.tag_column or data.tag, or name a labelled file"
            )  # fmt: skip


def _require_targets(table: MultiLabelTable, path: Path) -> None:
    if table.targets is None:
        raise DataError(path, None, "expected labels, got features only; name a labelled file")


def _read_sentences(config: DataConfig, path: Path, labelled: bool = True) -> Sequence[Sentence]:
    if config.format == "conllu":
        return read_conllu(path, tag=config.tag if labelled else None)
    return read_conll(path, config.token_column, config.tag_column if labelled else None)


def _read_dense(
    config: DataConfig, codec: TaggingCodec, path: Path, labelled: bool
) -> DenseTaggingDataset:
    table = read_dense_tokens(path, config.features_key, labelled=labelled)
    if table.features.shape[1] != codec.num_inputs:
        raise DataError(
            path, None, f"{config.features_key}: expected {codec.num_inputs} numbers for each "
            f"token, as in training, got {table.features.shape[1]}; use data of the same kind",
        )  # fmt: skip
    if labelled:
        _require_known(table, table.require_labels(), codec.tags)
    return DenseTaggingDataset(table, codec)


def _require_known(table: DenseTokens, labels: np.ndarray, tags: Sequence[str]) -> None:
    for label in np.unique(labels):
        if str(label) not in tags:
            raise DataError(
                table.path, None, f"label: expected one of the {len(tags)} labels of the training "
                f"data, got {label}; drop its sequences",
            )  # fmt: skip


def _dense_splits(config: Config) -> Splits:
    """Cut by folds, where the settings name some, otherwise as other formats are."""
    data = config.data
    table = read_dense_tokens(data_path(data, data.train[0]), data.features_key)
    labels = table.require_labels()
    rows = table.in_folds(data.train_folds) if data.train_folds else np.arange(len(table))
    tags = tuple(map(str, np.unique(labels[table.tokens_of(rows)])))
    codec = TaggingCodec(tags, DenseTokenFeatures(table.features.shape[1]))
    whole = DenseTaggingDataset(table, codec)
    if not data.train_folds:
        return _split(config, whole, codec)
    parts = _split(config, Subset(whole, rows), codec)
    if not data.test_folds:
        return parts
    test = table.in_folds(data.test_folds)
    _require_known(table, labels[table.tokens_of(test)], tags)
    return replace(parts, test=Subset(whole, test))


def _train_files(data: DataConfig) -> list[Path]:
    """Return the training files, the dev file among them where it is trained on."""
    names = [*data.train, data.dev] if data.train_on_dev and data.dev else data.train
    return [data_path(data, name) for name in names]


def _tagging_splits(config: Config) -> Splits:
    data = config.data
    if data.format == "npz":
        return _dense_splits(config)
    sentences: list[Sentence] = []
    for path in _train_files(data):
        part = _read_sentences(data, path)
        _require_tags(part, path)
        sentences += part
    tags = tuple(sorted({tag for s in sentences for tag in s.tags or ()}))
    features = HashedTokenFeatures(
        num_buckets=config.features.num_buckets, max_affix=config.features.max_affix
    )
    if data.spans == "bio":
        _require_spans(tags)
    model = config.encoder_model
    subwords = read_subwords(model) if model else None
    codec = TaggingCodec(tags, features, data.spans == "bio", subwords)
    whole = TaggingDataset(tuple(sentences), codec)
    return _split(config, whole, codec)


def _require_spans(tags: Sequence[str]) -> None:
    for tag in tags:
        if tag != "O" and not (tag.startswith(("B-", "I-")) and len(tag) > 2):
            raise ConfigError(
                f"data.spans: expected tags O, B-TYPE and I-TYPE for bio, got {tag!r} in the "
                "training data; set data.spans=none, or choose another data.tag_column"
            )


def _multilabel_splits(config: Config) -> Splits:
    paths = _train_files(config.data)
    first, *rest = [_read_table(config.data, path) for path in paths]
    for path, table in zip(paths, [first, *rest], strict=True):
        _require_targets(table, path)
    codec = MultiLabelCodec(first.label_names, first.feature_names)
    return _split(config, MultiLabelDataset(first.concatenate(rest), codec), codec)


def _segmentation_splits(config: Config) -> Splits:
    first, *rest = [_read_images(config.data, path) for path in _train_files(config.data)]
    whole = first.concatenate(rest)
    # The scale of the channels is that of all training files, as they are named in `data.train`.
    codec = SegmentationCodec.of(whole)
    shifts = {
        "data.shift": [config.data.shift],
        "inference.view_shifts": config.inference.view_shifts,
    }
    side, stride = min(codec.size[:2]), codec.output_stride
    inside = f"less than {side}, the shorter side of an image"
    even = f"a multiple of {stride}, the pixels of an image for one of its mask"
    for setting, all_pixels in shifts.items():
        for pixels in map(abs, all_pixels):
            check(pixels < side, setting, inside, pixels)
            check(pixels % stride == 0, setting, even, pixels)
    originals = _read_originals(config.data, whole)
    return _split(config, SegmentationDataset(whole, codec, originals), codec)


def _read_originals(data: DataConfig, whole: ImageTable) -> ImageTable | None:
    """Read the originals of all training images, None where the settings name none."""
    if not data.originals:
        return None
    paths = _train_files(data)
    by_path = {data_path(data, name): original for name, original in data.originals.items()}
    for path in paths:
        check(
            path in by_path,
            "data.originals",
            f"one of every training file, {', '.join(map(str, paths))}",
            data.originals,
        )
    first, *rest = [read_images(data_path(data, by_path[path])) for path in paths]
    table = first.concatenate(rest)
    number, height, width, channels = whole.images.shape
    factor = table.images.shape[1] // height
    if table.images.shape != (number, factor * height, factor * width, channels):
        raise DataError(
            first.path, None, f"images: expected those of {whole.path}, {whole.images.shape}, with "
            f"height and width larger by one whole factor, got {table.images.shape}; write the "
            "same images in the same order",
        )  # fmt: skip
    table.check_stride(1)
    return table


def _read_images(config: DataConfig, path: Path) -> ImageTable:
    """Read images with the masks that `data.masks` has for their file, by default its own."""
    masks = {data_path(config, images): name for images, name in config.masks.items()}
    return read_images(path, data_path(config, masks[path]) if path in masks else None)


def _read_table(
    config: DataConfig, path: Path, codec: MultiLabelCodec | None = None, labelled: bool = True
) -> MultiLabelTable:
    if config.format == "arff":
        if codec is not None:
            return read_arff(path, None, label_names=codec.labels, labelled=labelled)
        return read_arff(path, data_path(config, config.labels_xml))
    if config.format == "svmlight":
        sizes = config.num_features, config.num_labels
        return read_svmlight(path, *sizes, zero_based=config.zero_based, labelled=labelled)
    return read_npz(path, codec.labels if codec else None, labelled=labelled)


def _split(config: Config, whole: Dataset, codec: Codec) -> Splits:
    """Cut by the split file, or by files, or hold a declared seeded dev split out of train."""
    data = config.data
    test = load_file(config, codec, data_path(data, data.test)) if data.test else None
    if data.split_file:
        rows = read_split_file(data_path(data, data.split_file), len(whole))
        twice = "test" in rows and test is not None
        check(not twice, "data.test", "no file beside the test rows of data.split_file", data.test)
        if data.train_on_dev:
            rows["train"] = np.concatenate([rows["train"], rows["dev"]])
        parts = {name: Subset(whole, part) for name, part in rows.items()}
        return Splits(parts["train"], parts["dev"], parts.get("test", test), codec)
    if data.dev:
        dev = load_file(config, codec, data_path(data, data.dev))
        return Splits(whole, dev, test, codec)
    expected = "2 examples or more, to hold some of them out as dev"
    check(len(whole) > 1, "data.train", expected, len(whole), "name a file under data.dev")
    train_rows, dev_rows = seeded_split(len(whole), data.dev_fraction, data.dev_seed)
    train = whole if data.train_on_dev else Subset(whole, train_rows)
    return Splits(train, Subset(whole, dev_rows), test, codec)


def hold_out(config: Config, train: Dataset) -> tuple[Dataset, Dataset]:
    """Return the examples of the inner and of the outer problem.

    They are the same unless `outer.held_out_fraction` sets some aside for the outer loss.
    """
    fraction = config.outer.held_out_fraction
    if fraction == 0.0 or config.train.method == "mle":
        return train, train
    expected = "0 where there is a single training example"
    check(len(train) > 1, "outer.held_out_fraction", expected, fraction)
    inner_rows, outer_rows = seeded_split(len(train), fraction, config.train.seed)
    return Subset(train, np.asarray(inner_rows)), Subset(train, np.asarray(outer_rows))
