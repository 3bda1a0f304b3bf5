"""Gemma 2 and 3 in GGUF files: norms with 1 added, a scaled embedding, windows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from bessemer.model.config import ModelConfig
from bessemer.model.families.layout import Stored
from bessemer.model.formats.gguf_base import (
    GgufFamily,
    GgufHead,
    Names,
    Plus,
    read_shape,
    read_windows,
    stored_alike,
    with_gelu_table,
    write_with_windows,
)

_GEMMA2_27B_LAYERS, _GEMMA3_27B_LAYERS = 46, 62


def _read_gemma(head: GgufHead, period: int, layers_of_27b: int) -> dict[str, Any]:
    """The settings that Gemma 2 and 3 share. period: of the layers with full attention."""
    settings = read_shape(head) | read_windows(head, period)
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    # llama.cpp recognises it by its layers too
    is_27b = settings["num_hidden_layers"] == layers_of_27b
    return settings | {
        "hidden_act": "gelu_pytorch_tanh",
        "norm_position": "both",
        "norm_offset": True,
        "embedding_multiplier": math.sqrt(hidden),
        "query_pre_attn_scalar": hidden // heads if is_27b else settings["head_dim"],
    }


def _read_gemma2(head: GgufHead) -> dict[str, Any]:
    # what llama.cpp takes where the keys are missing
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    settings = _read_gemma(head, 2, _GEMMA2_27B_LAYERS)
    return settings | {"model_type": "gemma2"} | {name: head.number(name, cap) for name, cap in caps.items()}


def _write_gemma2(config: ModelConfig) -> dict[str, Any]:
    caps = {name: getattr(config, name) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    return write_with_windows(config) | {name: float(cap) for name, cap in caps.items() if cap is not None}


def _read_gemma3(head: GgufHead) -> dict[str, Any]:
    settings = _read_gemma(head, 6, _GEMMA3_27B_LAYERS) | {
        "model_type": "gemma3_text",
        "qk_norm": "head",
        "final_logit_softcapping": head.get("final_logit_softcapping"),
    }
    if "layer_types" in settings:
        settings["rope_local_base_freq"] = head.get("rope.freq_base_swa", 10_000.0)
    return settings


def _stored_gemma(config: ModelConfig, names: Names) -> Iterator[Stored]:
    for stored in stored_alike(config, names):
        yield Plus(stored.name, stored.views) if stored.name.endswith("norm.weight") else stored


GEMMA2 = GgufFamily("gemma2", _read_gemma2, _write_gemma2, _stored_gemma, ("gemma2",), with_gelu_table)
GEMMA3 = GgufFamily("gemma3", _read_gemma3, write_with_windows, _stored_gemma, ("gemma3_text",), with_gelu_table)
