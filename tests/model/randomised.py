"""Decoders in which every parameter counts: at default values a swap of two norms would change nothing."""

from __future__ import annotations

import torch

from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder

#: Small decoders that differ in every way that a Qwen3 can: groups, head width apart from hidden width, ties, theta.
SHAPES = {
    "grouped": ModelConfig(vocab_size=199, max_position_embeddings=96),
    "multi-head, untied": ModelConfig(
        vocab_size=101,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=16,
        intermediate_size=80,
        max_position_embeddings=96,
        tie_word_embeddings=False,
        rope_theta=1_000_000.0,
    ),
    "multi-query, wide heads": ModelConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=24,
        intermediate_size=40,
        max_position_embeddings=96,
        rms_norm_eps=1e-3,
    ),
    "one layer, narrow heads": ModelConfig(
        vocab_size=300,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=100,
        max_position_embeddings=96,
        tie_word_embeddings=False,
    ),
}


def random_decoder(config: ModelConfig, seed: int = 0) -> Decoder:
    """Norms uniform in 0.5-1.5, matrices so that a layer keeps its input's scale, logits with a deviation near 1."""
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(config).eval()
    for name, parameter in decoder.named_parameters():
        with torch.no_grad():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif parameter.ndim < 2:
                parameter.normal_(0.0, 0.5, generator=generator)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return decoder


def random_tokens(config: ModelConfig, *shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids, uniform over the vocabulary."""
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
