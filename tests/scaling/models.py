"""Small models of every architecture that is counted by itself."""

from bessemer.model.config import preset_config

_SMALL = {
    "hidden_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 224,
    "max_position_embeddings": 512,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 80}
_WINDOWS = ("sliding_attention", "full_attention")
_HYBRID = ("linear_attention", "full_attention")


def _small(preset, **settings):
    return preset_config(preset, 512).with_changes(**{"num_hidden_layers": 2, **settings})


MODELS = {
    "qwen3": _small("qwen3-1m", hidden_size=96),
    "llama": _small("llama-3.2-1b", **_SMALL),
    "olmo2": _small("olmo2-1b", **_SMALL | {"num_key_value_heads": 4}),
    "gpt2": _small("gpt2-3m", hidden_size=96),
    "gemma3": _small("gemma3-1b", **_SMALL, layer_types=_WINDOWS, sliding_window=32),
    "experts": _small("moe-3m", hidden_size=96),
    "latent attention": _small("mla-3m", hidden_size=96),
    "gpt-oss": _small("gpt-oss-20b", **_SMALL, **_EXPERTS, layer_types=_WINDOWS, sliding_window=32),
    "linear attention": _small("hybrid-3m", hidden_size=96, layer_types=_HYBRID),
    "qwen3-next": _small(
        "qwen3-next-80b-a3b",
        **_SMALL,
        **_EXPERTS,
        layer_types=_HYBRID,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=24,
        linear_value_head_dim=32,
        shared_expert_intermediate_size=80,
    ),
}
