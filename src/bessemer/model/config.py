"""Settings of a decoder, a recipe's `model:` section, and a model in figures. Imports no PyTorch.

The figures (parameters by part, FLOPs and cache bytes of a token, the table of layers) need no weights: they follow from the
sizes of the parts (`costs`).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from bessemer.core.config import Config, nearest, setting
from bessemer.model.architecture import Architecture, DecoderShape
from bessemer.model.attention.base import variant_of, variant_of_type
from bessemer.model.costs import all_parts, block_parts, outer_parts
from bessemer.model.parts import ModelPart
from bessemer.model.presets import GROWING, PRESETS

#: Raised whenever the weights or the folder that the stage `model` makes of the same settings change.
MODEL_VERSION = 2
IMPORT_VERSION = 1


class ModelConfig(DecoderShape):
    """A decoder: its architecture and its vocabulary, and the figures that follow from them."""

    def parameters(self) -> int:
        """All weights, each stored number once."""
        return sum(part.parameters for part in all_parts(self))

    def active_parameters(self) -> int:
        """Weights that one token meets: all but the experts that it does not visit."""
        skipped = sum(part.parameters * (1 - part.active_share) for part in all_parts(self) if part.name == "experts")
        return self.parameters() - round(skipped)

    def embedding_parameters(self) -> int:
        """Weights of the embedding table, and of the language head when it has its own."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings or self.num_scores else 2)

    def flops_per_token(self, context_length: int) -> int:
        """Floating-point operations of one training token, forward and backward, at a context of `context_length` tokens.

        6 N + 6 T Σ heads · (key channels + value channels) (Chowdhery et al. 2022, appendix B): N weights that multiply
        (the matrices that the token meets and the head, tied or not; the look-up and the norms are free), T context, the
        window in sliding layers. Each weight costs a multiplication and an addition forward, twice that backward. The
        causal half of the scores that is never needed is counted, recomputation is not. A DeltaNet layer costs
        6 · 3 · heads · key channels · value channels, whatever the context.
        """
        mixing = 0
        for layer_type in self.types:
            window = self.window(layer_type)
            visible = context_length if window is None else min(context_length, window)
            mixing += variant_of_type(self, layer_type).mixing_flops(self, visible)
        return 6 * sum(part.multiplying for part in all_parts(self)) + mixing

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes that one token of context occupies in the cache. States, which do not grow, are not counted."""
        shapes = [variant_of_type(self, layer_type).cache_shape(self) for layer_type in self.types]
        return bytes_per_value * sum(shape.numbers for shape in shapes if shape is not None)


class ModelStageConfig(Architecture):
    """A recipe's `model:` section: a preset, and any setting that replaces the preset's; or a model to start from.

    The vocabulary is not set here: it is the tokenizer's.
    """

    shorthand: ClassVar[str | None] = "preset"
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("preset", "init_from"),)

    preset: str | None = setting("qwen3-1m", "named size to start from; none: the defaults shown here")
    init_from: str | None = setting(
        None,
        "folder of a model whose weights and settings to start with, instead of new ones; only settings of positions may "
        "differ (its files, not its place, enter the stage's key)",
        affects_output=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("init_from") is not None:
            if values.get("preset") is not None:
                raise ValueError("init_from takes the shape of the model in that folder: leave preset out, or null")
            return values | {"preset": None}
        preset = values.get("preset", cls.model_fields["preset"].default)
        if preset is None:
            return values
        if preset not in PRESETS:
            raise ValueError(f"there is no preset {preset!r}{nearest(str(preset), list(PRESETS))}")
        return PRESETS[preset] | values

    @property
    def given(self) -> dict[str, Any]:
        """The settings that were given, as plain values: with `init_from`, all others are the model's own."""
        return self.model_dump(mode="json", include=self.model_fields_set - {"preset", "init_from"})

    def model_for(self, vocab_size: int, bos_token_id: int | None, eos_token_id: int | None) -> ModelConfig:
        """The decoder of this shape for a tokenizer of `vocab_size` tokens."""
        shape = self.model_dump(exclude={"preset", "init_from"})
        return ModelConfig(**shape, vocab_size=vocab_size, bos_token_id=bos_token_id, eos_token_id=eos_token_id)


