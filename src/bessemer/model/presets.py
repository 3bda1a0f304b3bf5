"""Named sizes of the Qwen3 decoder: what a recipe's `model: {preset: …}` stands for.

Every preset gives the settings that differ from `Architecture`'s defaults; a recipe may override any of them.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # what a laptop trains in minutes: 1.3M parameters with a vocabulary of 4,096
    "qwen3-1m": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 384,
        "max_position_embeddings": 512,
    },
    "qwen3-3m": {
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 512,
        "max_position_embeddings": 512,
    },
    "qwen3-10m": {
        "hidden_size": 320,
        "num_hidden_layers": 8,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "intermediate_size": 896,
        "max_position_embeddings": 1024,
    },
    "qwen3-125m": {
        "hidden_size": 768,
        "num_hidden_layers": 16,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "intermediate_size": 2048,
        "max_position_embeddings": 2048,
    },
    # as published by the Qwen team (huggingface.co/Qwen/Qwen3-0.6B-Base, config.json)
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
    },
}

#: The vocabulary that each size is meant for, in tokens; its figures are shown for it. The tokenizer decides.
PRESET_VOCABULARIES = {"qwen3-1m": 4096, "qwen3-3m": 4096, "qwen3-10m": 8192, "qwen3-125m": 32768, "qwen3-0.6b": 151936}
