"""The decoder: embedding, blocks of attention and feed-forward, norm, head. Tensor for tensor Qwen3 (arXiv 2505.09388).

Modules carry the names of the tensors in a Hugging Face folder, so saving renames nothing.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bessemer.model.attention import Attention, document_mask
from bessemer.model.cache import KeyValueCache
from bessemer.model.config import ModelConfig
from bessemer.model.feed_forward import FeedForward
from bessemer.model.norms import RMSNorm
from bessemer.model.rope import RotaryPositions, Rotation

# Shapes: B batch, T time, D hidden, V vocabulary.


class Block(nn.Module):
    """One layer: attention between positions, then a feed-forward at each, both added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self, hidden_BTD: Tensor, rotation: Rotation, mask: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Returns (B, T, D)."""
        hidden_BTD = hidden_BTD + self.self_attn(self.input_layernorm(hidden_BTD), rotation, mask, cache)
        return hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD))


class Decoder(nn.Module):
    """A causal language model. A new one has torch's default weights; see `initialisation` and `folder` for better."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = RotaryPositions(config.head_dim, config.rope_theta, config.max_position_embeddings)

    @property
    def blocks(self) -> list[Block]:
        """The layers in order, to be compiled one by one: `block.compile()`."""
        return [cast(Block, block) for block in self.layers]

    @property
    def head_weight(self) -> Tensor:
        """Matrix from hidden states to logits, (V, D); the embedding table itself when they are tied."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Logits of the token after each, (B, T, V). Arguments as for `hidden`."""
        hidden_BTD = self.hidden(tokens_BT, positions_BT=positions_BT, document_ids_BT=document_ids_BT, cache=cache)
        return functional.linear(hidden_BTD, self.head_weight)

    def hidden(
        self,
        tokens_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """States after the last norm, (B, T, D), which `head_weight` turns into logits.

        positions_BT: 0, 1, 2, … when None; after the cached tokens when there is a cache.
        document_ids_BT: of packed documents; a token sees only tokens of its own document. Their positions restart
        where the caller says so in positions_BT.
        cache: holds the tokens before these and is extended by them; not together with the other two.
        """
        hidden_BTD = self.embed_tokens(tokens_BT)
        mask = None
        if cache is not None:
            assert positions_BT is None and document_ids_BT is None, "a cache keeps its own positions, one document a row"
            positions_BT, mask = cache.extend(tokens_BT.shape[1])
        elif document_ids_BT is not None:
            mask = document_mask(document_ids_BT, _scores_dtype(hidden_BTD))
        rotation = self.rotary(positions_BT, tokens_BT.shape[1], hidden_BTD.dtype)
        for block in self.blocks:
            # a compiled block is made for training's shapes: samples taken in between must not recompile it
            run = block if cache is None else block.forward
            hidden_BTD = run(hidden_BTD, rotation, mask, cache)
        return self.norm(hidden_BTD)


def _scores_dtype(hidden_BTD: Tensor) -> torch.dtype:
    """Type in which attention will run: autocast's where it is on, else the hidden states'."""
    kind = hidden_BTD.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_BTD.dtype
