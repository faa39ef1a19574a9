"""Tagging networks: hashed token features -> embedding -> encoder -> logits per tag.

Used as inference networks A_theta and as the local potentials of an energy. Inputs are
`{"features": (B, T, F) int64, 0 = absent, "mask": (B, T) bool, tokens first}`, or, with `dense`,
features (B, T, F) of numbers, zero at padding; logits are (B, T, K), finite and of no meaning at
padding.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from ispen_dist.models.dropout import Dropout
from ispen_dist.models.encoders import (
    BiLSTMEncoder,
    DenseEmbedding,
    Encoder,
    TokenEmbedding,
    TokenMLPEncoder,
    TransformerEncoder,
)
from ispen_dist.models.stages import Inputs, Part, StagedNetwork, State


def _beside(function: Callable[..., State], inputs: Inputs, x_BTD: Tensor, h_BTD: Tensor) -> State:
    return x_BTD, *function(inputs, h_BTD)


class _Tagger(StagedNetwork):
    """Embedding, encoder, and a shortcut from the token's own features to its logits."""

    def __init__(
        self, embedding: nn.Module, encoder: Encoder, sizes: tuple[int, int], dropout: float
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.encoder = encoder
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(*sizes)

    def parts(self) -> list[Part]:
        """Return the embedding, the stages of the encoder, and the logits.

        The state is `(x, h)`: token vectors (B, T, D) for the shortcut, and hidden vectors.
        """
        return [
            Part("embedding", self._embed, [self.embedding]),
            *(self._around(part) for part in self.encoder.parts()),
            Part("output", self._score, [self.output]),
        ]

    def _embed(self, inputs: Inputs) -> State:
        x_BTD = self.dropout(self.embedding(inputs["features"]))
        return x_BTD, x_BTD

    def _around(self, part: Part) -> Part:
        return Part(f"encoder.{part.name}", partial(_beside, part.function), list(part.reads))

    def _score(self, inputs: Inputs, x_BTD: Tensor, h_BTD: Tensor) -> State:
        return (self.output(torch.cat([self.dropout(h_BTD), x_BTD], dim=-1)),)


_EMBEDDINGS = {False: TokenEmbedding, True: DenseEmbedding}
"""By whether tokens are vectors."""


class _LayeredTagger(_Tagger):
    """Tags from an encoder that is a number of layers of one width.

    Args:
        num_buckets: rows of the embedding table.
        num_tags: K.
        embedding_size: width of token embeddings.
        hidden_size: width of the hidden layers, of an LSTM per direction.
        num_layers: hidden layers.
        dropout: rate of embeddings and hidden units.
        feature_dropout: rate of whole input features.
        dense: whether tokens are vectors of `num_buckets` numbers.
    """

    encoder_type: ClassVar[type[BiLSTMEncoder] | type[TokenMLPEncoder]]

    def __init__(
        self,
        num_buckets: int,
        num_tags: int,
        embedding_size: int = 64,
        hidden_size: int = 128,
        num_layers: int = 1,
        dropout: float = 0.0,
        feature_dropout: float = 0.0,
        dense: bool = False,
    ) -> None:
        encoder = self.encoder_type(embedding_size, hidden_size, num_layers, dropout)
        super().__init__(
            _EMBEDDINGS[dense](num_buckets, embedding_size, feature_dropout),
            encoder,
            (encoder.output_size + embedding_size, num_tags),
            dropout,
        )


class BiLSTMTagger(_LayeredTagger):
    """Tags from a BiLSTM, with a shortcut from the token's own features to its logits."""

    encoder_type = BiLSTMEncoder


class TokenMLPTagger(_LayeredTagger):
    """Tags from each token alone; what its neighbours are is left to the energy."""

    encoder_type = TokenMLPEncoder


class TransformerTagger(_Tagger):
    """Tags from a pre-norm transformer, with a shortcut from the token's own features.

    Args:
        num_buckets: rows of the embedding table.
        num_tags: K.
        embedding_size: width of token embeddings.
        hidden_size: width of the blocks.
        num_layers: blocks.
        num_heads: attention heads.
        dropout: rate of embeddings, hidden units and attention weights.
        feature_dropout: rate of whole input features.
        dense: whether tokens are vectors of `num_buckets` numbers.
    """

    def __init__(
        self,
        num_buckets: int,
        num_tags: int,
        embedding_size: int = 64,
        hidden_size: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        dropout: float = 0.0,
        feature_dropout: float = 0.0,
        dense: bool = False,
    ) -> None:
        super().__init__(
            _EMBEDDINGS[dense](num_buckets, embedding_size, feature_dropout),
            TransformerEncoder(embedding_size, hidden_size, num_layers, num_heads, dropout),
            (hidden_size + embedding_size, num_tags),
            dropout,
        )
