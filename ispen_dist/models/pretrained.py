"""Tags from a pretrained encoder of the Hugging Face library, stage by stage.

Of the library's model its embedding and its blocks are used; a block is called with the attention
in plain operations, which have the second derivatives that curvature needs.

Shapes: B batch, T tokens, P sub-words, D width, K tags.
"""

from functools import partial

import torch
from torch import Tensor, nn

from ispen_dist.config import ConfigError
from ispen_dist.data.subwords import Subwords, encoder_source
from ispen_dist.models.dropout import Dropout
from ispen_dist.models.encoders import mask_bias
from ispen_dist.models.stages import Inputs, Part, StagedNetwork, State


class PretrainedTagger(StagedNetwork):
    """Linear scores of the last hidden vector at each token's first sub-word.

    Inputs are `subwords` (B, P) int64, `subword_mask` (B, P) bool and `starts` (B, T) int64, the
    place of each token's first sub-word; logits are (B, T, K), of no meaning at padding.

    It is built with initial values of its own; `load_pretrained` reads those of `source`, so that a
    trained model is built without its encoder's files.

    Args:
        subwords: with the settings of the encoder.
        num_tags: K.
        source: where the weights are.
        trainable_layers: number of last blocks that are trained, -1 for all and the embedding.
        dropout: rate of hidden units and attention weights, in place of the encoder's own.
    """

    pretrained = ("embeddings", "blocks")

    def __init__(
        self,
        subwords: Subwords,
        num_tags: int,
        *,
        source: str,
        trainable_layers: int = -1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        settings = {**subwords.settings, **dict.fromkeys(_RATES, dropout)}
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = AutoModel.from_config(config, attn_implementation="eager")
        self.source = source
        self.first_position = subwords.first_position
        self.embeddings: nn.Module = model.embeddings
        self.blocks: nn.ModuleList = model.encoder.layer
        self.dropout = Dropout(dropout)
        self.output = nn.Linear(config.hidden_size, num_tags)
        if trainable_layers >= 0:
            frozen = len(self.blocks) - trainable_layers
            for module in (self.embeddings, *self.blocks[: max(frozen, 0)]):
                module.requires_grad_(False)

    def load_pretrained(self) -> None:
        """Read the encoder's weights, from safetensors alone.

        Raises:
            ConfigError: where they are not there, or are those of another encoder.
        """
        from transformers import AutoModel

        try:
            model = AutoModel.from_pretrained(
                encoder_source(self.source), use_safetensors=True, trust_remote_code=False
            )
            self.embeddings.load_state_dict(model.embeddings.state_dict())
            self.blocks.load_state_dict(model.encoder.layer.state_dict())
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"inference_net.model: expected the weights of {self.source!r} as "
                f"model.safetensors, got: {error}; fetch them, or convert other files first"
            ) from None

    def parts(self) -> list[Part]:
        """Return the embedding, every block, and the scores; the state is (B, P, D)."""
        blocks = (
            Part(f"blocks.{i}", partial(_run_block, block), [block])
            for i, block in enumerate(self.blocks)
        )
        return [
            Part("embeddings", self._embed, [self.embeddings]),
            *blocks,
            Part("output", self._score, [self.output]),
        ]

    def _embed(self, inputs: Inputs) -> State:
        # Both are given, as the library's own are buffers, which no runtime moves.
        ids = inputs["subwords"]
        positions = self.first_position + torch.arange(ids.shape[1], device=ids.device)
        h_BPD = self.embeddings(
            input_ids=ids,
            position_ids=positions.expand_as(ids),
            token_type_ids=torch.zeros_like(ids),
        )
        return (h_BPD,)

    def _score(self, inputs: Inputs, h_BPD: Tensor) -> State:
        places = inputs["starts"].unsqueeze(-1).expand(-1, -1, h_BPD.shape[-1])
        return (self.output(self.dropout(h_BPD.gather(1, places))),)


_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob")


def _run_block(block: nn.Module, inputs: Inputs, h_BPD: Tensor) -> State:
    bias = mask_bias(inputs["subword_mask"], h_BPD.dtype)
    return (block(h_BPD, attention_mask=bias[:, None, None, :]),)
