"""A model in figures: what its parts weigh and what a token costs. Needs no weights."""

from __future__ import annotations

from typing import Any

from bessemer.model.config import ModelConfig, preset_config
from bessemer.model.presets import PRESETS


def layer_table(config: ModelConfig) -> list[dict[str, Any]]:
    """One row per kind of part: its name, how many there are, its matrices' shapes, its parameters in all.

    The rows' parameters add up to `config.parameters()`.
    """
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    layers = config.num_hidden_layers
    query, key_value = config.num_attention_heads * head, config.num_key_value_heads * head
    table = [
        _row("embedding", 1, [(config.vocab_size, hidden)]),
        _row("attention", layers, [(query, hidden), (key_value, hidden), (key_value, hidden), (hidden, query)]),
        _row("query and key norm", layers, [(head,), (head,)]),
        _row("feed-forward", layers, [(inner, hidden), (inner, hidden), (hidden, inner)]),
        _row("block norms", layers, [(hidden,), (hidden,)]),
        _row("final norm", 1, [(hidden,)]),
    ]
    if not config.tie_word_embeddings:
        table.append(_row("head", 1, [(config.vocab_size, hidden)]))
    return table


def _row(part: str, count: int, shapes: list[tuple[int, ...]]) -> dict[str, Any]:
    each = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)
    return {"part": part, "count": count, "shapes": [list(shape) for shape in shapes], "parameters": count * each}


def model_metrics(config: ModelConfig, bytes_per_value: int = 4) -> dict[str, Any]:
    """Headline figures of a model: parameters, the embedding's share, FLOPs of a training token at the full context,
    bytes of key-value cache per token, and the layer table."""
    return {
        "parameters": config.parameters(),
        "active_parameters": config.active_parameters(),
        "embedding_share": round(config.embedding_parameters() / config.parameters(), 4),
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
