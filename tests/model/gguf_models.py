"""Tiny models of every family that llama.cpp holds, in folders with a tokenizer."""

from __future__ import annotations

from pathlib import Path

from tests.model.family_models import CASES as FAMILY_CASES
from tests.model.family_models import LONGROPE, make
from tests.model.tokenizers import VOCAB_SIZE, write_small_tokenizer

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
}
_PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}

#: Name: the case of `family_models`, and what is changed, because llama.cpp has it fixed.
CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama-biases-llama3-rope": ("llama-biases-llama3-rope", {"head_dim": 16, "hidden_size": 64}),
    "llama-linear-rope": ("llama-linear-rope", {}),
    "llama-yarn": ("llama", {"rope_parameters": _YARN}),
    "llama-multi-query": ("llama-multi-query", {}),
    "granite": ("granite", {}),
    "mistral": ("mistral", {"sliding_window": 40}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-yarn": ("qwen3-yarn", {"attention_bias": False}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": []}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 4}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {}),
    "gemma3": (
        "gemma3",
        {
            "num_hidden_layers": 7,
            "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": None,
            "tie_word_embeddings": True,
        },
    ),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 8, "tie_word_embeddings": True}),
    "phi3": ("phi3", {}),
    "phi3-partial-rope": ("phi3-window-partial-rope", {"sliding_window": None}),
    # beyond the old context, as llama.cpp's own context always is
    "phi3-longrope": ("phi3-longrope-short", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 4}),
    "glm4": ("glm4", {}),
    "gpt2": ("gpt2", {}),
    "gpt_oss": ("gpt_oss", {"swiglu_limit": 7.0, "rope_parameters": _PLAIN}),
    "gpt_oss-yarn": ("gpt_oss", {"swiglu_limit": 7.0}),
    "deepseek_v3": ("deepseek_v3", {"rope_parameters": {**_YARN, "mscale": 0.8, "mscale_all_dim": 0.8}}),
    "deepseek_v3-one-group": ("deepseek_v3", {"rope_parameters": _PLAIN, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}),
}
assert {case for case, _ in CASES.values()} <= set(FAMILY_CASES)


def write_case(name: str, folder: Path) -> Path:
    """The folder of a case, as `transformers` writes it, with a tokenizer of as many tokens."""
    case, changes = CASES[name]
    make(case, **changes, vocab_size=VOCAB_SIZE).save_pretrained(folder)
    return write_small_tokenizer(folder)
