"""Continues from an existing model's weights: as it is, or with a longer context than it was trained for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.store import follow
from bessemer.model.config import ModelConfig, ModelStageConfig
from bessemer.model.decoder import Decoder
from bessemer.model.folder import load_model
from bessemer.model.folder_config import CONFIG, read_model_config, refuse_quantised
from bessemer.model.formats.hub import import_advice
from bessemer.model.initialisation import empty_decoder, fill
from bessemer.tokenization.tokenizer import load_tokenizer

#: What may differ from the model's own settings: the weights mean the same under any of them, or only training reads it.
CHANGEABLE = (
    "max_position_embeddings",
    "rope_scaling",
    "rope_theta",
    "rope_local_base_freq",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_bias_update_rate",
)


def existing_model(path: str, folder: Path) -> Path:
    """The folder of `model.init_from`; a relative path starts from `folder`, the recipe's. A run's or a stage's will do.

    Raises ConfigError when it holds no model.
    """
    place = Path(os.path.normpath(folder.resolve() / path))
    for found in (follow(place), follow(place / "model")):
        if (found / CONFIG).is_file():
            refuse_quantised(found)
            return found
    if not follow(place).exists():
        raise ConfigError(f"model.init_from: {path}: no such folder{import_advice(path)}")
    raise ConfigError(f"model.init_from: {path}: not a model's folder (it has no {CONFIG})")


def existing_fingerprint(config: ModelStageConfig, folder: Path) -> dict[str, Any]:
    """What the stage's output depends on beside its settings: the hashes of the model's files, and which settings were given.

    Raises as `existing_model` and `changed_config` do, so that a mismatch is found before anything runs.
    """
    assert config.init_from is not None
    found = existing_model(config.init_from, folder)
    changed_config(config, read_model_config(found))
    files = [found / CONFIG, *sorted(found.glob("*.safetensors"))]
    return {"files": {path.name: hash_file(path) for path in files}, "given": config.given}


def changed_config(config: ModelStageConfig, existing: ModelConfig) -> ModelConfig:
    """The existing model's config with the settings that were given.

    A scaling that counts from the old context takes it from the model where it is not given. Raises ConfigError when a
    setting differs that the weights were made for.
    """
    given = config.given
    own = existing.model_dump(mode="json")
    for name, value in given.items():
        if value != own[name] and name not in CHANGEABLE:
            raise ConfigError(
                f"model.{name}: {value!r} is not the {own[name]!r} of {config.init_from}; with init_from, only settings of "
                f"positions may differ: {', '.join(CHANGEABLE[:4])}"
            )
    further = given.get("max_position_embeddings", existing.max_position_embeddings)
    if further != existing.max_position_embeddings and existing.position_type == "learned":
        raise ConfigError(
            f"model.max_position_embeddings: {config.init_from} has learned positions, {existing.max_position_embeddings:,} of "
            "them, and none beyond"
        )
    scaling = given.get("rope_scaling", {})
    if scaling.get("rope_type") in ("yarn", "llama3") and scaling["original_max_position_embeddings"] is None:
        before = existing.rope_scaling.original_max_position_embeddings or existing.max_position_embeddings
        given["rope_scaling"] = {**scaling, "original_max_position_embeddings": before}
    return existing.with_changes(**given)


def check_tokenizer(config: ModelStageConfig, tokenizer: Path, folder: Path) -> Path:
    """The folder of the model of `init_from`. Raises ConfigError when its tokenizer is not the one in `tokenizer`."""
    assert config.init_from is not None
    found = existing_model(config.init_from, folder)
    if load_tokenizer(found).hash != load_tokenizer(tokenizer).hash:
        raise ConfigError(
            f"model.init_from: {config.init_from} has another tokenizer than the recipe's; {_encode_with(config, folder)}"
        )
    return found


def check_vocabulary(config: ModelStageConfig, vocab_size: int, folder: Path) -> None:
    """Raise ConfigError when a tokenizer that is still to be trained cannot come out as that of the model of `init_from`: of at
    most `vocab_size` tokens."""
    assert config.init_from is not None
    own = read_model_config(existing_model(config.init_from, folder)).vocab_size
    if own > vocab_size:
        raise ConfigError(
            f"model.init_from: {config.init_from} reads {own:,} tokens, and the recipe trains a new vocabulary of "
            f"{vocab_size:,}, which means nothing to it; {_encode_with(config, folder)}"
        )


def _encode_with(config: ModelStageConfig, folder: Path) -> str:
    assert config.init_from is not None
    inner = "" if (follow(folder / config.init_from) / CONFIG).is_file() else "/model"
    return f"encode with the model's own tokenizer: tokenize: {{tokenizer: {config.init_from}{inner}}}"


def existing_decoder(config: ModelStageConfig, tokenizer: Path, folder: Path) -> Decoder:
    """The model of `init_from` with the settings that were given, in the type that it is stored in.

    Raises ConfigError when its tokenizer is not the one in `tokenizer`.
    """
    model = load_model(check_tokenizer(config, tokenizer, folder))
    return fill(empty_decoder(changed_config(config, model.config)), model.state_dict())
