"""A trained model as a folder: both networks as safetensors, settings and codec as JSON."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ispen_dist.command_line import config_from_dict, config_to_dict
from ispen_dist.config import Config, ConfigError
from ispen_dist.config.inference import UNTUNED
from ispen_dist.data.batch import Batch
from ispen_dist.data.datasets import (
    Codec,
    Dataset,
    DenseTokenFeatures,
    MultiLabelCodec,
    TaggingCodec,
)
from ispen_dist.data.output_file import replacing
from ispen_dist.data.segmentation import SegmentationCodec
from ispen_dist.data.subwords import Subwords
from ispen_dist.data.token_features import HashedTokenFeatures
from ispen_dist.evaluate import evaluate, predictions
from ispen_dist.inference import predict
from ispen_dist.metrics import build_metrics
from ispen_dist.models.output_spaces import Inputs
from ispen_dist.players import Players, build_players, networks_of, replicated

FORMAT_VERSION = 2


class ModelError(ValueError):
    """A model folder that cannot be loaded; the message names the file and what was found."""


@dataclass(frozen=True)
class Predictor:
    """The inference network and the energy it was trained on, ready to use.

    Attributes:
        players: both networks.
        codec: names of tags or labels, and token features.
        choices: what was tuned on dev of how labels are decided, see `decisions`.

    Example:
        `predictor = Predictor.from_pretrained("runs/my-run/model")`, then
        `predictor.evaluate(dataset)` or `for batch, ybar in predictor.predict(dataset)`.
    """

    players: Players
    codec: Codec
    choices: Mapping[str, float] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        """Settings of the run that trained the model."""
        return self.players.config

    def predict(self, dataset: Dataset, batch_size: int = 256) -> Iterator[tuple[Batch, Tensor]]:
        """Yield batches in order with their relaxed outputs."""
        space = self.players.space
        return predictions(self._logits(), space, dataset, self._like, batch_size=batch_size)

    def _logits(self) -> Callable[[Inputs], Tensor]:
        return partial(predict, self.players, replicated(self.players))

    @property
    def _like(self) -> Tensor:
        return next(self.players.inference_net.parameters())

    def evaluate(self, dataset: Dataset) -> dict[str, float]:
        """Return the task's metrics on labelled examples, with what was tuned on dev."""
        return evaluate(
            self._logits(),
            self.players.space,
            build_metrics(self.codec, self.config.inference.decoder),
            dataset,
            self._like,
            choices=UNTUNED | dict(self.choices),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `inference_net.safetensors`, `energy.safetensors` and `config.json`."""
        weights = {
            name: dict(network.state_dict()) for name, network in networks_of(self.players).items()
        }
        save_model(Path(folder), weights, self.config, self.codec, self.choices)

    @classmethod
    def from_pretrained(cls, path: str | Path, device: torch.device | str = "cpu") -> "Predictor":
        """Load a model folder.

        Args:
            path: the `model/` folder of a run, or the run folder itself.
            device: where the networks go.

        Raises:
            ConfigError: for a device that there is not.
            ModelError: for a missing or damaged file, naming it.
        """
        folder = Path(path)
        folder = folder / "model" if (folder / "model").is_dir() else folder
        description = _read_description(folder / "config.json")
        codec = _codec(description["codec"])
        config = config_from_dict(description["config"])
        players = build_players(config, codec, _available(device))
        predictor = cls(players, codec, description["choices"])
        for name, network in networks_of(predictor.players).items():
            _load_weights(network, folder / f"{name}.safetensors")
        return predictor


def _available(device: torch.device | str) -> torch.device:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(
            f"device: expected cpu, or a GPU that this machine has, got {str(device)!r}"
        ) from None
    return torch.device(device)


def save_model(
    folder: Path,
    weights: Mapping[str, Mapping[str, Tensor]],
    config: Config,
    codec: Codec,
    choices: Mapping[str, float],
) -> None:
    """Write the folder that `Predictor.from_pretrained` reads, each file whole or not at all.

    Args:
        folder: made if missing.
        weights: whole tensors by name, of `inference_net` and `energy`.
        config: settings of the run.
        codec: names of tags or labels, and token features.
        choices: see `Predictor`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, tree in weights.items():
        tensors = {key: value.detach().cpu().contiguous() for key, value in tree.items()}
        with replacing(folder / f"{name}.safetensors") as partial:
            partial.write_bytes(save(tensors))
    description = {
        "format_version": FORMAT_VERSION,
        "config": config_to_dict(config),
        "codec": asdict(codec),
        "choices": dict(choices),
    }
    with replacing(folder / "config.json") as partial:
        partial.write_text(json.dumps(description, indent=2) + "\n", "utf-8")


def _codec(values: dict[str, Any]) -> Codec:
    if "tags" in values:
        described = values["features"]
        features: DenseTokenFeatures | HashedTokenFeatures
        if "size" in described:
            features = DenseTokenFeatures(**described)
        else:
            features = HashedTokenFeatures(**described)
        encoder = values.get("subwords")
        return TaggingCodec(
            tuple(values["tags"]),
            features,
            values.get("spans", False),
            None if encoder is None else Subwords(**encoder),
        )
    if "size" in values:
        height, width, channels = values["size"]
        return SegmentationCodec(
            (height, width, channels),
            tuple(values["mean"]),
            tuple(values["deviation"]),
            values.get("output_stride", 1),
        )
    return MultiLabelCodec(tuple(values["labels"]), tuple(values["feature_names"]))


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{path}: expected the description of a trained model, found no such file; give a "
            "run folder whose training has ended, or its model/ folder"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{path}: expected JSON, found {error}; export the model again") from error
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise ModelError(
            f"{path}: expected format_version {FORMAT_VERSION}, found {version!r}; load it with "
            "the version of ispen-dist that wrote it"
        )
    return description


def _load_weights(network: nn.Module, path: Path) -> None:
    try:
        network.load_state_dict(load_file(path))
    except Exception as error:
        raise ModelError(
            f"{path}: expected the weights that config.json describes, found: {error}; "
            "export the model again"
        ) from error
