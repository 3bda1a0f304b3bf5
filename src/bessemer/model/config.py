"""What a decoder is made of, under Hugging Face's own names, and what it costs.

The cost formulas live here, so that a planner or a report needs no torch and no weights.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import model_validator

from bessemer.core.config import Config, nearest, setting
from bessemer.model.presets import PRESETS

#: Raised whenever the weights or the folder that the stage `model` makes of the same settings change.
MODEL_VERSION = 1


class Architecture(Config):
    """The shape of a decoder before it knows its tokenizer."""

    hidden_size: int = setting(128, "width of the residual stream", unit="channels", ge=1)
    num_hidden_layers: int = setting(4, "blocks of attention and feed-forward", ge=1)
    num_attention_heads: int = setting(4, "query heads of each block", ge=1)
    num_key_value_heads: int = setting(2, "key and value heads, each shared by a group of query heads", ge=1)
    head_dim: int = setting(32, "width of one head; even, because rotary positions turn pairs", unit="channels", ge=2)
    intermediate_size: int = setting(384, "width inside the feed-forward", unit="channels", ge=1)
    max_position_embeddings: int = setting(512, "context: the longest sequence that the model reads", unit="tokens", ge=1)
    rms_norm_eps: float = setting(1e-6, "added to the mean square in every norm", gt=0)
    rope_theta: float = setting(10_000.0, "base of the rotary frequencies; larger turns slower", gt=1)
    tie_word_embeddings: bool = setting(True, "use the embedding table as the output head too")
    initializer_range: float = setting(0.02, "standard deviation of the weights before training", gt=0)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads}): each key-value head serves as many query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary positions turn pairs of channels")
        return self


class ModelConfig(Architecture):
    """A whole decoder: its shape, its vocabulary, and the tokens at which a text begins and ends."""

    vocab_size: int = setting(..., "tokens in the vocabulary", unit="tokens", ge=1)
    bos_token_id: int | None = setting(None, "token that begins every text", ge=0)
    eos_token_id: int | None = setting(None, "token that ends a text", ge=0)

    @model_validator(mode="after")
    def _tokens_exist(self) -> Self:
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(self, name)
            if token is not None and token >= self.vocab_size:
                raise ValueError(f"{name} ({token}) lies outside the vocabulary of {self.vocab_size} tokens")
        return self

    def block_matrix_parameters(self) -> int:
        """Weights in the matrices of one block: query, key, value, output; gate, up, down."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        return self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)

    def norm_parameters(self) -> int:
        """Weights of all norms: two per block and the last over the width, query and key norm over a head."""
        per_block = 2 * self.hidden_size + 2 * self.head_dim
        return self.num_hidden_layers * per_block + self.hidden_size

    def embedding_parameters(self) -> int:
        """Weights of the embedding table, and of the head when it has its own."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    def parameters(self) -> int:
        """All weights, each stored number once."""
        return self.num_hidden_layers * self.block_matrix_parameters() + self.norm_parameters() + self.embedding_parameters()

    def active_parameters(self) -> int:
        """Weights that one token meets; all of them, because the decoder is dense."""
        return self.parameters()

    def flops_per_token(self, context_length: int) -> int:
        """Floating-point operations of one training token, forward and backward, at a context of so many tokens.

        6 N + 12 L H C T (Chowdhery et al. 2022, appendix B): N weights that multiply (the blocks' matrices and the
        head, tied or not; the look-up and the norms are free), L layers, H query heads of C channels, T context.
        Each weight costs a multiplication and an addition forward, twice that backward. The causal half of
        the scores that is never needed is counted, recomputation is not.
        """
        multiplying = self.num_hidden_layers * self.block_matrix_parameters() + self.vocab_size * self.hidden_size
        attention = self.num_hidden_layers * self.num_attention_heads * self.head_dim * context_length
        return 6 * multiplying + 12 * attention

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes that one token of context occupies in the key-value cache."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * bytes_per_value


class ModelStageConfig(Architecture):
    """A recipe's `model:` section: a preset, and any setting that replaces the preset's.

    The vocabulary is not set here: it is the tokenizer's.
    """

    shorthand: ClassVar[str | None] = "preset"

    preset: str | None = setting("qwen3-1m", "named size to start from; none: the defaults shown here")

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", cls.model_fields["preset"].default)
        if preset is None:
            return values
        if preset not in PRESETS:
            raise ValueError(f"there is no preset {preset!r}{nearest(str(preset), list(PRESETS))}")
        return PRESETS[preset] | values

    def model_for(self, vocab_size: int, bos_token_id: int | None, eos_token_id: int | None) -> ModelConfig:
        """The decoder of this shape for a tokenizer of so many tokens."""
        shape = self.model_dump(exclude={"preset"})
        return ModelConfig(**shape, vocab_size=vocab_size, bos_token_id=bos_token_id, eos_token_id=eos_token_id)


def preset_config(name: str, vocab_size: int) -> ModelConfig:
    """The decoder of a preset with a vocabulary of so many tokens. Raises ConfigError when there is no such preset."""
    return ModelStageConfig.parse({"preset": name}, "model").model_for(vocab_size, None, None)
