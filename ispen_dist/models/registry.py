"""The tables from a name in the configuration to a network or an energy.

To add one: write the module in a file of its own, add a row here, and add the name to the
`Literal` in `config.py`. The property tests read these tables and cover the new row.
"""

from collections.abc import Callable

from torch import nn

from ispen_dist.config import EnergyConfig, NetworkConfig
from ispen_dist.data.datasets import Codec, TaggingCodec
from ispen_dist.models.energies import EnergyNetwork, LabelInteractionEnergy, LinearChainEnergy
from ispen_dist.models.mlp import MLP
from ispen_dist.models.output_spaces import LabelSets, OutputSpace, TagSequences
from ispen_dist.models.taggers import BiLSTMTagger, TransformerTagger


def _mlp(config: NetworkConfig, codec: Codec) -> nn.Module:
    return MLP(
        codec.num_inputs,
        codec.num_outputs,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        activation=config.activation,
        dropout=config.dropout,
        feature_dropout=config.feature_dropout,
    )


def _bilstm(config: NetworkConfig, codec: Codec) -> nn.Module:
    return BiLSTMTagger(
        num_buckets=codec.num_inputs,
        num_tags=codec.num_outputs,
        embedding_size=config.embedding_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        dropout=config.dropout,
        feature_dropout=config.feature_dropout,
    )


def _transformer(config: NetworkConfig, codec: Codec) -> nn.Module:
    return TransformerTagger(
        num_buckets=codec.num_inputs,
        num_tags=codec.num_outputs,
        embedding_size=config.embedding_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        dropout=config.dropout,
        feature_dropout=config.feature_dropout,
    )


def _label_interaction(config: EnergyConfig, codec: Codec) -> EnergyNetwork:
    features = build_network(config.features, codec)
    return LabelInteractionEnergy(features, codec.num_outputs, config.num_units)


def _linear_chain(config: EnergyConfig, codec: Codec) -> EnergyNetwork:
    return LinearChainEnergy(build_network(config.features, codec), codec.num_outputs)


NETWORKS: dict[str, Callable[[NetworkConfig, Codec], nn.Module]] = {
    "mlp": _mlp,
    "bilstm": _bilstm,
    "transformer": _transformer,
}
ENERGIES: dict[str, Callable[[EnergyConfig, Codec], EnergyNetwork]] = {
    "label_interaction": _label_interaction,
    "linear_chain": _linear_chain,
}


def build_network(config: NetworkConfig, codec: Codec) -> nn.Module:
    """Build a network from inputs to logits."""
    return NETWORKS[config.name](config, codec)


def build_energy(config: EnergyConfig, codec: Codec) -> EnergyNetwork:
    """Build an energy network."""
    return ENERGIES[config.name](config, codec)


def output_space(codec: Codec) -> OutputSpace:
    """Return the kind of structure that a codec describes."""
    if isinstance(codec, TaggingCodec):
        return TagSequences(codec.num_outputs)
    return LabelSets()
