"""The parts that architectures of GGUF files share: the header, rotary scaling, and names of tensors.

Linear scaling and YaRN are keys of the header; Llama 3's scaling is a tensor of factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from bessemer.core.errors import ArtefactError
from bessemer.model.architecture import RopeScaling
from bessemer.model.config import ModelConfig
from bessemer.model.families.layout import Stored, TensorView
from bessemer.model.layers.positions import rotary_frequencies, yarn_mscale


@dataclass(frozen=True)
class GgufHead:
    """The metadata under one architecture's name, and the shapes of the tensors.

    values: all keys. settings: the content of the tensors that are settings and no parameters, by their names.
    """

    place: Path
    architecture: str
    values: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    settings: Mapping[str, Tensor] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """The value under `ARCHITECTURE.NAME`. A list of equal values, one a layer, is that value.

        Raises ArtefactError where the layers differ: the decoder's are all alike.
        """
        key = f"{self.architecture}.{name}"
        value = self.values.get(key, default)
        if isinstance(value, list):
            if not value or any(one != value[0] for one in value):
                raise ArtefactError(f"{self.place}: {key!r} differs from layer to layer, which is not supported")
            value = value[0]
        return shortest(value) if isinstance(value, float) else value

    def __getitem__(self, name: str) -> Any:
        """As `get`, for a key that must be there. Raises ArtefactError."""
        value = self.get(name)
        if value is None:
            raise ArtefactError(f"{self.place}: the key '{self.architecture}.{name}' is missing")
        return value

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number, which must be there unless a default is given. Raises ArtefactError."""
        value = self.get(name, default)
        if value is None or isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
            raise ArtefactError(
                f"{self.place}: the key '{self.architecture}.{name}' "
                + ("is missing" if value is None else f"should be a whole number, got {value!r}")
            )
        return value

    @overload
    def number(self, name: str, default: float) -> float: ...

    @overload
    def number(self, name: str, default: None = None) -> float | None: ...

    def number(self, name: str, default: float | None = None) -> float | None:
        """A finite number, or the default where there is none. Raises ArtefactError."""
        value = self.get(name, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or abs(value) >= 1 << 63:
            raise ArtefactError(f"{self.place}: the key '{self.architecture}.{name}' should be a number, got {value!r}")
        return value

    def token(self, role: str) -> int | None:
        """The id of the tokenizer's begin or end token."""
        value = self.values.get(f"tokenizer.ggml.{role}_token_id")
        return value if isinstance(value, int) else None

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of a tensor. Raises ArtefactError when there is none of that name."""
        if tensor not in self.shapes:
            raise ArtefactError(f"{self.place}: tensor {tensor!r} is missing")
        return self.shapes[tensor]

    def has(self, tensor: str) -> bool:
        """Whether the file holds a tensor."""
        return tensor in self.shapes


def shortest(value: float) -> float:
    """The shortest decimal number that is the same in float32, in which GGUF holds it: 1e-05 and not 9.99999974e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


#: A tensor of llama.cpp's `llama` that is a setting: the divisor of each rotary frequency.
ROPE_FACTORS = "rope_freqs.weight"
#: Those of `phi3`, for contexts up to the old one and beyond.
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
SETTINGS = (ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS)
_TOLERANCE = 1e-4


def read_rope(head: GgufHead, head_dim: int) -> dict[str, Any]:
    """The settings of rotary positions. Raises ArtefactError for a scaling that the decoder has not."""
    theta = head.number("rope.freq_base", 10_000.0)
    kind, factor = head.get("rope.scaling.type", "none"), head.number("rope.scaling.factor", 1.0)
    # key of old files
    if old_factor := head.number("rope.scale_linear", 0.0):
        kind, factor = "linear", old_factor
    if theta <= 1:
        # at 1 all frequencies are the same
        raise ArtefactError(f"{head.place}: 'rope.freq_base' should be above 1, got {theta!r}")
    scaling: dict[str, Any] = {}
    if (factors := head.settings.get(ROPE_FACTORS)) is not None and not (factors == 1).all():
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
    """The keys; Llama 3's scaling has none, but a tensor (`setting_tensors`).

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


def setting_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """The tensors that are settings, by their names: divisors of each frequency, (dim / 2,) float32."""
    scaling = config.rope_scaling
    if scaling.rope_type == "longrope":
        named = {SHORT_FACTORS: scaling.short_factor, LONG_FACTORS: scaling.long_factor}
        return {name: torch.tensor(factors, dtype=torch.float32) for name, factors in named.items()}
    if scaling.rope_type != "llama3":
        return {}
    plain, _ = rotary_frequencies(config.rotary_dim, config.rope_theta, RopeScaling(), config.max_position_embeddings)
    scaled, _ = rotary_frequencies(config.rotary_dim, config.rope_theta, config.rope_scaling, config.max_position_embeddings)
    return {ROPE_FACTORS: plain / scaled}


def _llama3_of(head: GgufHead, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's settings from its factors.

    The share of a frequency f that is left alone is (c f / 2π - low) / (high - low), cut to 0 … 1: a line a f + b between. A
    context c, low and high that are all multiplied by a number give the same line, so low is taken as 1, as Meta has it.
    """
    factors = head.settings[ROPE_FACTORS]
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


Names = Sequence[str]


@dataclass(frozen=True)
class Plus(Stored):
    """A tensor that the file stores with a number added: Gemma's norms, which we store minus 1."""

    added: float = 1.0

    def pack(self, ours: Any) -> Tensor:
        return super().pack(ours) + self.added

    def unpack(self, stored: Tensor, ours: Any) -> None:
        super().unpack(stored - self.added, ours)

    @property
    def is_whole(self) -> bool:
        return False


@dataclass(frozen=True)
class GgufFamily:
    """One of llama.cpp's architectures.

    read: our settings from a file's keys. write: the keys, without the architecture's name in front. stored: its tensors,
    given the names of ours. model_types: the Hugging Face families that it holds. reduced: of a model that llama.cpp holds but
    for some of it, what it holds, and notes that say so. setting_tensors: those that it reads.
    """

    architecture: str
    read: Callable[[GgufHead], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    stored: Callable[[ModelConfig, Names], Iterator[Stored]]
    model_types: tuple[str, ...]
    reduced: Callable[[ModelConfig], tuple[ModelConfig, list[str]]] = lambda config: (config, [])
    setting_tensors: tuple[str, ...] = ()


# ----------------------------------------------------------------------------------------- shared settings and tensors

_OUTER = {
    "embed_tokens.weight": "token_embd.weight",
    "embed_positions.weight": "position_embd.weight",
    "norm.weight": "output_norm.weight",
    "norm.bias": "output_norm.bias",
    "lm_head.weight": "output.weight",
}
_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "attention_output_norm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "feed_forward_output_norm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.router": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_WHOLE_NAMES = {"self_attn.sinks": "attn_sinks.weight", "mlp.router.correction_bias": "exp_probs_b.bias"}


def stored_alike(config: ModelConfig, names: Names) -> Iterator[Stored]:
    """The tensors of the file, given the names of ours; each is one of ours, or the gates or ups of all experts."""
    for name in names:
        if name.startswith("mtp."):
            # multi-token prediction is left out
            continue
        if name in _OUTER:
            yield Stored(_OUTER[name], (TensorView(name),))
            continue
        _, layer, rest = name.split(".", 2)
        prefix = f"blk.{layer}."
        if rest in _WHOLE_NAMES:
            yield Stored(prefix + _WHOLE_NAMES[rest], (TensorView(name),))
        elif rest.startswith("mlp.experts."):
            yield from _experts(name, rest.removeprefix("mlp.experts."), prefix, config.moe_intermediate_size)
        else:
            part, _, kind = rest.rpartition(".")
            yield Stored(f"{prefix}{_PARTS[part]}.{kind}", (TensorView(name),))


def _experts(name: str, which: str, prefix: str, inner: int) -> Iterator[Stored]:
    """One of our expert tensors: all experts' gates and ups lie apart in the file."""
    kind = "bias" if which.endswith("bias") else "weight"
    if which.startswith("down"):
        yield Stored(f"{prefix}ffn_down_exps.{kind}", (TensorView(name),))
    else:
        yield Stored(f"{prefix}ffn_gate_exps.{kind}", (TensorView(name, lambda tensor: tensor[:, :inner]),))
        yield Stored(f"{prefix}ffn_up_exps.{kind}", (TensorView(name, lambda tensor: tensor[:, inner:]),))


def read_shape(head: GgufHead) -> dict[str, Any]:
    """The settings whose keys all architectures share; no norms of queries and keys, no biases."""
    heads, hidden = head.whole("attention.head_count"), head.whole("embedding_length")
    head_dim = head.whole("attention.key_length", hidden // max(heads, 1))
    return {
        "vocab_size": head.shape("token_embd.weight")[0],
        "hidden_size": hidden,
        "num_hidden_layers": head.whole("block_count"),
        "max_position_embeddings": head.whole("context_length"),
        "intermediate_size": head.whole("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": head.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": head.get("attention.layer_norm_rms_epsilon", head.get("attention.layer_norm_epsilon")),
        "tie_word_embeddings": not head.has("output.weight"),
        "bos_token_id": head.token("bos"),
        "eos_token_id": head.token("eos"),
        "qk_norm": "none",
        **read_rope(head, head_dim),
    }


def write_shape(config: ModelConfig) -> dict[str, Any]:
    """The keys that most architectures share."""
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        **write_rope(config),
    }


def read_windows(head: GgufHead, period: int) -> dict[str, Any]:
    """Sliding layers, of which every `period`-th is a full one, unless the file has a period of its own."""
    window = head.get("attention.sliding_window", 0)
    if not window:
        return {}
    period = head.whole("attention.sliding_window_pattern", period)
    layers = range(head.whole("block_count"))
    full = "full_attention"
    types = tuple("sliding_attention" if period == 0 or (layer + 1) % period else full for layer in layers)
    return {"layer_types": types, "sliding_window": window} if set(types) != {full} else {}


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """The key of sliding attention; none where all layers see everything."""
    return {"attention.sliding_window": config.sliding_window} if "sliding_attention" in config.types else {}


def write_with_windows(config: ModelConfig) -> dict[str, Any]:
    """The keys that most architectures share, and that of sliding attention."""
    return write_shape(config) | write_windows(config)


def with_gelu_table(config: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """`GgufFamily.reduced` of an architecture with GELU."""
    return config, ["llama.cpp looks GELU up in a half-precision table: logits differ in the third decimal"]
