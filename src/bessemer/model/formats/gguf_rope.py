"""Rotary scaling in GGUF files: keys for linear scaling and YaRN, a tensor of factors for Llama 3's."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from bessemer.core.errors import ArtefactError
from bessemer.model.architecture import RopeScaling
from bessemer.model.config import ModelConfig
from bessemer.model.formats.gguf_head import GgufHead
from bessemer.model.rope_scaling import rotary_frequencies, yarn_mscale

#: A tensor of llama.cpp's `llama` that is not a parameter: what each frequency is divided by.
ROPE_FACTORS = "rope_freqs.weight"
_TOLERANCE = 1e-4


def read_rope(head: GgufHead, head_dim: int) -> dict[str, Any]:
    """The settings of rotary positions. Raises ArtefactError for a scaling that the decoder has not."""
    theta = head.number("rope.freq_base", 10_000.0)
    kind, factor = head.get("rope.scaling.type", "none"), head.number("rope.scaling.factor", 1.0)
    # as old files say it
    if old_factor := head.number("rope.scale_linear", 0.0):
        kind, factor = "linear", old_factor
    if theta <= 1:
        # no frequency would be below another
        raise ArtefactError(f"{head.place}: 'rope.freq_base' should be above 1, got {theta!r}")
    scaling: dict[str, Any] = {}
    if head.rope_factors is not None and not (head.rope_factors == 1).all():
        scaling = _llama3_of(head, theta, head_dim)
    elif kind == "linear":
        scaling = {"rope_type": "linear", "factor": factor} if factor != 1 else {}
    elif kind == "yarn":
        scaling = _read_yarn(head, factor)
    elif kind != "none":
        raise ArtefactError(f"{head.place}: rotary scaling of the kind {kind!r}; supported: linear, yarn and Llama 3's factors")
    return {"rope_theta": float(theta), "rope_scaling": scaling}


def _read_yarn(head: GgufHead, factor: float) -> dict[str, Any]:
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": head.get("rope.scaling.original_context_length", head["context_length"]),
        "beta_fast": head.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": head.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    if (all_dim := head.number("rope.scaling.yarn_log_multiplier")) is not None:
        scaling |= {"mscale": round(10 * all_dim, 6), "mscale_all_dim": round(10 * all_dim, 6)}
    elif (attention := head.number("rope.scaling.attn_factor", 1.0)) != 1:
        scaling["attention_factor"] = attention * yarn_mscale(factor, 1.0)
    return scaling


def write_rope(config: ModelConfig, *, log_multiplier: bool = False) -> dict[str, Any]:
    """The keys; Llama 3's scaling has none, but `rope_factors`.

    log_multiplier: say DeepSeek's `mscale_all_dim`, for an architecture that reads it.
    """
    scaling = config.rope_scaling
    keys: dict[str, Any] = {"rope.freq_base": float(config.rope_theta), "rope.dimension_count": config.rotary_dim}
    if scaling.rope_type in ("linear", "yarn"):
        keys |= {"rope.scaling.type": scaling.rope_type, "rope.scaling.factor": float(scaling.factor)}
    if scaling.rope_type == "yarn":
        keys["rope.scaling.original_context_length"] = context_before(config)
        if (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0):
            keys |= {
                "rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
                "rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
            }
        if scaling.attention_factor is not None:
            keys["rope.scaling.attn_factor"] = scaling.attention_factor / yarn_mscale(scaling.factor, 1.0)
        elif log_multiplier and scaling.mscale_all_dim:
            keys["rope.scaling.yarn_log_multiplier"] = 0.1 * scaling.mscale_all_dim
    return keys


def context_before(config: ModelConfig) -> int:
    """The context that a scaling starts from."""
    return config.rope_scaling.original_max_position_embeddings or config.max_position_embeddings


def rope_factors(config: ModelConfig) -> Tensor | None:
    """What Llama 3's scaling divides each frequency by, (dim / 2,) float32; None for other scalings."""
    if config.rope_scaling.rope_type != "llama3":
        return None
    plain, _ = rotary_frequencies(config.rotary_dim, config.rope_theta, RopeScaling(), config.max_position_embeddings)
    scaled, _ = rotary_frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings)
    return plain / scaled


def _llama3_of(head: GgufHead, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's settings from its factors.

    The share of a frequency f that is left alone is (c f / 2π - low) / (high - low), cut to 0 … 1: a line a f + b between. A
    context c, low and high that are all multiplied by a number give the same line, so low is taken as 1, as Meta has it.
    """
    factors = head.rope_factors
    assert factors is not None
    plain, _ = rotary_frequencies(head_dim, theta, RopeScaling(), head["context_length"])
    refusal = ArtefactError(f"{head.place}: {ROPE_FACTORS!r} holds factors that are not those of Llama 3's rotary scaling")
    if factors.shape != plain.shape:
        raise refusal
    factor = float(factors.max())
    share = ((1 / factors - 1 / factor) / (1 - 1 / factor)).double()
    between = (share > 1e-3) & (share < 1 - 1e-3)
    at, turns_per_token = share[between], plain[between].double() / (2 * math.pi)
    high = 4.0
    if len(at) >= 2:
        slope = float((at[0] - at[-1]) / (turns_per_token[0] - turns_per_token[-1]))
        start = float(at[0]) - slope * float(turns_per_token[0])
        if start >= 0 or slope <= 0:
            raise refusal
        high = round(1 - 1 / start, 3)
        context = slope * (high - 1)
    elif len(at) == 1:
        context = float((at * (high - 1) + 1) / turns_per_token)
    else:
        kept, slowed = plain[share >= 0.5].min(), plain[share < 0.5].max()
        context = float(2 * math.pi * math.sqrt(high / (kept * slowed)))
    scaling: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": round(factor, 5),
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": max(round(context), 1),
    }
    again, _ = rotary_frequencies(head_dim, theta, RopeScaling(**scaling), head["context_length"])
    if ((plain / again - factors).abs() > _TOLERANCE * factors).any():
        raise refusal
    return scaling
