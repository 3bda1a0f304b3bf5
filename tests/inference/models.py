"""Small decoders of every architecture that the engine serves, with the tokenizer of single bytes and a few merges."""

from __future__ import annotations

from pathlib import Path

from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer
from tests.model.randomised import random_decoder
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

BASE = ModelConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    intermediate_size=64,
    max_position_embeddings=160,
)
#: Two kinds of layers, with two layers of one.
WINDOWS = {"num_hidden_layers": 3, "layer_types": ("sliding_attention", "full_attention", "sliding_attention")}
LINEAR = {"num_hidden_layers": 3, "layer_types": ("linear_attention", "full_attention", "linear_attention")}

ARCHITECTURES = {
    "dense": {},
    "windows": {**WINDOWS, "sliding_window": 20},
    "windows only": {"layer_types": ("sliding_attention",) * 2, "sliding_window": 20},
    "experts": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "latent": {"kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "qk_norm": "none"},
    "linear": {**LINEAR, "linear_key_head_dim": 8, "linear_value_head_dim": 12},
    "sinks and caps": {
        "attention_sinks": True,
        "attn_logit_softcapping": 20.0,
        **WINDOWS,
        "sliding_window": 20,
        "qk_norm": "none",
    },
    "alibi": {"position_type": "alibi"},
    "learned positions": {"position_type": "learned", "norm_type": "layer", "gated_mlp": False, "hidden_act": "gelu"},
}


def small_decoder(name: str, seed: int = 0) -> Decoder:
    """A random decoder of one of the architectures."""
    return random_decoder(BASE.with_changes(**ARCHITECTURES[name]), seed)


def small_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of these models."""
    return load_tokenizer(write_small_tokenizer(folder / "tokenizer"))
