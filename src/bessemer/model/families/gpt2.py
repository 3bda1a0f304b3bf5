"""GPT-2: learned positions, LayerNorm, one matrix for query, key and value, matrices stored input by output."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from bessemer.model.config import ModelConfig
from bessemer.model.families.base import HEADS, Family, Values
from bessemer.model.families.layout import Place, Stored, transposed, whole

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
            yield Stored(name, (Place(name),))
        elif name in _OUTER:
            yield Stored(f"transformer.{_OUTER[name]}", (Place(name),))
        elif name.startswith("norm."):
            yield Stored(f"transformer.{name.replace('norm', 'ln_f', 1)}", (Place(name),))
        elif found := re.fullmatch(r"layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)", name):
            layer, which, kind = found.groups()
            if which == "q":
                view, dim = (transposed, 1) if kind == "weight" else (whole, 0)
                places = tuple(Place(name.replace("q_proj", f"{part}_proj"), view) for part in "qkv")
                yield Stored(f"transformer.h.{layer}.attn.c_attn.{kind}", places, dim)
        else:
            _, layer, part, kind = re.split(r"^layers\.(\d+)\.(.+)\.(\w+)$", name)[:4]
            is_matrix = kind == "weight" and "layernorm" not in part
            yield Stored(f"transformer.h.{layer}.{_PARTS[part]}.{kind}", (Place(name, transposed if is_matrix else whole),))


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
