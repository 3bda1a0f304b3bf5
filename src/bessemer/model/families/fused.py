"""The dense families whose files hold several projections in one matrix: Phi-3, which Phi-4 is too, and GLM-4.

Query, key and value lie below each other in GPT-2's way, in Phi-3's files alone; gate and up do in all of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from bessemer.model.config import ModelConfig
from bessemer.model.families.base import SIZES_AND_HEAD, Family, Values, prefixed, read_rope, write_rope
from bessemer.model.families.dense import read_mistral_window
from bessemer.model.families.layout import Stored, TensorView

_GATE_UP: dict[str, tuple[str, ...]] = {"gate_up_proj": ("gate_proj", "up_proj")}
_QUERY_KEY_VALUE: dict[str, tuple[str, ...]] = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}


def fused(name: str, groups: Mapping[str, tuple[str, ...]], rename: Callable[[str], str] = prefixed) -> Iterator[Stored]:
    """The stored tensor of one of ours: one to one, or of a whole group where this is the group's first; else nothing.

    groups: name of the stored projection, and those of ours that it holds, in order.
    """
    for theirs, (first, *rest) in groups.items():
        if f".{first}." in name:
            ours = [name, *(name.replace(first, other) for other in rest)]
            yield Stored(rename(name.replace(first, theirs)), tuple(map(TensorView, ours)))
            return
        if any(f".{other}." in name for other in rest):
            return
    yield Stored(rename(name), (TensorView(name),))


# ---------------------------------------------------------------------------------------------------------- Phi-3


def _read_phi3(values: Values) -> dict[str, Any]:
    window = values.get("sliding_window")
    # a window as wide as the context, as in Phi-4-mini, hides nothing
    windows = {} if window is None or window >= values["max_position_embeddings"] else read_mistral_window(values)
    return {"qk_norm": "none", **windows, **read_rope(_with_longrope(values))}


def _with_longrope(values: Values) -> Values:
    """With the scaling under its name, and with what it takes from elsewhere: older files call it su or yarn."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if "long_factor" not in rope:
        return values
    context = rope.get("original_max_position_embeddings") or values.get("original_max_position_embeddings") or 4096
    times = rope.get("factor") or values["max_position_embeddings"] / context
    # to as many digits as a float32 of GGUF has
    found = round(math.sqrt(1 + math.log(times) / math.log(context)), 7) if times > 1 else 1.0
    factor = rope.get("attention_factor") or found
    theta = {"rope_theta": values["rope_theta"]} if values.get("rope_theta") is not None else {}
    own = {"rope_type": "longrope", "original_max_position_embeddings": context, "attention_factor": factor}
    kept = {name: value for name, value in rope.items() if name not in ("type", "factor")}
    return {**values, "rope_scaling": None, "rope_parameters": theta | kept | own}


def _write_phi3(config: ModelConfig) -> dict[str, Any]:
    rope = write_rope(config)
    if config.rope_scaling.rope_type == "longrope":
        # where transformers looks for it too
        rope["original_max_position_embeddings"] = config.rope_scaling.original_max_position_embeddings
    return {"sliding_window": config.sliding_window, "partial_rotary_factor": config.partial_rotary_factor, **rope}


def _stored_phi3(config: ModelConfig, names: Sequence[str]) -> Iterator[Stored]:
    for name in names:
        yield from fused(name, _QUERY_KEY_VALUE | _GATE_UP)


PHI3 = Family("phi3", "Phi3ForCausalLM", _read_phi3, _write_phi3, _stored_phi3)

# ------------------------------------------------------------------------------------------------------------ GLM

_GLM4_NORMS = {"attention_output_norm": "post_self_attn_layernorm", "feed_forward_output_norm": "post_mlp_layernorm"}


def _read_glm(values: Values) -> dict[str, Any]:
    return {
        "qk_norm": "none",
        "attention_bias": bool(values.get("attention_bias", False)),
        "rope_interleave": True,
        # where nothing is said
        "partial_rotary_factor": 0.5,
        **read_rope(values),
    }


def _read_glm4(values: Values) -> dict[str, Any]:
    return {**_read_glm(values), "norm_position": "both"}


def _write_glm(config: ModelConfig) -> dict[str, Any]:
    rope = write_rope(config)
    rope["rope_parameters"]["partial_rotary_factor"] = config.partial_rotary_factor
    return {"attention_bias": config.attention_bias, "partial_rotary_factor": config.partial_rotary_factor, **rope}


def _glm4_name(name: str) -> str:
    for ours, theirs in _GLM4_NORMS.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return prefixed(name)


def _stored_glm(config: ModelConfig, names: Sequence[str]) -> Iterator[Stored]:
    for name in names:
        yield from fused(name, _GATE_UP, _glm4_name)


#: GLM-4-9B of 2024; GLM-4-0414 has norms behind attention and feed-forward too.
GLM = Family("glm", "GlmForCausalLM", _read_glm, _write_glm, _stored_glm, SIZES_AND_HEAD)
GLM4 = Family("glm4", "Glm4ForCausalLM", _read_glm4, _write_glm, _stored_glm, SIZES_AND_HEAD)
