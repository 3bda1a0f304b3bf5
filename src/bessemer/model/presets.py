"""Presets: named sizes of the decoder, for a recipe's `model: {preset: …}`.

Every preset gives the settings that differ from `Architecture`'s defaults, which are Qwen3's; a recipe may override any of
them. The published ones give what each team's config.json on huggingface.co gives.
"""

from __future__ import annotations

from typing import Any

_SLIDING, _FULL, _LINEAR = "sliding_attention", "full_attention", "linear_attention"
Settings = dict[str, Any]

# learned positions, LayerNorm, biases, a feed-forward without a gate
_GPT2_FORM: Settings = {
    "position_type": "learned",
    "norm_type": "layer",
    "rms_norm_eps": 1e-5,
    "qk_norm": "none",
    "attention_bias": True,
    "attention_output_bias": True,
    "gated_mlp": False,
    "mlp_bias": True,
    "hidden_act": "gelu_new",
}


def _shape(hidden: int, layers: int, heads: int, kv_heads: int, head: int, inner: int, context: int, **others: Any) -> Settings:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "intermediate_size": inner,
        "max_position_embeddings": context,
        **others,
    }


def _gpt2(hidden: int, layers: int, heads: int, context: int = 1024) -> Settings:
    return {**_GPT2_FORM, **_shape(hidden, layers, heads, heads, hidden // heads, 4 * hidden, context)}


def _latent(query_rank: int, rank: int, plain: int, rotary: int, value: int) -> Settings:
    """DeepSeek's latent attention. plain and rotary: channels of a head without and with position."""
    return {
        "q_lora_rank": query_rank,
        "kv_lora_rank": rank,
        "qk_nope_head_dim": plain,
        "qk_rope_head_dim": rotary,
        "v_head_dim": value,
        "qk_norm": "none",
        "rope_interleave": True,
    }


#: To be trained here: from minutes on a laptop to a day on a GPU.
TO_TRAIN: dict[str, Settings] = {
    # 1.3M parameters with a vocabulary of 4,096
    "qwen3-1m": _shape(128, 4, 4, 2, 32, 384, 512),
    "qwen3-3m": _shape(192, 6, 6, 2, 32, 512, 512),
    "qwen3-10m": _shape(320, 8, 5, 1, 64, 896, 1024),
    "qwen3-125m": _shape(768, 16, 12, 4, 64, 2048, 2048),
    "gpt2-3m": _gpt2(192, 5, 6, context=512),
    # Qwen3-MoE's form: a token visits 2 of 8 experts, and meets as many feed-forward weights as in qwen3-1m
    "moe-3m": _shape(
        *(128, 4, 4, 2, 32, 384, 512),
        moe_intermediate_size=192,
        num_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.01,
        router_z_loss_coef=0.001,
    ),
    # Qwen3-Next's form without its experts: three layers of linear attention to one of full attention
    "hybrid-3m": _shape(
        *(160, 8, 5, 1, 32, 448, 512),
        layer_types=(_LINEAR, _LINEAR, _LINEAR, _FULL) * 2,
        attention_output_gate=True,
        norm_offset=True,
        partial_rotary_factor=0.25,
    ),
    # DeepSeek-V3's form: latent attention, a shared expert, and a load kept even by a bias without a loss
    "mla-3m": {
        **_shape(128, 5, 4, 4, 16, 384, 512),
        **_latent(64, 48, 32, 16, 32),
        "moe_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 128,
        "first_k_dense_replace": 1,
        "scoring_func": "sigmoid",
        "router_correction_bias": True,
        "router_bias_update_rate": 0.001,
    },
}


def _llama(*shape: int, **settings: Any) -> Settings:
    return {"qk_norm": "none", "rms_norm_eps": 1e-5, **_shape(*shape), **settings}


def _llama3(*shape: int, factor: float, **settings: Any) -> Settings:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return _llama(*shape, rope_theta=500_000.0, rope_scaling=scaling, **settings)


def _gpt_oss(layers: int, experts: int) -> Settings:
    return {
        **_shape(2880, layers, 64, 8, 64, 2880, 131_072),
        "moe_intermediate_size": 2880,
        "num_experts": experts,
        "num_experts_per_tok": 4,
        "swiglu_limit": 7.0,
        "router_bias": True,
        "expert_bias": True,
        "router_aux_loss_coef": 0.9,
        "layer_types": (_SLIDING, _FULL) * (layers // 2),
        "sliding_window": 128,
        "attention_sinks": True,
        "attention_bias": True,
        "attention_output_bias": True,
        "qk_norm": "none",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_theta": 150_000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    }


def _deepseek(
    layers: int, heads: int, context: int, *, experts: int, dense_layers: int, factor: float, beta_fast: float, routed: float
) -> Settings:
    return {
        **_shape(7168, layers, heads, heads, 64, 18_432, context),
        **_latent(1536, 512, 128, 64, 128),
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": 4096,
            "beta_fast": beta_fast,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "moe_intermediate_size": 2048,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "shared_expert_intermediate_size": 2048,
        "first_k_dense_replace": dense_layers,
        "scoring_func": "sigmoid",
        "router_correction_bias": True,
        "routed_scaling_factor": routed,
        "tie_word_embeddings": False,
    }


#: As published; to be shown, imported, planned, or trained where there are the machines for it.
PUBLISHED: dict[str, Settings] = {
    # OpenAI: GPT-2 (2019)
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-xl": _gpt2(1600, 48, 25),
    # OpenAI: GPT-3 (2020, table 2.1), every layer dense: half of theirs saw a band of the tokens
    "gpt3-175b": _gpt2(12_288, 96, 96, context=2048),
    # Hugging Face: SmolLM2 (2024), SmolLM3 (2025), whose every fourth layer has no positions
    "smollm2-135m": _llama(576, 30, 9, 3, 64, 1536, 8192, rope_theta=100_000.0, initializer_range=0.041666666666666664),
    "smollm2-360m": _llama(960, 32, 15, 5, 64, 2560, 8192, rope_theta=100_000.0),
    "smollm2-1.7b": _llama(2048, 24, 32, 32, 64, 8192, 8192, rope_theta=130_000.0),
    "smollm3-3b": _shape(
        *(2048, 36, 16, 4, 128, 11_008, 65_536), qk_norm="none", rope_theta=5_000_000.0, no_rope_layers=(1, 1, 1, 0) * 9
    ),
    # Meta: Llama 3.1 and 3.2 (2024)
    "llama-3.2-1b": _llama3(2048, 16, 32, 8, 64, 8192, 131_072, factor=32.0),
    "llama-3.2-3b": _llama3(3072, 28, 24, 8, 128, 8192, 131_072, factor=32.0),
    "llama-3.1-8b": _llama3(4096, 32, 32, 8, 128, 14_336, 131_072, factor=8.0, tie_word_embeddings=False),
    "llama-3.1-70b": _llama3(8192, 80, 64, 8, 128, 28_672, 131_072, factor=8.0, tie_word_embeddings=False),
    # Mistral AI: Mistral 7B (2023, v0.1, with its window) and Mixtral (2024)
    "mistral-7b": _llama(
        *(4096, 32, 32, 8, 128, 14_336, 32_768),
        sliding_window=4096,
        layer_types=(_SLIDING,) * 32,
        tie_word_embeddings=False,
    ),
    "mixtral-8x7b": _llama(
        *(4096, 32, 32, 8, 128, 14_336, 32_768),
        rope_theta=1_000_000.0,
        moe_intermediate_size=14_336,
        num_experts=8,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.02,
        tie_word_embeddings=False,
    ),
    # Alibaba: Qwen2.5 (2024), Qwen3 (2025), Qwen3-Next (2025)
    "qwen2.5-0.5b": _shape(*(896, 24, 14, 2, 64, 4864, 32_768), qk_norm="none", attention_bias=True, rope_theta=1_000_000.0),
    "qwen3-0.6b": _shape(1024, 28, 16, 8, 128, 3072, 32_768, rope_theta=1_000_000.0),
    "qwen3-1.7b": _shape(2048, 28, 16, 8, 128, 6144, 32_768, rope_theta=1_000_000.0),
    "qwen3-4b": _shape(2560, 36, 32, 8, 128, 9728, 32_768, rope_theta=1_000_000.0),
    "qwen3-8b": _shape(4096, 36, 32, 8, 128, 12_288, 32_768, rope_theta=1_000_000.0, tie_word_embeddings=False),
    "qwen3-30b-a3b": {
        **_shape(2048, 48, 32, 4, 128, 6144, 32_768),
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "router_aux_loss_coef": 0.001,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": False,
    },
    "qwen3-next-80b-a3b": {
        **_shape(2048, 48, 16, 2, 256, 5120, 262_144),
        "layer_types": (_LINEAR, _LINEAR, _LINEAR, _FULL) * 12,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "attention_output_gate": True,
        "norm_offset": True,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10_000_000.0,
        "moe_intermediate_size": 512,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "shared_expert_intermediate_size": 512,
        "shared_expert_gate": True,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
    },
    # Ai2: OLMo 2 (2025), norms after attention and feed-forward
    "olmo2-1b": {
        **_shape(2048, 16, 16, 16, 128, 8192, 4096),
        "norm_position": "after",
        "qk_norm": "full",
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
    },
    # Google: Gemma 3 (2025), five sliding layers to a full one
    "gemma3-1b": {
        **_shape(1152, 26, 4, 1, 256, 6912, 32_768),
        "layer_types": ((*(_SLIDING,) * 5, _FULL) * 5)[:26],
        "sliding_window": 512,
        "norm_position": "both",
        "norm_offset": True,
        "embedding_multiplier": 1152**0.5,
        "query_pre_attn_scalar": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    # OpenAI: gpt-oss (2025)
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    # DeepSeek: V3 (2024), without its block of multi-token prediction: num_nextn_predict_layers: 1 adds it
    "deepseek-v3": {
        **_deepseek(61, 128, 163_840, experts=256, dense_layers=3, factor=40.0, beta_fast=32.0, routed=2.5),
        "n_group": 8,
        "topk_group": 4,
    },
    # Moonshot AI: Kimi K2 (2025), DeepSeek-V3's form with more experts and fewer heads: a trillion parameters, 32B active
    "kimi-k2": {
        **_deepseek(61, 64, 131_072, experts=384, dense_layers=1, factor=32.0, beta_fast=1.0, routed=2.827),
        "rope_theta": 50_000.0,
    },
}

PRESETS: dict[str, Settings] = TO_TRAIN | PUBLISHED

#: One shape at growing sizes: what a vocabulary costs is shown for them.
GROWING = ("qwen3-1m", "qwen3-3m", "qwen3-10m", "qwen3-125m", "qwen3-0.6b")

#: The vocabulary that each size is meant for, in tokens; its figures are shown for it. The tokenizer decides.
PRESET_VOCABULARIES = {
    **dict.fromkeys(("qwen3-1m", "qwen3-3m", "gpt2-3m", "moe-3m", "hybrid-3m", "mla-3m"), 4096),
    "qwen3-10m": 8192,
    "qwen3-125m": 32_768,
    **dict.fromkeys(("gpt2", "gpt2-xl", "gpt3-175b"), 50_257),
    **dict.fromkeys(("smollm2-135m", "smollm2-360m", "smollm2-1.7b"), 49_152),
    **dict.fromkeys(("smollm3-3b", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "llama-3.1-70b"), 128_256),
    **dict.fromkeys(("mistral-7b", "mixtral-8x7b"), 32_000),
    **dict.fromkeys((name for name in PUBLISHED if name.startswith("qwen")), 151_936),
    "olmo2-1b": 100_352,
    "gemma3-1b": 262_144,
    **dict.fromkeys(("gpt-oss-20b", "gpt-oss-120b"), 201_088),
    "deepseek-v3": 129_280,
    "kimi-k2": 163_840,
}
