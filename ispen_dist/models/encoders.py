"""From hashed token features to contextual vectors: embedding, BiLSTM, transformer.

Everything here can be differentiated by reverse over reverse, on CPU, to any order: embeddings are
gathered (EmbeddingBag has no second derivative), attention is `ops.attention` (PyTorch's fused
kernels have none) with a finite mask bias, so that no gradient of an infinity becomes NaN. On a GPU
the second derivative of `nn.LSTM` needs cuDNN switched off around the call.

Dropout reads the global random state of PyTorch: the same seed before a call gives the same masks.

Shapes: B batch, T tokens, F hashed features per token, D width, N heads.
"""

import math
from abc import ABC, abstractmethod
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ispen_dist.models.dropout import Dropout
from ispen_dist.models.stages import Inputs, Part, State
from ispen_dist.ops import attention

# Large enough that exp underflows to zero in float32 beside any plausible score, and finite.
MASKED_SCORE = -1e4


class TokenEmbedding(nn.Module):
    """Sum of the embeddings of a token's features, without the absent ones.

    Args:
        num_buckets: rows of the table; row 0 belongs to absent features and is never read into
            the sum, so its value and its gradient are zero.
        embedding_size: D.
        feature_dropout: rate at which single features of a token are left out in training, the
            rest scaled up.
    """

    def __init__(self, num_buckets: int, embedding_size: int, feature_dropout: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_buckets, embedding_size) * 0.1)
        self.feature_dropout = Dropout(feature_dropout)
        with torch.no_grad():
            self.weight[0] = 0.0

    def forward(self, ids_BTF: Tensor) -> Tensor:
        """Return (B, T, D)."""
        present = self.feature_dropout((ids_BTF != 0).to(self.weight.dtype))
        # (1, F) @ (F, D) per token: one contraction for padding, dropout and the sum.
        return (present.unsqueeze(-2) @ F.embedding(ids_BTF, self.weight)).squeeze(-2)


class DenseEmbedding(nn.Module):
    """A linear map of tokens that are vectors, without a bias: zero where the token is, at padding.

    Args:
        num_features: numbers of a token.
        embedding_size: D.
        feature_dropout: rate at which single numbers are left out in training, the rest scaled up.
    """

    def __init__(
        self, num_features: int, embedding_size: int, feature_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, embedding_size, bias=False)
        self.feature_dropout = Dropout(feature_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, F) to (B, T, D)."""
        return self.linear(self.feature_dropout(x))


class Encoder(nn.Module, ABC):
    """From token vectors (B, T, D) to hidden vectors (B, T, `output_size`), stage by stage.

    The state of every stage is the hidden vectors alone; the mask is `inputs["mask"]`, (B, T).
    """

    output_size: int

    @abstractmethod
    def parts(self) -> list[Part]:
        """Return the stages in order."""


class TokenMLPEncoder(Encoder):
    """Hidden layers with ReLU over each token alone, without context.

    Args:
        input_size: D of the input.
        width: of the hidden layers.
        num_layers: hidden layers.
        dropout: rate between layers.
    """

    def __init__(
        self, input_size: int, width: int, num_layers: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        sizes = [input_size, *[width] * num_layers]
        self.layers = nn.ModuleList(nn.Linear(m, n) for m, n in pairwise(sizes))
        self.dropout = Dropout(dropout)
        self.output_size = width

    def parts(self) -> list[Part]:
        """Return the layers."""
        return [
            Part(f"layers.{i}", partial(_run_layer, layer, self.dropout if i else None), [layer])
            for i, layer in enumerate(self.layers)
        ]


def _run_layer(layer: nn.Module, dropout: nn.Module | None, inputs: Inputs, h_BTD: Tensor) -> State:
    return (F.relu(layer(h_BTD if dropout is None else dropout(h_BTD))),)


class BiLSTMEncoder(Encoder):
    """Bidirectional LSTM over right-padded sequences; padding never changes a result.

    Sequences are packed, so the backward direction starts at the last token. Of the ways to
    honour padding this one has the cheapest curvature products on CPU.

    Args:
        input_size: D of the input.
        hidden_size: width per direction; the output has twice as much.
        num_layers: layers.
        dropout: rate between layers.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.lstm = nn.LSTM(
            input_size,
            hidden_size,
            num_layers,
            batch_first=True,
            bidirectional=True,
            dropout=dropout if num_layers > 1 else 0.0,
        )
        self.output_size = 2 * hidden_size

    def parts(self) -> list[Part]:
        """Return one stage; its output is zero at padding, and filler rows may be all padding."""
        return [Part("lstm", self._run, [self.lstm])]

    def _run(self, inputs: Inputs, x_BTD: Tensor) -> State:
        # An empty sequence cannot be packed: filler rows run one step, which nothing reads.
        lengths = inputs["mask"].sum(-1).clamp(min=1).cpu()
        packed = pack_padded_sequence(x_BTD, lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(
            self.lstm(packed)[0], batch_first=True, total_length=x_BTD.shape[1]
        )
        return (hidden,)


class SelfAttention(nn.Module):
    """Multi-head softmax self-attention that can be differentiated twice, see `ops.attention`.

    Args:
        width: D.
        num_heads: N, a divisor of D.
        dropout: rate of attention weights.
    """

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of the width {width}, got {num_heads}; "
                "change num_heads or the width"
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x_BTD: Tensor, bias_BT: Tensor) -> Tensor:
        """Attend among tokens; the bias of a key is added to its scores: (B, T, D)."""
        heads = self.qkv(x_BTD).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = heads.transpose(1, 3).unbind(2)
        drops = self.training and self.dropout.p > 0.0
        mixed = attention(q, k, v, bias_BT, self.dropout if drops else None)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class TransformerBlock(nn.Module):
    """Pre-norm transformer block (Xiong et al. 2020) with GELU.

    Args:
        width: D.
        num_heads: attention heads.
        dropout: rate of attention weights and of both residual branches.
    """

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, num_heads, dropout)
        self.feedforward_norm = nn.LayerNorm(width)
        self.feedforward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = Dropout(dropout)

    def forward(self, h_BTD: Tensor, bias_BT: Tensor) -> Tensor:
        """Return the next hidden state (B, T, D)."""
        attended = self.attention(self.attention_norm(h_BTD), bias_BT)
        h_BTD = h_BTD + self.dropout(attended)
        return h_BTD + self.dropout(self.feedforward(self.feedforward_norm(h_BTD)))


