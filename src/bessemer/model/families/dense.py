"""The dense families: Llama and its descendants, and GPT-2.

Llama's descendants differ in biases, norms, windows and positions. GPT-2 has learned positions, LayerNorm, one matrix for
query, key and value, and matrices stored input by output.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from bessemer.model.config import ModelConfig
from bessemer.model.families.base import (
    HEADS,
    SIZES_AND_HEAD,
    Family,
    Values,
    prefixed,
    read_bias,
    read_rope,
    read_types,
    read_windows,
    same,
    stored_alike,
    write_rope,
    write_windows,
)
from bessemer.model.families.layout import Stored, TensorView, transposed, whole

# ---------------------------------------------------------------------------------------------------------- Llama


def _read_llama(values: Values) -> dict[str, Any]:
    mlp_bias = bool(values.get("mlp_bias", False))
    return {"qk_norm": "none", **read_bias(values), "mlp_bias": mlp_bias, **read_rope(values)}


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return {**same(config, "attention_bias", "mlp_bias"), **write_rope(config)}


LLAMA = Family("llama", "LlamaForCausalLM", _read_llama, _write_llama, stored_alike)

# -------------------------------------------------------------------------------------------------------- Granite


def _read_granite(values: Values) -> dict[str, Any]:
    return {
        **_read_llama(values),
        **{name: values.get(name, 1.0) for name in _GRANITE},
        "query_pre_attn_scalar": scalar_of_multiplier(values.get("attention_multiplier", 1.0)),
    }


def scalar_of_multiplier(multiplier: float) -> float:
    """`query_pre_attn_scalar`, from a factor on attention scores: a hundred for a tenth, and not the double next to it."""
    return round(multiplier**-2, 9)


def multiplier_of_scalar(config: ModelConfig) -> float:
    """The factor on attention scores."""
    return float((config.query_pre_attn_scalar or config.head_dim) ** -0.5)


def _write_granite(config: ModelConfig) -> dict[str, Any]:
    return {**_write_llama(config), **same(config, *_GRANITE), "attention_multiplier": multiplier_of_scalar(config)}


_GRANITE = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
GRANITE = Family("granite", "GraniteForCausalLM", _read_granite, _write_granite, stored_alike)

# -------------------------------------------------------------------------------------------------------- Mistral


def read_mistral_window(values: Values) -> dict[str, Any]:
    """A window in every layer, where there is one."""
    window = values.get("sliding_window")
    if window is None:
        return {}
    return {"sliding_window": window, "layer_types": ("sliding_attention",) * values["num_hidden_layers"]}


def _read_mistral(values: Values) -> dict[str, Any]:
    return {"qk_norm": "none", **read_mistral_window(values), **read_rope(values)}


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window, **write_rope(config)}


MISTRAL = Family("mistral", "MistralForCausalLM", _read_mistral, _write_mistral, stored_alike)

# ----------------------------------------------------------------------------------------------------------- Qwen


def _read_qwen2(values: Values) -> dict[str, Any]:
    return {"qk_norm": "none", "attention_bias": True, **read_windows(values), **read_rope(values)}


def _write_qwen2(config: ModelConfig) -> dict[str, Any]:
    return {**write_windows(config), **write_rope(config)}


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen2, stored_alike)


def read_qwen3(values: Values) -> dict[str, Any]:
    """Qwen3: a norm on every query and key head, and as a rule no biases."""
    return {**read_bias(values), **read_windows(values), **read_rope(values)}


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    """As it is read."""
    return {"attention_bias": config.attention_bias, **write_windows(config), **write_rope(config)}


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", read_qwen3, write_qwen3, stored_alike, SIZES_AND_HEAD)

# -------------------------------------------------------------------------------------------------------- SmolLM3


def _read_smollm3(values: Values) -> dict[str, Any]:
    layers = values["num_hidden_layers"]
    interval = values.get("no_rope_layer_interval") or 4
    turned = values.get("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in range(layers)]
    return {
        **_read_llama(values),
        **read_windows(values),
        "no_rope_layers": None if all(turned) else tuple(turned),
    }


def _write_smollm3(config: ModelConfig) -> dict[str, Any]:
    return {
        **_write_llama(config),
        **write_windows(config),
        "no_rope_layers": list(config.no_rope_layers or (1,) * config.num_hidden_layers),
    }


SMOLLM3 = Family("smollm3", "SmolLM3ForCausalLM", _read_smollm3, _write_smollm3, stored_alike)

# ----------------------------------------------------------------------------------------------------------- OLMo

_OLMO_NORMS = {
    "attention_output_norm": "post_attention_layernorm",
    "feed_forward_output_norm": "post_feedforward_layernorm",
}


def _stored_renamed(norms: dict[str, str]) -> Any:
    """Files whose norms are called otherwise."""

    def stored(config: ModelConfig, names: Sequence[str]) -> Iterator[Stored]:
        for name in names:
            disk = prefixed(name)
            for ours, theirs in norms.items():
                if f".{ours}." in name:
                    disk = prefixed(name.replace(ours, theirs))
            yield Stored(disk, (TensorView(name),))

    return stored


def _read_olmo2(values: Values) -> dict[str, Any]:
    return {"qk_norm": "full", "norm_position": "after", **read_bias(values), **read_rope(values)}


def _write_olmo2(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias, **write_rope(config)}


OLMO2 = Family("olmo2", "Olmo2ForCausalLM", _read_olmo2, _write_olmo2, _stored_renamed(_OLMO_NORMS))


def _read_olmo3(values: Values) -> dict[str, Any]:
    windows = read_windows({**values, "layer_types": read_types(values, 4)})
    return {**_read_olmo2(values), **windows, **_local(values)}


def _local(values: Values) -> dict[str, Any]:
    """Rotary settings given by kind of layer: the full layers' may be scaled, the sliding ones' have their base."""
    settings = read_rope(values, "full_attention")
    rope = values.get("rope_parameters") or {}
    if isinstance(rope.get("sliding_attention"), dict):
        settings["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
    elif values.get("rope_local_base_freq") is not None:
        settings["rope_local_base_freq"] = values["rope_local_base_freq"]
    elif settings["rope_scaling"]["rope_type"] != "default":
        settings["rope_local_base_freq"] = settings.get("rope_theta")
    if "sliding_attention" not in (values.get("layer_types") or ("sliding_attention",)):
        settings.pop("rope_local_base_freq", None)
    return settings


def _write_local(config: ModelConfig) -> dict[str, Any]:
    rope = write_rope(config)
    local = {"rope_type": "default", "rope_theta": config.rope_local_base_freq or config.rope_theta}
    return {"rope_parameters": {"full_attention": rope["rope_parameters"], "sliding_attention": local}}


def _write_olmo3(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.attention_bias, **write_windows(config), **_write_local(config)}


OLMO3 = Family("olmo3", "Olmo3ForCausalLM", _read_olmo3, _write_olmo3, _stored_renamed(_OLMO_NORMS))

# ---------------------------------------------------------------------------------------------------------- Gemma

_GEMMA_NORMS = {
    "attention_output_norm": "post_attention_layernorm",
    "post_attention_layernorm": "pre_feedforward_layernorm",
    "feed_forward_output_norm": "post_feedforward_layernorm",
}


def _read_gemma(values: Values, full_every: int) -> dict[str, Any]:
    """The settings that Gemma 2 and 3 share. full_every: without `layer_types`, every so-many-th layer has full attention."""
    return {
        "hidden_act": values.get("hidden_activation", "gelu_pytorch_tanh"),
        "tie_word_embeddings": values.get("tie_word_embeddings", True),
        "norm_position": "both",
        "norm_offset": True,
        "embedding_multiplier": math.sqrt(values["hidden_size"]),
        "query_pre_attn_scalar": values.get("query_pre_attn_scalar", 256),
        **read_bias(values),
        **read_windows({**values, "layer_types": read_types(values, full_every)}),
    }


def _read_gemma2(values: Values) -> dict[str, Any]:
    return {
        **_read_gemma(values, 2),
        "qk_norm": "none",
        "attn_logit_softcapping": values.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": values.get("final_logit_softcapping", 30.0),
        **read_rope(values),
    }


def _read_gemma3(values: Values) -> dict[str, Any]:
    return {
        **_read_gemma(values, values.get("sliding_window_pattern") or 6),
        "attn_logit_softcapping": values.get("attn_logit_softcapping"),
        "final_logit_softcapping": values.get("final_logit_softcapping"),
        **_local(values),
    }


def whole_number(value: float | None) -> float | None:
    """12 for 12.0."""
    return int(value) if value is not None and value == int(value) else value


def _write_gemma(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_activation": config.hidden_act,
        # transformers takes a whole number only
        "query_pre_attn_scalar": whole_number(config.query_pre_attn_scalar),
        **same(config, "attn_logit_softcapping", "final_logit_softcapping", "attention_bias"),
        **write_windows(config),
    }


def _write_gemma2(config: ModelConfig) -> dict[str, Any]:
    return {**_write_gemma(config), **write_rope(config)}


def _write_gemma3(config: ModelConfig) -> dict[str, Any]:
    return {**_write_gemma(config), **_write_local(config)}


GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", _read_gemma2, _write_gemma2, _stored_renamed(_GEMMA_NORMS), SIZES_AND_HEAD)
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    _read_gemma3,
    _write_gemma3,
    _stored_renamed(_GEMMA_NORMS),
    SIZES_AND_HEAD,
    scoring="Gemma3TextForSequenceClassification",
)


_OURS_TO_THEIRS = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "rms_norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
    "initializer_range": "initializer_range",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}


def _read(values: Values) -> dict[str, Any]:
    settings = {ours: values[theirs] for ours, theirs in _OURS_TO_THEIRS.items() if values.get(theirs) is not None}
    width = values["n_embd"]
    return {
        **settings,
        "head_dim": width // values["n_head"],
        "intermediate_size": values.get("n_inner") or 4 * width,
        "tie_word_embeddings": values.get("tie_word_embeddings", True),
        "norm_type": "layer",
        "position_type": "learned",
        "qk_norm": "none",
        "gated_mlp": False,
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    }


def _write(config: ModelConfig) -> dict[str, Any]:
    settings = {theirs: getattr(config, ours) for ours, theirs in _OURS_TO_THEIRS.items()}
    return {**settings, "n_inner": config.intermediate_size, "tie_word_embeddings": config.tie_word_embeddings}


_OUTER = {"embed_tokens.weight": "wte.weight", "embed_positions.weight": "wpe.weight"}
_PARTS = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


def _stored(config: ModelConfig, names: Sequence[str]) -> Iterator[Stored]:
    for name in names:
        if name in HEADS:
            yield Stored(name, (TensorView(name),))
        elif name in _OUTER:
            yield Stored(f"transformer.{_OUTER[name]}", (TensorView(name),))
        elif name.startswith("norm."):
            yield Stored(f"transformer.{name.replace('norm', 'ln_f', 1)}", (TensorView(name),))
        elif found := re.fullmatch(r"layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)", name):
            layer, which, kind = found.groups()
            if which == "q":
                view, dim = (transposed, 1) if kind == "weight" else (whole, 0)
                places = tuple(TensorView(name.replace("q_proj", f"{part}_proj"), view) for part in "qkv")
                yield Stored(f"transformer.h.{layer}.attn.c_attn.{kind}", places, dim)
        else:
            _, layer, part, kind = re.split(r"^layers\.(\d+)\.(.+)\.(\w+)$", name)[:4]
            is_matrix = kind == "weight" and "layernorm" not in part
            yield Stored(
                f"transformer.h.{layer}.{_PARTS[part]}.{kind}", (TensorView(name, transposed if is_matrix else whole),)
            )


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    _read,
    _write,
    _stored,
    required=("vocab_size", "n_embd", "n_layer", "n_head", "n_positions"),
    scoring="GPT2ForSequenceClassification",
    ignored=(r".*\.attn\.bias", r".*\.attn\.masked_bias"),
)
