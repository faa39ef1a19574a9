"""Where the examples are, and how tokens become features."""

from dataclasses import dataclass, field
from typing import Literal

from ispen_dist.config.checks import ANY, check, check_ranges


@dataclass(frozen=True)
class DataConfig:
    """Where the examples are and how to read them."""

    task: Literal["tagging", "multilabel", "segmentation"] = "tagging"
    """Kind of structure: tag sequences, label sets, or foreground masks of images."""
    format: Literal["conll", "conllu", "arff", "svmlight", "npz"] = "conll"
    """File format of all splits."""
    root: str = ""
    """Folder of relative paths. Empty: the environment variable ISPEN_DATA, else ../shared/data.
    `package:NAME` is a data set embedded in the installed package."""
    train: list[str] = field(default_factory=list)
    """Training files, in order. With `split_file`, all files, whose rows are counted through."""
    dev: str = ""
    """Development file. Empty: from `split_file`, or held out of train by `dev_fraction`."""
    test: str = ""
    """Test file. Empty: from `split_file`, or none."""
    extra: dict[str, str] = field(default_factory=dict)
    """Further test sets by name, for evaluate.py --split NAME."""
    split_file: str = ""
    """JSON of zero-based row numbers under train, dev and test."""
    dev_fraction: float = 0.2
    """Share of train that becomes dev where neither a dev file nor a split file is given."""
    dev_seed: int = 0
    """Seed of that split."""
    train_on_dev: bool = False
    """Train on the dev examples as well, once everything has been chosen on them: dev is not
    evaluated, and the networks of the last round are kept. Label sets need `inference.threshold`
    then."""
    token_column: int = 0
    """CoNLL: zero-based column of the token."""
    tag_column: int = 1
    """CoNLL: zero-based column of the tag."""
    tag: Literal["upos", "xpos"] = "upos"
    """CoNLL-U: which column is predicted."""
    features_key: str = "features"
    """Tagging from npz: name of the array with the numbers of each token."""
    train_folds: list[int] = field(default_factory=list)
    """Tagging from npz: folds of the training file that are trained on, dev held out of them by
    `dev_fraction`. Empty: all."""
    test_folds: list[int] = field(default_factory=list)
    """Tagging from npz: folds of the training file that are the test set."""
    spans: Literal["none", "bio"] = "none"
    """Tagging: whether tags spell entities as O, B-TYPE and I-TYPE. Then the F1 of whole entities
    selects the model, otherwise the accuracy of tags."""
    labels_xml: str = ""
    """ARFF: Mulan XML file that names the labels."""
    num_features: int = 0
    """svmlight: number of features."""
    num_labels: int = 0
    """svmlight: number of labels."""
    zero_based: bool = True
    """svmlight: whether feature indices start at zero."""
    masks: dict[str, str] = field(default_factory=dict)
    """Segmentation: by file of images, the file whose masks stand in the place of its own. Masks
    may be smaller than the images by one whole factor, the output stride; then so is what is
    predicted."""
    originals: dict[str, str] = field(default_factory=dict)
    """Segmentation: by training file, one of the same images and masks, as large or larger by one
    whole factor. Training images are turned and zoomed at that size and then reduced, as outlines
    of small masks are too coarse for it."""
    flip: bool = False
    """Segmentation: mirror training images left and right at random."""
    shift: int = 0
    """Segmentation: shift training images by up to as many pixels each way at random, whole pixels
    of the mask."""
    rotate: float = 0.0
    """Segmentation: turn training images by up to as many degrees each way at random."""
    zoom: float = 0.0
    """Segmentation: enlarge or shrink training images at random, up to exp(zoom) times."""
    colour: float = 0.0
    """Segmentation: change channels of training images at random, each by up to this many of its
    standard deviations, and its contrast by up to this share."""

    def __post_init__(self) -> None:
        check(bool(self.train), "data.train", "at least one file", self.train, "name a file")
        check_ranges(
            "data", self, dev_fraction=(0.0, 0.9), token_column=(0, ANY), tag_column=(0, ANY)
        )
        check_ranges(
            "data", self, shift=(0, ANY), rotate=(0.0, 180.0), zoom=(0.0, 2.0), colour=(0.0, 1.0)
        )
        if self.split_file:
            expected = "none beside data.split_file, which has a part of that name"
            check(not self.dev, "data.dev", expected, self.dev)
        if self.test_folds:
            check(not self.test, "data.test", "none beside data.test_folds", self.test)
        if not self.dev and not self.split_file:
            check(
                self.dev_fraction > 0.0,
                "data.dev_fraction",
                "a number above 0 without data.dev and data.split_file",
                self.dev_fraction,
                "a dev set selects the model",
            )
        formats = {
            "tagging": ("conll", "conllu", "npz"),
            "multilabel": ("arff", "svmlight", "npz"),
            "segmentation": ("npz",),
        }
        check(
            self.format in formats[self.task],
            "data.format",
            f"one of {', '.join(formats[self.task])} for data.task={self.task}",
            self.format,
            "change data.format or data.task",
        )
        files = [*self.train, self.dev, self.test, *self.extra.values()]
        self._check_beside("data.masks", self.masks, files)
        self._check_beside("data.originals", self.originals, files)
        if self.format == "arff":
            check(
                bool(self.labels_xml),
                "data.labels_xml",
                "the Mulan XML file of the ARFF labels",
                "",
            )
        if self.train_folds or self.test_folds:
            check(
                self.task == "tagging" and self.format == "npz" and bool(self.train_folds),
                "data.train_folds",
                "some, of data.task=tagging with data.format=npz",
                self.train_folds,
                "name the folds to train on, or leave data.test_folds empty",
            )
            check(
                not set(self.train_folds) & set(self.test_folds),
                "data.test_folds",
                f"none of data.train_folds={self.train_folds}",
                self.test_folds,
            )
        if self.task == "tagging" and self.format == "npz":
            check(len(self.train) == 1, "data.train", "one file with data.format=npz", self.train)
            check(self.spans == "none", "data.spans", "none with data.format=npz", self.spans)
        if self.format == "svmlight":
            check_ranges("data", self, num_features=(1, ANY), num_labels=(1, ANY))

    def _check_beside(self, setting: str, beside: dict[str, str], files: list[str]) -> None:
        """Check the keys of a mapping from files of images to others."""
        if beside:
            expected = f"none for data.task={self.task}"
            check(self.task == "segmentation", setting, expected, beside)
            unknown = ", ".join(sorted(set(beside) - set(files)))
            expected = f"files of images, of {', '.join(filter(None, files))}"
            check(not unknown, setting, expected, unknown)


@dataclass(frozen=True)
class FeatureConfig:
    """Hashed token features; tagging only."""

    num_buckets: int = 16384
    """Rows of the embedding table; bucket 0 is padding."""
    max_affix: int = 4
    """Longest prefix and suffix, in characters."""

    def __post_init__(self) -> None:
        check_ranges("features", self, num_buckets=(2, ANY), max_affix=(1, 16))
