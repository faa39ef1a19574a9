"""The networks: of theta, and of the energy."""

from dataclasses import dataclass, field
from typing import Literal

from ispen_dist.config.checks import ANY, check, check_ranges


@dataclass(frozen=True)
class NetworkConfig:
    """A network from inputs to logits: the inference network, or the features of an energy."""

    name: Literal[
        "mlp", "bilstm", "transformer", "token_mlp", "pretrained", "fcn", "efficientnet_lite0"
    ] = "bilstm"
    """Architecture."""
    hidden_size: int = 128
    """Width of hidden layers; per direction in a BiLSTM, at the size of the mask in an fcn, on the
    way up behind an efficientnet_lite0."""
    num_layers: int = 1
    """Hidden layers, LSTM layers, transformer blocks, or how often an fcn or an efficientnet_lite0
    (1 to 5) halves the size."""
    activation: Literal["relu", "gelu", "softplus", "tanh"] = "relu"
    """Hidden activation; mlp only."""
    num_heads: int = 4
    """Attention heads; transformer only."""
    embedding_size: int = 64
    """Width of token embeddings; taggers only."""
    model: str = ""
    """Encoder to start from: a folder, `package:NAME` of an installed package, or a name on the
    Hugging Face hub. For efficientnet_lite0 a file or a package, empty for none; no other network
    has one."""
    trainable_layers: int = -1
    """Last blocks of the encoder that are trained, or halvings of an efficientnet_lite0, -1 for all
    and the embedding; these two only."""
    enlarge: int = 2
    """How many times an image is enlarged for the encoder; efficientnet_lite0 only."""
    dropout: float = 0.0
    """Dropout rate of hidden units."""
    feature_dropout: float = 0.0
    """Dropout rate of whole input features."""

    def check(self, section: str) -> None:
        """Check the settings; `section` is the name they have in messages."""
        check_ranges(
            section,
            self,
            hidden_size=(1, ANY),
            num_layers=(1, ANY),
            num_heads=(1, ANY),
            embedding_size=(1, ANY),
            trainable_layers=(-1, ANY),
            enlarge=(1, ANY),
            dropout=(0.0, 0.99),
            feature_dropout=(0.0, 0.99),
        )
        if self.name == "efficientnet_lite0":
            check_ranges(section, self, num_layers=(1, 5))
        check(
            bool(self.model) == (self.name == "pretrained") or self.name == "efficientnet_lite0",
            f"{section}.model",
            "an encoder" if self.name == "pretrained" else f"none for {section}.name={self.name}",
            self.model,
            f"name one, with {section}.name=pretrained",
        )
        if self.name == "transformer":
            check(
                self.hidden_size % self.num_heads == 0,
                f"{section}.num_heads",
                f"a divisor of {section}.hidden_size={self.hidden_size}",
                self.num_heads,
            )


@dataclass(frozen=True)
class EnergyConfig:
    """The energy network."""

    name: Literal[
        "label_interaction",
        "linear_chain",
        "skip_chain",
        "high_order",
        "tag_language_model",
        "convolutional",
    ] = "linear_chain"
    """Architecture."""
    features: NetworkConfig = field(default_factory=NetworkConfig)
    """Network of the local potentials."""
    num_units: int = 16
    """Width of the interaction: rows of M in label_interaction, of the embeddings of tags in
    high_order and tag_language_model, first channels in convolutional."""
    num_skips: int = 2
    """Largest distance between two tags that are scored together; skip_chain only."""
    order: int = 2
    """Tags before the last one of a window; high_order only."""
    num_layers: int = 4
    """Dilated layers, which see 2 ** num_layers tags back; tag_language_model only."""
    freeze_local: bool = False
    """Keep the local potentials as pre-trained; only biases and interactions are learned."""

    def __post_init__(self) -> None:
        check_ranges(
            "energy",
            self,
            num_units=(1, ANY),
            num_skips=(1, ANY),
            order=(1, ANY),
            num_layers=(1, ANY),
        )
