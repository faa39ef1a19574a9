"""The tables from a name in the configuration to a network or an energy.

To add one: write the module in a file of its own, add a row here, and add the name to the
`Literal` in `config/networks.py`. A test fails until the row has a tiny problem in
`tests/problems.py`.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from ispen_dist.config import EnergyConfig, NetworkConfig
from ispen_dist.data.datasets import Codec, DenseTokenFeatures, TaggingCodec
from ispen_dist.data.segmentation import SegmentationCodec
from ispen_dist.models.convolutional_energy import ConvolutionalEnergy, WithImage
from ispen_dist.models.efficientnet_lite import EfficientNetLite0
from ispen_dist.models.energies import EnergyNetwork, LabelInteractionEnergy, LinearChainEnergy
from ispen_dist.models.fully_convolutional import FullyConvolutional
from ispen_dist.models.high_order import HighOrderEnergy
from ispen_dist.models.mlp import MLP
from ispen_dist.models.output_spaces import BinaryImages, LabelSets, OutputSpace, TagSequences
from ispen_dist.models.pretrained import PretrainedTagger
from ispen_dist.models.skip_chain import SkipChainEnergy
from ispen_dist.models.tag_language_model import TagLanguageModelEnergy
from ispen_dist.models.taggers import BiLSTMTagger, TokenMLPTagger, TransformerTagger


def _settings(config: NetworkConfig, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in (*names, *_SHARED)}


_SHARED = ("hidden_size", "num_layers", "dropout", "feature_dropout")


def _mlp(config: NetworkConfig, codec: Codec, num_outputs: int) -> nn.Module:
    return MLP(codec.num_inputs, num_outputs, **_settings(config, "activation"))


def _tagger(
    build: Callable[..., nn.Module],
    config: NetworkConfig,
    codec: Codec,
    num_outputs: int,
    *names: str,
) -> nn.Module:
    assert isinstance(codec, TaggingCodec)
    dense = isinstance(codec.features, DenseTokenFeatures)
    settings = _settings(config, "embedding_size", *names)
    return build(codec.num_inputs, num_outputs, dense=dense, **settings)


def _bilstm(config: NetworkConfig, codec: Codec, num_outputs: int) -> nn.Module:
    return _tagger(BiLSTMTagger, config, codec, num_outputs)


def _transformer(config: NetworkConfig, codec: Codec, num_outputs: int) -> nn.Module:
    return _tagger(TransformerTagger, config, codec, num_outputs, "num_heads")


def _token_mlp(config: NetworkConfig, codec: Codec, num_outputs: int) -> nn.Module:
    return _tagger(TokenMLPTagger, config, codec, num_outputs)


def _pretrained(config: NetworkConfig, codec: Codec, num_outputs: int) -> nn.Module:
    assert isinstance(codec, TaggingCodec)
    assert codec.subwords is not None
    return PretrainedTagger(
        codec.subwords,
        num_outputs,
        source=config.model,
        trainable_layers=config.trainable_layers,
        dropout=config.dropout,
    )


def _fcn(config: NetworkConfig, codec: Codec, num_outputs: int) -> nn.Module:
    assert isinstance(codec, SegmentationCodec)
    return FullyConvolutional(
        codec.size[2],
        num_masks=num_outputs // codec.num_outputs,
        output_stride=codec.output_stride,
        **_settings(config),
    )


def _efficientnet_lite0(config: NetworkConfig, codec: Codec, num_outputs: int) -> nn.Module:
    assert isinstance(codec, SegmentationCodec)
    return EfficientNetLite0(
        list(zip(codec.mean, codec.deviation, strict=True)),
        source=config.model,
        enlarge=config.enlarge,
        trainable_layers=config.trainable_layers,
        num_masks=num_outputs // codec.num_outputs,
        output_stride=codec.output_stride,
        **_settings(config),
    )


def _label_interaction(config: EnergyConfig, codec: Codec) -> EnergyNetwork:
    features = build_network(config.features, codec)
    return LabelInteractionEnergy(features, codec.num_outputs, config.num_units)


def _linear_chain(config: EnergyConfig, codec: Codec) -> EnergyNetwork:
    return LinearChainEnergy(build_network(config.features, codec), codec.num_outputs)


def _skip_chain(config: EnergyConfig, codec: Codec) -> EnergyNetwork:
    features = build_network(config.features, codec)
    return SkipChainEnergy(features, codec.num_outputs, config.num_skips)


def _high_order(config: EnergyConfig, codec: Codec) -> EnergyNetwork:
    features = build_network(config.features, codec)
    return HighOrderEnergy(features, codec.num_outputs, config.order, config.num_units)


def _tag_language_model(config: EnergyConfig, codec: Codec) -> EnergyNetwork:
    features = build_network(config.features, codec)
    sizes = (config.num_units, config.num_layers)
    return TagLanguageModelEnergy(features, codec.num_outputs, *sizes)


def _convolutional(config: EnergyConfig, codec: Codec) -> EnergyNetwork:
    assert isinstance(codec, SegmentationCodec)
    features = WithImage(build_network(config.features, codec), codec.output_stride)
    size = (*codec.mask_size, codec.num_inputs)
    return ConvolutionalEnergy(features, size, config.num_units)


NETWORKS: dict[str, Callable[[NetworkConfig, Codec, int], nn.Module]] = {
    "mlp": _mlp,
    "bilstm": _bilstm,
    "transformer": _transformer,
    "token_mlp": _token_mlp,
    "pretrained": _pretrained,
    "fcn": _fcn,
    "efficientnet_lite0": _efficientnet_lite0,
}
ENERGIES: dict[str, Callable[[EnergyConfig, Codec], EnergyNetwork]] = {
    "label_interaction": _label_interaction,
    "linear_chain": _linear_chain,
    "skip_chain": _skip_chain,
    "high_order": _high_order,
    "tag_language_model": _tag_language_model,
    "convolutional": _convolutional,
}


def build_network(config: NetworkConfig, codec: Codec, num_heads: int = 1) -> nn.Module:
    """Build a network from inputs to the logits of one structure, or of several side by side."""
    return NETWORKS[config.name](config, codec, num_heads * codec.num_outputs)


def build_energy(config: EnergyConfig, codec: Codec) -> EnergyNetwork:
    """Build an energy network."""
    return ENERGIES[config.name](config, codec)


def output_space(codec: Codec, entity_weight: float) -> OutputSpace:
    """Return the kind of structure that a codec describes.

    Args:
        codec: which describes it.
        entity_weight: of a token of an entity in the cost, where the tags spell entities.
    """
    if isinstance(codec, TaggingCodec):
        outside = codec.tags.index("O") if codec.spans and "O" in codec.tags else None
        return TagSequences(codec.num_outputs, outside, entity_weight)
    return BinaryImages() if isinstance(codec, SegmentationCodec) else LabelSets()
