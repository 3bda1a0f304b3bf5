"""The architectures that llama.cpp and the decoder both have: keys, tensors, and what either does otherwise.

Each is described once, for reading and for writing. What llama.cpp does by a fixed rule (it always norms Qwen3-MoE's expert
weights, say) stands where the keys are read: a model can be exported when what is written reads back as the same model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bessemer.core.errors import ArtefactError
from bessemer.model.config import ModelConfig
from bessemer.model.families.dense import multiplier_of_scalar, scalar_of_multiplier
from bessemer.model.families.layout import Stored, TensorView
from bessemer.model.formats.gguf_base import (
    ROPE_FACTORS,
    GgufFamily,
    GgufHead,
    Names,
    read_rope,
    read_shape,
    read_windows,
    stored_alike,
    with_gelu_table,
    write_rope,
    write_shape,
    write_with_windows,
)
from bessemer.model.formats.gguf_fused import GLM4, PHI3
from bessemer.model.formats.gguf_gemma import GEMMA2, GEMMA3
from bessemer.model.layers.positions import rotary_frequencies

# ---------------------------------------------------------------------------------------------------------------- llama


def _pairs_together(heads: int) -> Callable[[Tensor], Tensor]:
    """Rows of every head with the two of a rotary pair side by side, where we have them half a head apart."""

    def view(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2)

    return view


def _stored_permuted(config: ModelConfig, names: Names) -> Iterator[Stored]:
    """llama.cpp turns neighbouring channels in this architecture: query and key rows are in its order."""
    for stored in stored_alike(config, names):
        match = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(\w+)", stored.name)
        if match is None:
            yield stored
            continue
        heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
        rows = heads * config.head_dim
        shape = (rows,) if match[2] == "bias" else (rows, config.hidden_size)
        yield replace(stored, views=(TensorView(stored.views[0].name, _pairs_together(heads)),), shape=shape)


def _read_llama(head: GgufHead) -> dict[str, Any]:
    settings = read_shape(head) | {
        "model_type": "llama",
        "attention_bias": head.has("blk.0.attn_q.bias"),
        "attention_output_bias": head.has("blk.0.attn_output.bias"),
        "mlp_bias": head.has("blk.0.ffn_up.bias"),
    }
    if experts := head.whole("expert_count", 0):
        settings |= {
            "model_type": "mixtral",
            "num_experts": experts,
            "num_experts_per_tok": head.whole("expert_used_count"),
            "moe_intermediate_size": settings["intermediate_size"],
        }
    return settings


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    keys = write_shape(config)
    if config.num_experts:
        keys |= {
            "feed_forward_length": config.moe_intermediate_size,
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
        }
    return keys


def _without_window(config: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """A window in every layer is no window where the context is no longer."""
    window, context = config.sliding_window, config.max_position_embeddings
    if window is None or set(config.types) != {"sliding_attention"}:
        return config, []
    notes = [
        f"llama.cpp has no sliding attention in the architecture llama: the context is cut from {context:,} to the window of "
        f"{window:,} tokens, within which both compute the same"
    ]
    reduced = config.with_changes(layer_types=None, sliding_window=None, max_position_embeddings=min(context, window))
    return reduced, notes if window < context else []


LLAMA = GgufFamily(
    "llama",
    _read_llama,
    _write_llama,
    _stored_permuted,
    ("llama", "mistral", "mixtral"),
    _without_window,
    setting_tensors=(ROPE_FACTORS,),
)


def _read_granite(head: GgufHead) -> dict[str, Any]:
    settings = _read_llama(head)
    return settings | {
        "model_type": "granite",
        "embedding_multiplier": head.number("embedding_scale", 1.0),
        "residual_multiplier": head.number("residual_scale", 1.0),
        "logits_scaling": head.number("logit_scale", 1.0),
        "query_pre_attn_scalar": scalar_of_multiplier(head.number("attention.scale", settings["head_dim"] ** -0.5)),
    }


def _write_granite(config: ModelConfig) -> dict[str, Any]:
    return write_shape(config) | {
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_scaling),
        "attention.scale": multiplier_of_scalar(config),
    }


GRANITE = GgufFamily("granite", _read_granite, _write_granite, _stored_permuted, ("granite",), setting_tensors=(ROPE_FACTORS,))

# ----------------------------------------------------------------------------------------------------------------- Qwen


def _read_qwen2(head: GgufHead) -> dict[str, Any]:
    return read_shape(head) | {"model_type": "qwen2", "attention_bias": True}


def _read_qwen3(head: GgufHead) -> dict[str, Any]:
    return read_shape(head) | {"model_type": "qwen3", "qk_norm": "head"}


def _read_qwen3_moe(head: GgufHead) -> dict[str, Any]:
    return _read_qwen3(head) | {"model_type": "qwen3_moe"} | _read_experts(head)


def _read_experts(head: GgufHead) -> dict[str, Any]:
    return {
        "num_experts": head.whole("expert_count"),
        "num_experts_per_tok": head.whole("expert_used_count"),
        "moe_intermediate_size": head.whole("expert_feed_forward_length"),
    }


def _write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    return write_shape(config) | _write_experts(config)


def _write_experts(config: ModelConfig) -> dict[str, Any]:
    return {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }


QWEN2 = GgufFamily("qwen2", _read_qwen2, write_shape, stored_alike, ("qwen2",))
#: The decoder of a Qwen2.5-VL, which is a Qwen2 with positions of three numbers.
QWEN2VL = GgufFamily("qwen2vl", _read_qwen2, write_shape, stored_alike, ())
QWEN3 = GgufFamily("qwen3", _read_qwen3, write_shape, stored_alike, ("qwen3",))
QWEN3_MOE = GgufFamily("qwen3moe", _read_qwen3_moe, _write_qwen3_moe, stored_alike, ("qwen3_moe",))


def with_sections(sections: Sequence[int]) -> GgufFamily:
    """The architecture of a Qwen2 whose positions of three numbers turn these numbers of pairs of channels."""
    return replace(QWEN2VL, write=lambda config: write_shape(config) | {"rope.dimension_sections": [*sections, 0]})


# -------------------------------------------------------------------------------------------------------- SmolLM3, OLMo


def _read_smollm3(head: GgufHead) -> dict[str, Any]:
    settings = _read_llama(head) | {"model_type": "smollm3"}
    turned = tuple(int((layer + 1) % 4 != 0) for layer in range(settings["num_hidden_layers"]))
    return settings | {"no_rope_layers": None if all(turned) else turned}


SMOLLM3 = GgufFamily("smollm3", _read_smollm3, _write_llama, _stored_permuted, ("smollm3",))


def _read_olmo2(head: GgufHead) -> dict[str, Any]:
    settings = read_shape(head) | read_windows(head, 4)
    settings |= {"model_type": "olmo2", "qk_norm": "full", "norm_position": "after", "tie_word_embeddings": False}
    if "layer_types" in settings:
        settings |= {"model_type": "olmo3", "rope_local_base_freq": settings["rope_theta"]}
    return settings


OLMO2 = GgufFamily("olmo2", _read_olmo2, write_with_windows, stored_alike, ("olmo2", "olmo3"))

# ---------------------------------------------------------------------------------------------------------------- GPT-2


def _read_gpt2(head: GgufHead) -> dict[str, Any]:
    settings = read_shape(head)
    return {name: value for name, value in settings.items() if not name.startswith("rope")} | {
        "model_type": "gpt2",
        "hidden_act": "gelu_new",
        "norm_type": "layer",
        "position_type": "learned",
        "gated_mlp": False,
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
    }


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    keys = {name: value for name, value in write_shape(config).items() if not name.startswith("rope")}
    eps = keys.pop("attention.layer_norm_rms_epsilon")
    return keys | {"attention.layer_norm_epsilon": eps}


def _stored_gpt2(config: ModelConfig, names: Names) -> Iterator[Stored]:
    for stored in stored_alike(config, names):
        if re.fullmatch(r"blk\.\d+\.attn_[kv]\.\w+", stored.name):
            continue
        # the file has query, key and value in one tensor
        if ".attn_q." in stored.name:
            ours = stored.views[0].name
            places = tuple(TensorView(ours.replace("q_proj", f"{part}_proj")) for part in "qkv")
            yield Stored(stored.name.replace("attn_q", "attn_qkv"), places)
        else:
            yield stored


GPT2 = GgufFamily("gpt2", _read_gpt2, _write_gpt2, _stored_gpt2, ("gpt2",), with_gelu_table)

# -------------------------------------------------------------------------------------------------------------- gpt-oss

# fixed in llama.cpp
_SWIGLU_LIMIT = 7.0


def _read_gpt_oss(head: GgufHead) -> dict[str, Any]:
    settings = read_shape(head) | read_windows(head, 2)
    inner = head.whole("expert_feed_forward_length")
    if settings["rope_scaling"].get("rope_type") == "yarn":
        # as OpenAI computes it
        settings["rope_scaling"]["truncate"] = False
    return settings | {
        "model_type": "gpt_oss",
        "tie_word_embeddings": False,
        "intermediate_size": inner,
        "attention_bias": True,
        "attention_output_bias": True,
        "attention_sinks": True,
        **_read_experts(head),
        "swiglu_limit": _SWIGLU_LIMIT,
        "router_bias": True,
        "expert_bias": True,
    }


def _write_gpt_oss(config: ModelConfig) -> dict[str, Any]:
    return write_with_windows(config) | _write_experts(config)


def _stored_gpt_oss(config: ModelConfig, names: Names) -> Iterator[Stored]:
    for stored in stored_alike(config, names):
        yield replace(stored, name=stored.name.replace(".ffn_norm.", ".post_attention_norm."))


def _with_ramp(config: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """llama.cpp always rounds YaRN's ramp, which OpenAI's model does not."""
    scaling = config.rope_scaling
    if scaling.rope_type != "yarn":
        return config, []
    exact, rounded = (
        rotary_frequencies(config.rotary_dim, config.rope_theta, some, config.max_position_embeddings)[0]
        for some in (scaling, scaling.with_changes(truncate=True))
    )
    notes = ["llama.cpp rounds the ends of YaRN's ramp to whole channels, and this model has them between: logits differ"]
    reduced = config.with_changes(rope_scaling=scaling.with_changes(truncate=False))
    return reduced, [] if torch.equal(exact, rounded) else notes


GPT_OSS = GgufFamily("gpt-oss", _read_gpt_oss, _write_gpt_oss, _stored_gpt_oss, ("gpt_oss",), _with_ramp)

# ---------------------------------------------------------------------------------------------------------- DeepSeek-V3

# number of the sigmoid among llama.cpp's gating functions
_SIGMOID = 2
# numbers of layers of the models that llama.cpp knows
_WITHOUT_QUERY_LATENT = (26, 27)


def _read_deepseek(head: GgufHead) -> dict[str, Any]:
    settings = read_shape(head)
    heads, rotary = settings["num_attention_heads"], head.whole("rope.dimension_count")
    rope = read_rope(head, rotary)
    if head.whole("expert_gating_func", 1) != _SIGMOID:
        raise ArtefactError(f"{head.place}: DeepSeek models before V3 (experts scored by softmax) are not supported")
    layers = head.whole("block_count") - head.whole("nextn_predict_layers", 0)
    if not head.has("blk.0.attn_q_a.weight") and layers not in _WITHOUT_QUERY_LATENT:
        raise ArtefactError(
            f"{head.place}: of DeepSeek models without a latent query (q_lora_rank) llama.cpp knows those of 26 and 27 layers"
        )
    if rope["rope_scaling"].get("rope_type") == "yarn" and not rope["rope_scaling"].get("mscale_all_dim"):
        raise ArtefactError(f"{head.place}: YaRN needs rope.scaling.yarn_log_multiplier in the architecture deepseek2")
    key = head.whole("attention.key_length_mla", head.whole("attention.key_length"))
    value = head.whole("attention.value_length_mla", head.whole("attention.value_length"))
    rank = head.whole("attention.kv_lora_rank")
    inner = head.whole("expert_feed_forward_length")
    return settings | {
        **rope,
        "model_type": "deepseek_v3",
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "head_dim": rotary,
        "q_lora_rank": head.get("attention.q_lora_rank") if head.has("blk.0.attn_q_a.weight") else None,
        "kv_lora_rank": rank,
        "qk_nope_head_dim": key - rotary,
        "qk_rope_head_dim": rotary,
        "v_head_dim": value,
        "rope_interleave": True,
        **_read_experts(head),
        "shared_expert_intermediate_size": inner * head.whole("expert_shared_count"),
        "first_k_dense_replace": head.whole("leading_dense_block_count", 0),
        "scoring_func": "sigmoid",
        "norm_topk_prob": bool(head.get("expert_weights_norm", False)),
        "routed_scaling_factor": head.get("expert_weights_scale", 1.0),
        "n_group": head.whole("expert_group_count", 1),
        "topk_group": head.whole("expert_group_used_count", 1),
        "router_correction_bias": any(name.endswith("exp_probs_b.bias") for name in head.shapes),
    }


def _write_deepseek(config: ModelConfig) -> dict[str, Any]:
    rank = config.kv_lora_rank
    assert rank is not None
    key = config.qk_nope_head_dim + config.qk_rope_head_dim
    ranks = {} if config.q_lora_rank is None else {"attention.q_lora_rank": config.q_lora_rank}
    return (
        write_shape(config)
        | write_rope(config, log_multiplier=True)
        | _write_experts(config)
        | ranks
        | {
            # in llama.cpp one key of latent and position serves all heads
            "attention.head_count_kv": 1,
            "attention.key_length": rank + config.qk_rope_head_dim,
            "attention.value_length": rank,
            "attention.key_length_mla": key,
            "attention.value_length_mla": config.v_head_dim,
            "attention.kv_lora_rank": rank,
            "expert_shared_count": config.shared_expert_intermediate_size // config.moe_intermediate_size,
            "leading_dense_block_count": config.first_k_dense_replace,
            "expert_gating_func": _SIGMOID,
            "expert_weights_norm": config.norm_topk_prob,
            "expert_weights_scale": float(config.routed_scaling_factor),
            "expert_group_count": config.n_group,
            "expert_group_used_count": config.topk_group,
        }
    )


def _stored_deepseek(config: ModelConfig, names: Names) -> Iterator[Stored]:
    unturned, per_head = config.qk_nope_head_dim, config.qk_nope_head_dim + config.v_head_dim

    def keys(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, per_head))[:, :unturned].transpose(1, 2)

    def values(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, per_head))[:, unturned:]

    for stored in stored_alike(config, names):
        if ".attn_kv_b." in stored.name:
            ours = stored.views[0].name
            yield Stored(stored.name.replace("attn_kv_b", "attn_k_b"), (TensorView(ours, keys),))
            yield Stored(stored.name.replace("attn_kv_b", "attn_v_b"), (TensorView(ours, values),))
        else:
            yield stored


def _without_extra_blocks(config: ModelConfig) -> tuple[ModelConfig, list[str]]:
    if not config.num_nextn_predict_layers:
        return config, []
    return config.with_changes(num_nextn_predict_layers=0), ["the blocks of multi-token prediction are left out"]


DEEPSEEK = GgufFamily("deepseek2", _read_deepseek, _write_deepseek, _stored_deepseek, ("deepseek_v3",), _without_extra_blocks)

#: By llama.cpp's name.
GGUF_FAMILIES: dict[str, GgufFamily] = {
    family.architecture: family
    for family in (
        *(LLAMA, GRANITE, QWEN2, QWEN3, QWEN3_MOE, SMOLLM3, OLMO2, GEMMA3, GEMMA2, PHI3, GLM4),
        *(GPT2, GPT_OSS, DEEPSEEK, QWEN2VL),
    )
}
#: By Hugging Face's `model_type`.
BY_MODEL_TYPE: dict[str, GgufFamily] = {name: family for family in GGUF_FAMILIES.values() for name in family.model_types}
