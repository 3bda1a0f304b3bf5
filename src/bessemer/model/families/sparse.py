"""The families with experts: Mixtral, Qwen3-MoE, gpt-oss, DeepSeek-V3, Llama 4, and Qwen3-Next with its linear attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from bessemer.model.config import ModelConfig
from bessemer.model.families.base import (
    SIZES_AND_HEAD,
    Family,
    Values,
    prefixed,
    read_bias,
    read_rope,
    read_types,
    read_windows,
    same,
    stored_experts,
    write_rope,
    write_windows,
)
from bessemer.model.families.dense import read_mistral_window, read_qwen3, write_qwen3
from bessemer.model.families.layout import Stored, TensorView, each_expert, whole

# -------------------------------------------------------------------------------------------------------- Mixtral


def _read_mixtral(values: Values) -> dict[str, Any]:
    return {
        "qk_norm": "none",
        "num_experts": values["num_local_experts"],
        "num_experts_per_tok": values.get("num_experts_per_tok", 2),
        "moe_intermediate_size": values["intermediate_size"],
        "router_aux_loss_coef": values.get("router_aux_loss_coef", 0.001),
        **read_mistral_window(values),
        **read_rope(values),
    }


def _write_mixtral(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "intermediate_size": config.moe_intermediate_size,
        **same(config, "router_aux_loss_coef", "sliding_window"),
        **write_rope(config),
    }


def _stored_mixtral(config: ModelConfig, names: Sequence[str]) -> Iterator[Stored]:
    for name in names:
        disk = prefixed(name).replace(".mlp.", ".block_sparse_moe.")
        if ".mlp.experts." in name:
            yield from stored_experts(name, config, disk.rpartition(".")[0], "w1", "w3", "w2")
        else:
            yield Stored(disk.replace(".router.weight", ".gate.weight"), (TensorView(name),))


MIXTRAL = Family("mixtral", "MixtralForCausalLM", _read_mixtral, _write_mixtral, _stored_mixtral)

# ------------------------------------------------------------------------------------------------------ Qwen3-MoE


def _read_qwen_experts(values: Values) -> dict[str, Any]:
    return {
        "num_experts": values.get("num_experts", values.get("num_local_experts")),
        "num_experts_per_tok": values["num_experts_per_tok"],
        "moe_intermediate_size": values["moe_intermediate_size"],
        "norm_topk_prob": bool(values.get("norm_topk_prob", False)),
        "decoder_sparse_step": values.get("decoder_sparse_step", 1),
        "mlp_only_layers": tuple(values.get("mlp_only_layers") or ()),
        "router_aux_loss_coef": values.get("router_aux_loss_coef", 0.001),
    }


def _write_qwen_experts(config: ModelConfig) -> dict[str, Any]:
    sizes = same(config, "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step")
    dense = {"mlp_only_layers": list(config.mlp_only_layers)}
    return {**sizes, **dense, **same(config, "router_aux_loss_coef")}


def _read_qwen3_moe(values: Values) -> dict[str, Any]:
    return {**read_qwen3(values), **_read_qwen_experts(values)}


def _write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    return {**write_qwen3(config), **_write_qwen_experts(config)}


def _stored_qwen_moe(config: ModelConfig, names: Sequence[str]) -> Iterator[Stored]:
    for name in names:
        if ".mlp.experts." in name:
            yield from stored_experts(name, config, prefixed(name).rpartition(".")[0])
        else:
            yield Stored(prefixed(name).replace(".mlp.router.weight", ".mlp.gate.weight"), (TensorView(name),))


QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", _read_qwen3_moe, _write_qwen3_moe, _stored_qwen_moe, SIZES_AND_HEAD)

# ----------------------------------------------------------------------------------------------------- Qwen3-Next


def _read_qwen3_next(values: Values) -> dict[str, Any]:
    types = read_types(values, values.get("full_attention_interval") or 4, "linear_attention")
    linear = {name: value for name, value in values.items() if name.startswith("linear_")}
    shared = values["shared_expert_intermediate_size"]
    return {
        "norm_offset": True,
        "attention_output_gate": True,
        **read_bias(values),
        "layer_types": None if set(types) == {"full_attention"} else tuple(types),
        "partial_rotary_factor": 0.25,
        **linear,
        **_read_qwen_experts(values),
        "shared_expert_intermediate_size": shared,
        "shared_expert_gate": bool(shared),
        **read_rope(values),
    }


def _write_qwen3_next(config: ModelConfig) -> dict[str, Any]:
    linear = {name: getattr(config, name) for name in type(config).model_fields if name.startswith("linear_")}
    rope = write_rope(config)
    rope["rope_parameters"]["partial_rotary_factor"] = config.partial_rotary_factor
    return {
        "attention_bias": config.attention_bias,
        "layer_types": list(config.types),
        **same(config, "shared_expert_intermediate_size", "partial_rotary_factor"),
        **linear,
        **_write_qwen_experts(config),
        **rope,
    }


QWEN3_NEXT = Family("qwen3_next", "Qwen3NextForCausalLM", _read_qwen3_next, _write_qwen3_next, _stored_qwen_moe, SIZES_AND_HEAD)

# -------------------------------------------------------------------------------------------------------- gpt-oss


def _read_gpt_oss(values: Values) -> dict[str, Any]:
    return {
        "qk_norm": "none",
        **read_bias(values, default=True),
        "attention_sinks": True,
        "num_experts": values["num_local_experts"],
        "num_experts_per_tok": values["num_experts_per_tok"],
        "moe_intermediate_size": values["intermediate_size"],
        "swiglu_limit": values.get("swiglu_limit", 7.0),
        "router_bias": True,
        "expert_bias": True,
        "router_aux_loss_coef": values.get("router_aux_loss_coef", 0.001),
        **read_windows({**values, "layer_types": read_types(values, 2)}),
        **read_rope(values),
    }


def _write_gpt_oss(config: ModelConfig) -> dict[str, Any]:
    return {
        "attention_bias": config.attention_bias,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "intermediate_size": config.moe_intermediate_size,
        **same(config, "swiglu_limit", "router_aux_loss_coef"),
        **write_windows(config),
        **write_rope(config),
    }


def _interleaved_rows(tensor: Tensor) -> Tensor:
    """Gate and up rows in turn, input by output: (E, 2I, D) as (E, D, I, 2)."""
    experts, width, hidden = tensor.shape
    return tensor.view(experts, 2, width // 2, hidden).permute(0, 3, 2, 1)


def _interleaved_biases(tensor: Tensor) -> Tensor:
    return tensor.view(tensor.shape[0], 2, -1).transpose(1, 2)


def _by_output(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2)


def _stored_gpt_oss(config: ModelConfig, names: Sequence[str]) -> Iterator[Stored]:
    experts, hidden, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
    for name in names:
        disk = prefixed(name)
        if name.endswith("experts.gate_up_proj"):
            yield Stored(disk, (TensorView(name, each_expert(_interleaved_rows)),), shape=(experts, hidden, 2 * inner))
        elif name.endswith("experts.gate_up_bias"):
            disk = disk.replace("gate_up_bias", "gate_up_proj_bias")
            yield Stored(disk, (TensorView(name, each_expert(_interleaved_biases)),), shape=(experts, 2 * inner))
        elif name.endswith("experts.down_proj"):
            yield Stored(disk, (TensorView(name, each_expert(_by_output)),))
        else:
            yield Stored(disk.replace("experts.down_bias", "experts.down_proj_bias"), (TensorView(name),))


GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", _read_gpt_oss, _write_gpt_oss, _stored_gpt_oss, SIZES_AND_HEAD)

# -------------------------------------------------------------------------------------------------------- Llama 4


def _read_llama4(values: Values) -> dict[str, Any]:
    """The text model. Its context is cut to where attention in chunks and the queries' temperature begin to count, so that it
    has neither."""
    layers, interval = values["num_hidden_layers"], values.get("no_rope_layer_interval") or 4
    turned = values.get("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in range(layers)]
    chunk = values.get("attention_chunk_size", 8192)
    contexts = [values["max_position_embeddings"], *([chunk] if chunk is not None else [])]
    if values.get("attn_temperature_tuning", True) and not all(turned):
        contexts.append(values.get("floor_scale", 8192) - 1)
    step = values.get("interleave_moe_layer_step", 1)
    sparse = values.get("moe_layers")
    sparse = range(step - 1, layers, step) if sparse is None else sparse
    return {
        "max_position_embeddings": min(contexts),
        "qk_norm": "unit" if values.get("use_qk_norm", True) else "none",
        **read_bias(values),
        "rope_interleave": True,
        "no_rope_layers": None if all(turned) else tuple(turned),
        "intermediate_size": values["intermediate_size_mlp"],
        "num_experts": values["num_local_experts"],
        "num_experts_per_tok": values["num_experts_per_tok"],
        "moe_intermediate_size": values["intermediate_size"],
        "shared_expert_intermediate_size": values["intermediate_size"],
        "mlp_only_layers": tuple(layer for layer in range(layers) if layer not in sparse),
        "scoring_func": "sigmoid",
        "norm_topk_prob": False,
        "expert_input_scores": True,
        "router_aux_loss_coef": values.get("router_aux_loss_coef", 0.001),
        **read_rope(values),
    }


def _write_llama4(config: ModelConfig) -> dict[str, Any]:
    layers = range(config.num_hidden_layers)
    return {
        "use_qk_norm": config.qk_norm == "unit",
        "attention_bias": config.attention_bias,
        "no_rope_layers": list(config.no_rope_layers or (1,) * len(layers)),
        "layer_types": list(config.types),
        "attention_chunk_size": None,
        "attn_temperature_tuning": False,
        "intermediate_size": config.moe_intermediate_size,
        "intermediate_size_mlp": config.intermediate_size,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_layers": [layer for layer in layers if config.is_sparse(layer)],
        **same(config, "router_aux_loss_coef"),
        **write_rope(config),
    }


def _stored_llama4(config: ModelConfig, names: Sequence[str]) -> Iterator[Stored]:
    for name in names:
        view = each_expert(_by_output) if name.endswith(("experts.gate_up_proj", "experts.down_proj")) else whole
        yield Stored(prefixed(name).replace(".mlp.", ".feed_forward."), (TensorView(name, view),))


LLAMA4 = Family(
    "llama4_text", "Llama4ForCausalLM", _read_llama4, _write_llama4, _stored_llama4, (*SIZES_AND_HEAD, "intermediate_size_mlp")
)

# ---------------------------------------------------------------------------------------------------- DeepSeek-V3

_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def _read_deepseek(values: Values) -> dict[str, Any]:
    inner, layers = values["moe_intermediate_size"], values["num_hidden_layers"]
    return {
        "qk_norm": "none",
        **read_bias(values),
        **{name: values.get(name) for name in _LATENT},
        "head_dim": values["qk_rope_head_dim"],
        "rope_interleave": bool(values.get("rope_interleave", True)),
        "num_experts": values.get("n_routed_experts", values.get("num_local_experts")),
        "num_experts_per_tok": values["num_experts_per_tok"],
        "moe_intermediate_size": inner,
        "shared_expert_intermediate_size": inner * (values.get("n_shared_experts") or 0),
        "first_k_dense_replace": min(values.get("first_k_dense_replace", 0), layers),
        "scoring_func": "sigmoid",
        "norm_topk_prob": bool(values.get("norm_topk_prob", True)),
        "routed_scaling_factor": values.get("routed_scaling_factor", 1.0),
        "n_group": values.get("n_group") or 1,
        "topk_group": values.get("topk_group") or 1,
        "router_correction_bias": True,
        "num_nextn_predict_layers": values.get("num_nextn_predict_layers") or 0,
        **read_rope(values),
    }


def _write_deepseek(config: ModelConfig) -> dict[str, Any]:
    return {
        **same(config, "attention_bias", *_LATENT, "rope_interleave"),
        "n_routed_experts": config.num_experts,
        "n_shared_experts": config.shared_expert_intermediate_size // config.moe_intermediate_size,
        **same(config, "num_experts_per_tok", "moe_intermediate_size", "first_k_dense_replace"),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        **same(config, "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "num_nextn_predict_layers"),
        **write_rope(config),
    }


_AHEAD = {"embedding_norm": "enorm", "hidden_norm": "hnorm", "proj": "eh_proj", "norm": "shared_head.norm"}


def _among_layers(name: str, config: ModelConfig) -> str:
    """A tensor of multi-token prediction as one of the layers after the last, where DeepSeek's files hold it."""
    _, step, rest = name.split(".", 2)
    layer = f"layers.{config.num_hidden_layers + int(step)}"
    if rest.startswith("block."):
        return f"{layer}.{rest.removeprefix('block.')}"
    part, _, kind = rest.partition(".")
    return f"{layer}.{_AHEAD[part]}.{kind}"


def _stored_deepseek(config: ModelConfig, names: Sequence[str]) -> Iterator[Stored]:
    for name in names:
        disk = prefixed(_among_layers(name, config) if name.startswith("mtp.") else name)
        if ".mlp.experts." in name:
            yield from stored_experts(name, config, disk.rpartition(".")[0])
            continue
        disk = disk.replace(".mlp.router.correction_bias", ".mlp.gate.e_score_correction_bias")
        disk = disk.replace(".mlp.router.", ".mlp.gate.").replace(".mlp.shared_expert.", ".mlp.shared_experts.")
        yield Stored(disk, (TensorView(name),))


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    _read_deepseek,
    _write_deepseek,
    _stored_deepseek,
    # copies of the embedding and the head, which multi-token prediction shares
    ignored=(r"model\.layers\.\d+\.embed_tokens\.weight", r"model\.layers\.\d+\.shared_head\.head\.weight"),
)