def mask_bias(mask_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the attention bias (B, T): 0 at tokens, a large negative number at padding."""
    return (~mask_BT).to(dtype) * MASKED_SCORE


def sinusoidal_positions(num_positions: int, width: int, like: Tensor) -> Tensor:
    """Return position vectors (T, D) of Vaswani et al. (2017), on the device of `like`."""
    position = torch.arange(num_positions, device=like.device, dtype=like.dtype)
    channel = torch.arange((width + 1) // 2, device=like.device, dtype=like.dtype)
    angle = position[:, None] * torch.exp(channel * (-2.0 * math.log(1e4) / width))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[:, :width]


def window(x_BTD: Tensor) -> Tensor:
    """Return each token beside its two neighbours, zeros beyond the ends: (B, T, 3 D)."""
    padded = F.pad(x_BTD, (0, 0, 1, 1))
    return torch.cat([padded[:, :-2], x_BTD, padded[:, 2:]], dim=-1)


def _run_block(block: nn.Module, inputs: Inputs, h_BTD: Tensor) -> State:
    # Not a method: it would hold the whole encoder, and no two blocks would be alike.
    return (block(h_BTD, mask_bias(inputs["mask"], h_BTD.dtype)),)


class TransformerEncoder(Encoder):
    """Stack of identical pre-norm blocks over tokens with sinusoidal positions.

    The input of the first block is a projection of a window of three tokens: attention learns
    what a neighbour is from a thousand sentences only slowly (Twitter tags, dev accuracy 0.842 to
    0.847 in three trials without the window, 0.867 to 0.870 in three with it).

    Inputs must be zero at padding, which `TokenEmbedding` sees to.

    Args:
        input_size: D of the input.
        width: D inside.
        num_layers: blocks.
        num_heads: attention heads.
        dropout: rate in all blocks.
    """

    def __init__(
        self, input_size: int, width: int, num_layers: int, num_heads: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.project = nn.Linear(3 * input_size, width)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, num_heads, dropout) for _ in range(num_layers)
        )
        self.final_norm = nn.LayerNorm(width)
        self.output_size = width

    def parts(self) -> list[Part]:
        """Return the projection, every block, and the final norm."""
        blocks = (
            Part(f"blocks.{i}", partial(_run_block, block), [block])
            for i, block in enumerate(self.blocks)
        )
        return [
            Part("project", self._embed, [self.project]),
            *blocks,
            Part("final_norm", self._normalise, [self.final_norm]),
        ]

    def _embed(self, inputs: Inputs, x_BTD: Tensor) -> State:
        h_BTD = self.project(window(x_BTD))
        return (h_BTD + sinusoidal_positions(h_BTD.shape[1], h_BTD.shape[2], h_BTD),)

    def _normalise(self, inputs: Inputs, h_BTD: Tensor) -> State:
        return (self.final_norm(h_BTD),)
