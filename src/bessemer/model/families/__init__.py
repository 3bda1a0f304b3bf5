"""Model families: the architectures that a decoder can have, each with its Hugging Face form."""

from __future__ import annotations

from typing import Any

from bessemer.core.errors import ConfigError
from bessemer.model.attention.base import variants_in
from bessemer.model.config import ModelConfig
from bessemer.model.families.base import SCORING, Family, Values, read_shared, stored_alike, write_shared
from bessemer.model.families.dense import (
    GEMMA2,
    GEMMA3,
    GPT2,
    GRANITE,
    LLAMA,
    MISTRAL,
    OLMO2,
    OLMO3,
    QWEN2,
    QWEN3,
    SMOLLM3,
)
from bessemer.model.families.fused import GLM, GLM4, PHI3
from bessemer.model.families.sparse import DEEPSEEK_V3, GPT_OSS, LLAMA4, MIXTRAL, QWEN3_MOE, QWEN3_NEXT

#: The form of a decoder that no published family can hold: our own settings and names. Only Bessemer opens it.
OWN = Family(
    "bessemer",
    "BessemerForCausalLM",
    dict,
    lambda config: config.model_dump(mode="json") | {"model_type": "bessemer"},
    stored_alike,
)

#: In order of precedence for a new model that names no family.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        QWEN3,
        LLAMA,
        QWEN2,
        MISTRAL,
        SMOLLM3,
        GRANITE,
        OLMO2,
        OLMO3,
        GEMMA3,
        GEMMA2,
        PHI3,
        GLM4,
        GLM,
        QWEN3_MOE,
        MIXTRAL,
        GPT_OSS,
        DEEPSEEK_V3,
        LLAMA4,
        QWEN3_NEXT,
        GPT2,
        OWN,
    )
}


#: Training settings that no published family has; written under our names where they are set.
_TRAINING = ("router_aux_loss_coef", "router_z_loss_coef", "router_bias_update_rate")


def read_config(family: Family, values: Values) -> ModelConfig:
    """The config that a family's `config.json` describes. Raises ConfigError for one that the decoder cannot be."""
    training = {name: values[name] for name in _TRAINING if values.get(name) is not None}
    settings: dict[str, Any] = {
        **read_shared(values),
        **training,
        **family.read(values),
        "model_type": family.model_type,
        "num_scores": read_num_scores(values),
    }
    known = {name: value for name, value in settings.items() if name in ModelConfig.model_fields}
    return ModelConfig.parse(known)


def write_config(family: Family, config: ModelConfig) -> dict[str, Any]:
    """A family's `config.json`, but for what is the same in all files."""
    training = {name: getattr(config, name) for name in _TRAINING if getattr(config, name)}
    return write_shared(config) | training | family.write(config) | write_scores(family, config)


def read_num_scores(values: Values) -> int:
    """The scores that a model gives in place of logits, as its architecture and its labels tell; 0 of a language model."""
    if not any(str(name).endswith(SCORING) for name in values.get("architectures") or ()):
        return 0
    # 2 where nothing is said, as in transformers
    return len(values["id2label"]) if values.get("id2label") else int(values.get("num_labels") or 2)


def write_scores(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The name of a model's architecture, and labels of its scores where it has any: `transformers` counts them."""
    labels = {f"LABEL_{index}": index for index in range(config.num_scores)}
    named = {"id2label": {str(index): label for label, index in labels.items()}, "label2id": labels} if labels else {}
    return {"architectures": [family.architecture_of(config.num_scores)], **named}


def holds(family: Family, config: ModelConfig) -> bool:
    """Whether a family has a place for everything that a config sets: it reads back the same."""
    if family is not OWN and not all(variant.in_families for variant in variants_in(config)):
        return False
    try:
        again = read_config(family, write_config(family, config))
    except (ConfigError, KeyError, TypeError, ZeroDivisionError):
        return False
    return again == config.with_changes(model_type=family.model_type)


def family_of(config: ModelConfig) -> Family:
    """The family in whose form a model is saved: the one it names, or the first that can hold it.

    Raises ConfigError when the named one cannot hold it.
    """
    if config.model_type is None:
        return next(family for family in FAMILIES.values() if holds(family, config))
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ConfigError(f"unknown architecture {config.model_type!r}; supported: {', '.join(FAMILIES)}")
    if not holds(family, config):
        raise ConfigError(f"model_type {config.model_type}: this family has no place for all of the model's settings")
    return family
