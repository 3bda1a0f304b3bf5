"""Existing tokenizers that a recipe encodes with instead of training one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from bessemer.core.errors import ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.store import follow
from bessemer.tokenization.config import TokenizeConfig
from bessemer.tokenization.folder import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from bessemer.tokenization.tokenizer import load_tokenizer

#: The files of a tokenizer in a folder, which may be a model's.
_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, "chat_template.jinja", "special_tokens_map.json", "added_tokens.json")
#: Settings that have an effect with an existing tokenizer; all others are of training.
_WITHOUT_TRAINING = {"tokenizer", "shard_tokens"}


def existing_tokenizer(path: str, folder: Path) -> Path:
    """The folder of `tokenize.tokenizer`; a relative path starts from `folder`, the recipe's.

    Raises ConfigError when it holds no tokenizer, ArtefactError when that cannot be read.
    """
    tokenizer = follow(Path(os.path.normpath(folder.resolve() / path)))
    if not tokenizer.exists():
        raise ConfigError(f"tokenize.tokenizer: {path}: no such folder")
    if not (tokenizer / TOKENIZER_FILE).is_file():
        raise ConfigError(
            f"tokenize.tokenizer: {path}: not a tokenizer's folder (it has no {TOKENIZER_FILE}); `bessemer import` makes one "
            "of other formats"
        )
    load_tokenizer(tokenizer)
    return tokenizer


def existing_fingerprint(path: str, folder: Path) -> dict[str, str]:
    """The hashes of the tokenizer's files, by name, on which the encoded documents depend.

    Raises as `existing_tokenizer` does.
    """
    tokenizer = existing_tokenizer(path, folder)
    return {name: hash_file(tokenizer / name) for name in _FILES if (tokenizer / name).exists()}


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files, without other files of the folder."""
    target.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def settings_without_effect(config: TokenizeConfig) -> list[str]:
    """The settings of training that were given although no tokenizer is trained."""
    if config.tokenizer is None:
        return []
    defaults = TokenizeConfig()
    names = [name for name in TokenizeConfig.model_fields if name not in _WITHOUT_TRAINING]
    return [name for name in names if getattr(config, name) != getattr(defaults, name)]
