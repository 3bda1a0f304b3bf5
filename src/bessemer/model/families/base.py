"""Base class of model families, and the part of `config.json` that all share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bessemer.model.config import ModelConfig
from bessemer.model.families.layout import Stored, TensorView, rows

Values = Mapping[str, Any]


#: Suffixes of architecture names.
LANGUAGE_MODEL, SCORING = "ForCausalLM", "ForSequenceClassification"

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
#: Required sizes of families whose head width does not follow from the others.
SIZES_AND_HEAD = (*SIZES, "head_dim")


@dataclass(frozen=True)
class Family:
    """A Hugging Face architecture: how its `config.json` reads and is written, and how its tensors are called.

    read: our settings from its values, but for those that all families share. write: its values from our settings,
    likewise. stored: the tensors of its files, given the names of ours. A family can hold a config when reading what it
    writes gives the config again.
    """

    model_type: str
    architecture: str
    read: Callable[[Values], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]
    stored: Callable[[ModelConfig, Sequence[str]], Iterator[Stored]]
    #: Whole numbers that config.json must give, because their defaults are another model's.
    required: tuple[str, ...] = SIZES
    #: Name of the architecture with scores in place of logits; none: it follows from `architecture`.
    scoring: str | None = None
    #: Regular expressions of tensors in old files that are ignored.
    ignored: tuple[str, ...] = ()

    def architecture_of(self, num_scores: int) -> str:
        """The name of the architecture with this number of scores; with none it is the language model."""
        if not num_scores:
            return self.architecture
        return self.scoring or self.architecture.replace(LANGUAGE_MODEL, SCORING)


#: Settings that have the same name and meaning in every family.
SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "hidden_act",
    "bos_token_id",
    "eos_token_id",
)

_SCALING = (
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "short_factor",
    "long_factor",
)


def read_shared(values: Values) -> dict[str, Any]:
    """The settings of `SHARED`, with Hugging Face's rules for what is absent."""
    settings = {name: values[name] for name in SHARED if values.get(name) is not None}
    heads = settings.get("num_attention_heads")
    settings.setdefault("num_key_value_heads", heads)
    if heads and "hidden_size" in settings:
        settings.setdefault("head_dim", settings["hidden_size"] // heads)
    # as transformers takes it when absent
    settings.setdefault("tie_word_embeddings", False)
    # the rest is in generation_config.json
    if isinstance(settings.get("eos_token_id"), list):
        settings["eos_token_id"] = settings["eos_token_id"][0]
    return settings


def write_shared(config: ModelConfig) -> dict[str, Any]:
    """Everything explicit: the defaults of `transformers` are another model's."""
    return {name: getattr(config, name) for name in SHARED} | {"pad_token_id": None}


def same(config: ModelConfig, *names: str) -> dict[str, Any]:
    """Settings that a family calls as we do."""
    return {name: getattr(config, name) for name in names}


def read_bias(values: Values, default: bool = False) -> dict[str, Any]:
    """One setting for the biases of all projections of attention."""
    bias = bool(values.get("attention_bias", default))
    return {"attention_bias": bias, "attention_output_bias": bias}


def read_types(values: Values, every: int, others: str = "sliding_attention") -> list[str]:
    """`layer_types`; where there are none, every so-many-th layer has full attention and the others another."""
    layers = range(values["num_hidden_layers"])
    return values.get("layer_types") or [others if (layer + 1) % every else "full_attention" for layer in layers]


def read_rope(values: Values, layer_type: str | None = None) -> dict[str, Any]:
    """Rotary settings from `rope_parameters` (new files) or `rope_theta` and `rope_scaling` (old ones).

    layer_type: whose parameters, where they are given by kind of layer.
    """
    rope = dict(values.get("rope_parameters") or {})
    if layer_type is not None and isinstance(rope.get(layer_type), Mapping):
        rope = dict(rope[layer_type])
    if not rope:
        rope = {"rope_theta": values.get("rope_theta"), **(values.get("rope_scaling") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = {"rope_type": kind} | {name: rope[name] for name in _SCALING if rope.get(name) is not None and kind != "default"}
    if kind in ("linear", "dynamic"):
        scaling = {"rope_type": kind, "factor": rope["factor"]}
    settings: dict[str, Any] = {"rope_scaling": scaling}
    theta = rope.get("rope_theta", values.get("rope_theta"))
    if theta is not None:
        settings["rope_theta"] = theta
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial is not None:
        settings["partial_rotary_factor"] = partial
    return settings


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """`rope_parameters`, and the old keys beside them for readers that know only those."""
    scaling, theta = config.rope_scaling, config.rope_theta
    rope: dict[str, Any] = {"rope_type": scaling.rope_type, "rope_theta": theta}
    if config.partial_rotary_factor != 1:
        rope["partial_rotary_factor"] = config.partial_rotary_factor
    if scaling.rope_type in ("linear", "dynamic"):
        rope["factor"] = scaling.factor
    elif scaling.rope_type != "default":
        kept = ("low_freq_factor", "high_freq_factor") if scaling.rope_type == "llama3" else _SCALING[4:]
        names = ("factor", "original_max_position_embeddings", *kept)
        rope |= {name: getattr(scaling, name) for name in names if getattr(scaling, name) is not None}
    old = {} if scaling.rope_type == "default" else {name: value for name, value in rope.items() if name != "rope_theta"}
    return {"rope_parameters": rope, "rope_theta": theta, "rope_scaling": old or None}


def read_windows(values: Values) -> dict[str, Any]:
    """Sliding attention: `layer_types`, or Qwen's older pair of settings."""
    layers, window = values.get("num_hidden_layers", 0), values.get("sliding_window")
    types = values.get("layer_types")
    if types is None and values.get("use_sliding_window") and window is not None:
        first = values.get("max_window_layers", layers)
        types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    if types is None or window is None or set(types) == {"full_attention"}:
        return {}
    return {"layer_types": tuple(types), "sliding_window": window}


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """`layer_types` always, so that no reader has to derive them."""
    sliding = "sliding_attention" in config.types
    return {
        "layer_types": list(config.types),
        "sliding_window": config.sliding_window if sliding else None,
        "use_sliding_window": sliding,
        "max_window_layers": config.num_hidden_layers,
    }


#: Heads, whose names are the same in all families.
HEADS = ("lm_head.weight", "score.weight")


def prefixed(name: str) -> str:
    """Hugging Face's name of a tensor that is called alike: everything but the head lies in `model`."""
    return name if name in HEADS else f"model.{name}"


def stored_alike(config: ModelConfig, names: Sequence[str]) -> Iterator[Stored]:
    """Stored tensors of a family whose names are ours below `model.`."""
    for name in names:
        yield Stored(prefixed(name), (TensorView(name),))


def stored_experts(
    name: str, config: ModelConfig, disk: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> Iterator[Stored]:
    """One of our expert tensors as a matrix per expert; `disk` is the name of the experts' list in the file."""
    inner = config.moe_intermediate_size
    for expert in range(config.num_experts):
        if name.endswith("gate_up_proj"):
            yield Stored(f"{disk}.{expert}.{gate}.weight", (TensorView(name, rows(0, inner, expert)),))
            yield Stored(f"{disk}.{expert}.{up}.weight", (TensorView(name, rows(inner, 2 * inner, expert)),))
        else:
            yield Stored(f"{disk}.{expert}.{down}.weight", (TensorView(name, rows(0, config.hidden_size, expert)),))
