"""What a model folder says of its model: `config.json` in the form of its family, and generation settings."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.store import check_format, read_json, write_json
from bessemer.model.config import ModelConfig
from bessemer.model.families import FAMILIES, family_of, read_config, write_config
from bessemer.model.quantisation.storage import OWN_FORM, QUANTIZATION, read_settings
from bessemer.model.vision.config import ARCHITECTURES, read_vision_language_config

#: Format number of a model folder, under `bessemer` in its config.json.
MODEL_FORMAT = 1

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
#: Generation settings with the same name in `SamplingParams`; the others belong to methods of `transformers`.
_SAMPLING_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION_CONFIG,
)


def write_model_config(
    config: ModelConfig,
    dtype: torch.dtype,
    folder: Path,
    *,
    tokenizer: Path | None,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Write what a model folder holds beside its weights: the tokenizer's files, as for `save_model`, and `config.json`.

    quantization: its `quantization_config`, where weights are quantised.
    """
    if tokenizer is not None and tokenizer.resolve() != folder.resolve():
        copy_tokenizer(tokenizer, folder)
    tokenizer_file = folder / "tokenizer.json"
    ours = {"format": MODEL_FORMAT, "tokenizer_hash": hash_file(tokenizer_file) if tokenizer_file.exists() else None}
    values = huggingface_config(config, str(dtype).removeprefix("torch."))
    quantised = {QUANTIZATION: dict(quantization)} if quantization else {}
    write_json(folder / CONFIG, values | quantised | {"bessemer": ours})


def copy_tokenizer(tokenizer: Path, folder: Path, others: Sequence[str] = ()) -> None:
    """Copy a folder's tokenizer and generation settings, and `others` of its files, as far as it has them."""
    for name in (*TOKENIZER_FILES, *others):
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, folder / name)


def huggingface_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """`config.json` as `transformers` reads it, with everything explicit: its defaults are another model's."""
    family = family_of(config)
    return {
        "model_type": family.model_type,
        **write_config(family, config),
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def read_model_config(folder: Path) -> ModelConfig:
    """The config of a model folder. Raises ArtefactError when it is missing, damaged, or not a model that we know."""
    path = folder / CONFIG
    values = read_json(path, "model config")
    if not isinstance(values, dict):
        raise ArtefactError(f"{path}: this model config is damaged (not a mapping)")
    if "bessemer" in values:
        check_format(values["bessemer"].get("format"), MODEL_FORMAT, path, "model")
    if "auto_map" in values:
        raise ArtefactError(f"{path}: it asks to run code that comes with the model ('auto_map'); bessemer runs no such code")
    family = FAMILIES.get(values.get("model_type", ""))
    if values.get("model_type") in ARCHITECTURES:
        raise ArtefactError(
            f"{path}: this model reads pictures: it is trained (sft, finetune, preference, rl), evaluated and served; "
            "nothing else is done with it yet"
        )
    if family is None:
        known = ", ".join(FAMILIES)
        raise ArtefactError(f"{path}: unknown architecture {values.get('model_type')!r}; supported: {known}")
    settings = read_settings(values, path)
    for name in family.required:
        if values.get(name) is None:
            raise ArtefactError(f"{path}: {name!r} is missing")
        if not isinstance(values[name], int):
            raise ArtefactError(f"{path}: {name}: input should be a valid integer, got {values[name]!r}")
    try:
        config = read_config(family, values)
        own = settings is not None and settings["quant_method"] == OWN_FORM
        return config.with_changes(model_type=settings.get("model_type")) if settings and own else config
    except ConfigError as error:
        raise ArtefactError(f"{path}: {error}") from None
    except KeyError as error:
        raise ArtefactError(f"{path}: {error.args[0]!r} is missing") from None


def read_decoder_config(folder: Path) -> ModelConfig:
    """The config of a folder's decoder, also of one that reads pictures. Raises ArtefactError as `read_model_config`."""
    path = folder / CONFIG
    values = read_json(path, "model config")
    if not isinstance(values, dict) or values.get("model_type") not in ARCHITECTURES:
        return read_model_config(folder)
    try:
        return read_vision_language_config(values).text
    except ConfigError as error:
        raise ArtefactError(f"{path}: {error}") from None


def holds_codes(folder: Path) -> bool:
    """Whether a folder's model is quantised."""
    return read_settings(read_json(folder / CONFIG, "model config"), folder / CONFIG) is not None


def refuse_quantised(folder: Path) -> None:
    """Raise ArtefactError for a model whose weights are codes: training needs them as numbers."""
    if holds_codes(folder):
        raise ArtefactError(
            f"{folder}: this model is quantised, and only whole weights can be trained or changed; take the model that it was "
            "made from"
        )


def refuse_scorer(config: ModelConfig, folder: Path) -> None:
    """Raise ArtefactError for a reward model, where a language model is needed."""
    if config.num_scores:
        raise ArtefactError(
            f"{folder}: this is a reward model, which gives scores and no text; take the language model that it was made from"
        )


def read_sampling_settings(folder: Path) -> dict[str, Any]:
    """How the makers of a model say that it is sampled, by the names of `SamplingParams`; what they leave out is missing.

    A model that is sampled at no stated temperature is at 1, and `do_sample: false` is a temperature of 0.
    """
    path = folder / GENERATION_CONFIG
    given = read_json(path, "file of generation settings") if path.exists() else {}
    settings = {name: given[name] for name in _SAMPLING_SETTINGS if given.get(name) is not None}
    if given.get("do_sample") is False:
        return settings | {"temperature": 0.0}
    is_sampled = given.get("do_sample") or settings.keys() - {"repetition_penalty"}
    return ({"temperature": 1.0} if is_sampled else {}) | settings


def read_end_tokens(folder: Path) -> frozenset[int]:
    """The tokens at which a model's answer ends, as its generation settings list them; none when they do not."""
    path = folder / GENERATION_CONFIG
    if not path.exists():
        return frozenset()
    ends = read_json(path, "file of generation settings").get("eos_token_id")
    return frozenset([ends] if isinstance(ends, int) else ends or ())
