"""GGUF architectures whose files hold several projections in one tensor: Phi-3, which Phi-4 is too, and GLM-4.

`ffn_up` is gate and up there; Phi-3's `attn_qkv` is query, key and value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from bessemer.core.errors import ArtefactError
from bessemer.model.config import ModelConfig
from bessemer.model.families.layout import Stored, TensorView
from bessemer.model.formats.gguf_base import (
    LONG_FACTORS,
    SHORT_FACTORS,
    GgufFamily,
    GgufHead,
    Names,
    read_shape,
    shortest,
    stored_alike,
    write_shape,
    write_with_windows,
)

#: Name of the stored part, and those of ours that it holds, in order.
_GATE_UP: dict[str, tuple[str, ...]] = {"ffn_up": ("gate_proj", "up_proj")}
_QUERY_KEY_VALUE: dict[str, tuple[str, ...]] = {"attn_qkv": ("q_proj", "k_proj", "v_proj")}
_PARTS = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v"}


def _stored_fused(config: ModelConfig, names: Names, groups: dict[str, tuple[str, ...]]) -> Iterator[Stored]:
    parts = {_PARTS[ours]: (theirs, ours, all_of_it) for theirs, all_of_it in groups.items() for ours in all_of_it}
    for stored in stored_alike(config, names):
        match = re.fullmatch(r"(blk\.\d+\.)(\w+)(\.\w+)", stored.name)
        if match is None or match[2] not in parts:
            yield stored
            continue
        theirs, ours, all_of_it = parts[match[2]]
        if ours == all_of_it[0]:
            name = stored.views[0].name
            views = tuple(TensorView(name.replace(ours, other)) for other in all_of_it)
            yield Stored(f"{match[1]}{theirs}{match[3]}", views)


def _partial(head: GgufHead, head_dim: int) -> dict[str, Any]:
    return {"partial_rotary_factor": head.whole("rope.dimension_count", head_dim) / max(head_dim, 1)}


def _read_phi3(head: GgufHead) -> dict[str, Any]:
    settings = read_shape(head)
    settings |= {"model_type": "phi3", **_partial(head, settings["head_dim"])}
    if LONG_FACTORS in head.settings or SHORT_FACTORS in head.settings:
        settings["rope_scaling"] = _read_longrope(head)
    window = head.whole("attention.sliding_window", 0)
    if 0 < window < settings["max_position_embeddings"]:
        settings |= {"layer_types": ("sliding_attention",) * settings["num_hidden_layers"], "sliding_window": window}
    return settings


def _read_longrope(head: GgufHead) -> dict[str, Any]:
    for name in (SHORT_FACTORS, LONG_FACTORS):
        if name not in head.settings:
            raise ArtefactError(f"{head.place}: tensor {name!r} is missing")
    return {
        "rope_type": "longrope",
        "original_max_position_embeddings": head.whole("rope.scaling.original_context_length"),
        "attention_factor": head.number("rope.scaling.attn_factor", 1.0),
        "short_factor": tuple(map(shortest, head.settings[SHORT_FACTORS].flatten().tolist())),
        "long_factor": tuple(map(shortest, head.settings[LONG_FACTORS].flatten().tolist())),
    }


def _write_phi3(config: ModelConfig) -> dict[str, Any]:
    keys, scaling = write_with_windows(config), config.rope_scaling
    if scaling.rope_type != "longrope":
        return keys
    return keys | {
        "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
        "rope.scaling.attn_factor": float(scaling.attention_factor or 1.0),
    }


def _stored_phi3(config: ModelConfig, names: Names) -> Iterator[Stored]:
    return _stored_fused(config, names, _QUERY_KEY_VALUE | _GATE_UP)


def _unwindowed(config: ModelConfig) -> tuple[ModelConfig, list[str]]:
    if "sliding_attention" not in config.types:
        return config, []
    return config, [
        f"llama.cpp attends to all tokens in the architecture phi3: logits differ beyond {config.sliding_window:,} tokens"
    ]


def _read_glm4(head: GgufHead) -> dict[str, Any]:
    settings = read_shape(head)
    return settings | {
        "model_type": "glm4",
        "norm_position": "both",
        "attention_bias": head.has("blk.0.attn_q.bias"),
        "rope_interleave": True,
        **_partial(head, settings["head_dim"]),
    }


def _stored_glm4(config: ModelConfig, names: Names) -> Iterator[Stored]:
    return _stored_fused(config, names, _GATE_UP)


PHI3 = GgufFamily(
    "phi3", _read_phi3, _write_phi3, _stored_phi3, ("phi3",), _unwindowed, setting_tensors=(SHORT_FACTORS, LONG_FACTORS)
)
GLM4 = GgufFamily("glm4", _read_glm4, write_shape, _stored_glm4, ("glm4",))
