"""Tiny models of every family, made by `transformers`, with every parameter and buffer drawn at random."""

from __future__ import annotations

import torch
import transformers

_BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.02,
}
_THETA = {"rope_type": "default", "rope_theta": 10_000.0}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 4,
    "short_factor": [1.0, 1.25, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 5.0, 9.5],
}
_SLIDING = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

#: Name of the case: the class of the config, and its values beside the shared ones.
CASES = {
    "llama": ("LlamaConfig", {"rope_parameters": _THETA}),
    "llama-biases-llama3-rope": (
        "LlamaConfig",
        {"rope_parameters": _LLAMA3, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-linear-rope": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}}),
    "llama-dynamic-rope": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}, "max_position_embeddings": 12},
    ),
    "llama-multi-query": ("LlamaConfig", {"rope_parameters": _THETA, "num_key_value_heads": 1}),
    "granite": (
        "GraniteConfig",
        {
            "rope_parameters": _THETA,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.5,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
    ),
    "mistral": ("MistralConfig", {"rope_parameters": _THETA, "sliding_window": 5}),
    "mistral-no-window": ("MistralConfig", {"rope_parameters": _THETA, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {"rope_parameters": _THETA}),
    "qwen2-windows": (
        "Qwen2Config",
        {"rope_parameters": _THETA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", {"rope_parameters": _THETA}),
    "qwen3-yarn": ("Qwen3Config", {"rope_parameters": _YARN, "attention_bias": True}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"rope_parameters": _THETA, **_EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [1], "decoder_sparse_step": 1},
    ),
    "qwen3_moe-unnormed": ("Qwen3MoeConfig", {"rope_parameters": _THETA, **_EXPERTS, "norm_topk_prob": False}),
    "mixtral": (
        "MixtralConfig",
        {"rope_parameters": _THETA, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "smollm3": ("SmolLM3Config", {"rope_parameters": _THETA, "no_rope_layer_interval": 2}),
    "olmo2": ("Olmo2Config", {"rope_parameters": _THETA}),
    "olmo3": (
        "Olmo3Config",
        {
            "rope_parameters": {"full_attention": _YARN, "sliding_attention": _THETA},
            "sliding_window": 5,
            "layer_types": _SLIDING,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 8.0},
                "sliding_attention": _THETA,
            },
            "sliding_window": 5,
            "layer_types": _SLIDING,
            "query_pre_attn_scalar": 12,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma2": (
        "Gemma2Config",
        {
            "rope_parameters": _THETA,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "phi3": ("Phi3Config", {"rope_parameters": _THETA, "sliding_window": None}),
    "phi3-window-partial-rope": (
        "Phi3Config",
        {"rope_parameters": {**_THETA, "partial_rotary_factor": 0.5}, "sliding_window": 5, "tie_word_embeddings": True},
    ),
    # all that is read in one piece there is longer than the old context, or nothing is
    "phi3-longrope-short": (
        "Phi3Config",
        {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 64}, "original_max_position_embeddings": 64},
    ),
    "glm": ("GlmConfig", {"rope_parameters": {**_THETA, "partial_rotary_factor": 0.5}, "attention_bias": True}),
    "glm4": ("Glm4Config", {"rope_parameters": {**_THETA, "partial_rotary_factor": 0.5}, "attention_bias": True}),
    "gpt_oss": (
        "GptOssConfig",
        {
            "rope_parameters": {**_YARN, "truncate": False},
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "swiglu_limit": 1.0,
        },
    ),
    "llama4_text": (
        "Llama4TextConfig",
        {
            "rope_parameters": _THETA,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 2,
        },
    ),
    "llama4_text-plain": (
        "Llama4TextConfig",
        {
            "rope_parameters": _LLAMA3,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 48,
            "use_qk_norm": False,
            "no_rope_layers": [1, 1, 1, 1],
            "attention_chunk_size": None,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
            "num_key_value_heads": 4,
            "q_lora_rank": 20,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
        },
    ),
    "deepseek_v3-plain-query": (
        "DeepseekV3Config",
        {
            "rope_parameters": _THETA,
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 6,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_shared_experts": 1,
            "first_k_dense_replace": 0,
            "rope_interleave": False,
        },
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "rope_parameters": {**_THETA, "partial_rotary_factor": 0.5},
            **_EXPERTS,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 6,
            "linear_conv_kernel_dim": 4,
            "norm_topk_prob": True,
        },
    ),
    "gpt2": (
        "GPT2Config",
        {
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "n_inner": 40,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
}
#: Of each family the case that is named after it alone; the others change one of its settings.
ONE_OF_EACH = [case for case in CASES if "-" not in case]
#: Of each kind of block one family, where the others differ in nothing that is tested.
OF_EACH_KIND = ["gpt2", "gemma3", "qwen3_moe", "gpt_oss", "deepseek_v3"]
#: Every family once, without the variants of its settings.
EVERY_FAMILY = [case for case in CASES if "-" not in case]


def make(case: str, seed: int = 0, **changes):
    """The `transformers` model of a case, eager attention, evaluation mode; with some of its settings changed."""
    name, values = CASES[case]
    shared = {} if name == "GPT2Config" else _BASE
    if name == "GPT2Config":
        shared = {key: _BASE[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    config = getattr(transformers, name)(**{**shared, **values, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomise(model, seed)
    return model


@torch.no_grad()
def randomise(model, seed: int) -> None:
    """Norms uniform in 0.5 … 1.5 (around 0 where they are stored minus 1), matrices so that activations keep their size,
    everything else normal: with default values, swapping two norms would change nothing."""
    generator = torch.Generator().manual_seed(seed + 1)
    offset = type(model).__name__.startswith(("Gemma2", "Gemma3", "Qwen3Next"))
    for name, tensor in [*model.named_parameters(), *_buffers(model)]:
        if "norm" in name or ".ln_" in name:
            if name.endswith("bias"):
                tensor.normal_(0, 0.2, generator=generator)
            else:
                tensor.uniform_(0.5, 1.5, generator=generator)
                if offset and "linear_attn.norm" not in name:
                    tensor -= 1
        elif name.endswith("A_log"):
            tensor.uniform_(-2, 1, generator=generator)
        elif tensor.ndim < 2 or name.endswith("_bias"):
            tensor.normal_(0, 0.5, generator=generator)
        elif "embed" in name or "wte" in name or "wpe" in name:
            tied = model.config.tie_word_embeddings
            tensor.normal_(0, tensor.shape[1] ** -0.5 if tied else 1, generator=generator)
        else:
            tensor.normal_(0, tensor.shape[-1] ** -0.5, generator=generator)


def _buffers(model):
    saved = model.state_dict()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in saved]
