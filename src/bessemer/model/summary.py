"""A model in figures: what its parts weigh and what a token costs. Needs no weights."""

from __future__ import annotations

from typing import Any

from bessemer.model.config import ModelConfig, preset_config
from bessemer.model.costs import Part, block_parts, outer_parts
from bessemer.model.presets import PRESETS


def layer_table(config: ModelConfig) -> list[dict[str, Any]]:
    """One row per kind of part: its name, how many there are, its tensors' shapes, its parameters in all.

    The rows' parameters add up to the model's.
    """
    outer = outer_parts(config)
    blocks: dict[Part, int] = {}
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


def model_metrics(config: ModelConfig, bytes_per_value: int = 4) -> dict[str, Any]:
    """Headline figures of a model: parameters, the embedding's share, FLOPs of a training token at the full context,
    bytes of key-value cache per token, and the layer table."""
    total = config.parameters()
    return {
        "parameters": total,
        "active_parameters": config.active_parameters(),
        "embedding_share": round(config.embedding_parameters() / total, 4),
        "flops_per_token": config.flops_per_token(config.max_position_embeddings),
        "kv_bytes_per_token": config.kv_bytes_per_token(bytes_per_value),
        "context_length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "layers": layer_table(config),
    }


def embedding_shares(vocab_size: int) -> dict[str, float]:
    """What share of each preset's parameters the embedding has with a vocabulary of so many tokens, tied with the head."""
    configs = {name: preset_config(name, vocab_size) for name in PRESETS}
    return {
        name: round(config.vocab_size * config.hidden_size / (config.parameters() - _own_head(config)), 4)
        for name, config in configs.items()
    }


def _own_head(config: ModelConfig) -> int:
    return 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