class ImportConfig(Config):
    """A recipe's `import:` section: somebody's model, read into a folder."""

    shorthand: ClassVar[str | None] = "source"

    source: str = setting(
        description="the model: smollm2 (of a package), a GGUF file, a folder, the name of a pulled model, or an id of the hub",
        affects_output=False,
    )
    dtype: Literal["f32", "f16", "bf16"] | None = setting(None, "type of the weights; none: as they are stored, codes decoded")


def preset_config(name: str, vocab_size: int) -> ModelConfig:
    """The decoder of a preset with a vocabulary of `vocab_size` tokens. Raises ConfigError when there is no such preset."""
    return ModelStageConfig.parse({"preset": name}, "model").model_for(vocab_size, None, None)


def layer_table(config: ModelConfig) -> list[dict[str, Any]]:
    """One row per kind of part: its name, how many there are, its tensors' shapes, its parameters in all.

    The rows' parameters add up to the model's.
    """
    outer = outer_parts(config)
    blocks: dict[ModelPart, int] = {}
    for part in block_parts(config):
        blocks[part] = blocks.get(part, 0) + 1
    first = 2 if config.position_type == "learned" else 1
    ordered = [(part, 1) for part in outer[:first]] + list(blocks.items()) + [(part, 1) for part in outer[first:]]
    return [
        {
            "part": part.name,
            "count": count,
            "shapes": [list(shape) for shape in part.shapes],
            "parameters": count * part.parameters,
        }
        for part, count in ordered
    ]


def layer_kinds(config: ModelConfig) -> list[dict[str, Any]]:
    """The kinds of layers: which layers (counted from 1) are of each, and their attention, positions and feed-forward."""
    kinds: dict[tuple[str, str, str], list[int]] = {}
    for layer in range(config.num_hidden_layers):
        attention = variant_of(config, layer).description(config, config.types[layer])
        kind = (attention, _positions(config, layer), _feed_forward(config, layer))
        kinds.setdefault(kind, []).append(layer + 1)
    return [
        {"layers": layers, "attention": attention, "positions": positions, "feed_forward": feed_forward}
        for (attention, positions, feed_forward), layers in kinds.items()
    ]


def _positions(config: ModelConfig, layer: int) -> str:
    if variant_of(config, layer).recurrent:
        return "by order"
    if config.position_type != "rotary":
        return config.position_type
    if not config.has_rope(layer):
        return "none"
    local = config.types[layer] == "sliding_attention" and config.rope_local_base_freq is not None
    scaled = config.rope_scaling.rope_type != "default" and not local
    return "rotary" + (f", {config.rope_scaling.rope_type} × {config.rope_scaling.factor:g}" if scaled else "")


def _feed_forward(config: ModelConfig, layer: int) -> str:
    if not config.is_sparse(layer):
        return f"dense, {config.intermediate_size:,} wide"
    shared = config.shared_expert_intermediate_size
    experts = f"{config.num_experts_per_tok} of {config.num_experts} experts, {config.moe_intermediate_size:,} wide"
    return experts + (f", and one for all, {shared:,} wide" if shared else "")


def model_metrics(config: ModelConfig, bytes_per_value: int = 4) -> dict[str, Any]:
    """Headline figures of a model: parameters, the embedding's share, FLOPs of a training token at the full context,
    bytes of key-value cache per token, the kinds of layers, and the layer table."""
    total = config.parameters()
    return {
        "parameters": total,
        "active_parameters": config.active_parameters(),
        "embedding_share": round(config.embedding_parameters() / total, 4),
        "flops_per_token": config.flops_per_token(config.max_position_embeddings),
        "kv_bytes_per_token": config.kv_bytes_per_token(bytes_per_value),
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "layer_kinds": layer_kinds(config),
        "layers": layer_table(config),
    }


def embedding_shares(vocab_size: int) -> dict[str, float]:
    """What share of a model's parameters the embedding has with a vocabulary of a given size, tied with the head, at
    growing sizes."""
    configs = {name: preset_config(name, vocab_size) for name in GROWING}
    return {name: round(config.embedding_parameters() / config.parameters(), 4) for name, config in configs.items()}
