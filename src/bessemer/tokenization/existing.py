"""Existing tokenizers: used by a recipe instead of training one, and extended by new tokens.

New tokens get ids at the end; existing ids are unchanged.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.hashing import hash_file
from bessemer.core.store import follow, read_json, write_json
from bessemer.tokenization.config import TokenizeConfig
from bessemer.tokenization.folder import (
    CHAT_TEMPLATE_FILE,
    SPECIAL_TOKENS_MAP_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    AddedToken,
    read_settings,
)
from bessemer.tokenization.tokenizer import load_tokenizer

#: The files of a tokenizer in a folder, which may be a model's.
_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, CHAT_TEMPLATE_FILE, SPECIAL_TOKENS_MAP_FILE, "added_tokens.json")
#: Settings that also apply to an existing tokenizer; all others concern training.
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


@dataclass(frozen=True)
class Extension:
    """Result of `add_tokens`.

    added: the new tokens by id. skipped: tokens that existed before, and their ids. size: the vocabulary's size before.
    """

    added: dict[int, str]
    skipped: dict[str, int]
    size: int


def add_tokens(folder: Path, out: Path, tokens: Sequence[str] = (), special_tokens: Sequence[str] = ()) -> Extension:
    """Write the tokenizer of `folder` to `out` with more tokens, each with the next free id.

    tokens: matched literally in any text, before it is split. special_tokens: control tokens, which only templates write. A
    token that is a single id already is skipped. `out` may be `folder`. Raises ConfigError for a token that cannot be added,
    ArtefactError when `folder` holds no tokenizer.
    """
    tokenizer = load_tokenizer(folder)
    content = read_json(folder / TOKENIZER_FILE, "tokenizer")
    config = read_settings(folder / TOKENIZER_CONFIG_FILE)
    names = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE)).get_vocab(with_added_tokens=True)
    controls = {entry["content"] for entry in content["added_tokens"] if entry["special"]}
    size = tokenizer.vocab_size
    new: list[AddedToken] = []
    skipped: dict[str, int] = {}
    for token, special in [(token, False) for token in tokens] + [(token, True) for token in special_tokens]:
        _check(token, [added.content for added in new])
        if token in names:
            if special != (token in controls):
                kind = "an ordinary" if special else "a control"
                raise ConfigError(f"the token {token!r} is there already (id {names[token]}), as {kind} token")
            if tokenizer.token_bytes(names[token]) != token.encode():
                raise ConfigError(
                    f"the token {token!r} cannot be added: the vocabulary writes another token so (id {names[token]}, "
                    f"{tokenizer.token_bytes(names[token])!r})"
                )
            skipped[token] = names[token]
            continue
        ids = tokenizer.encode(token, add_bos=False)
        if not special and len(ids) == 1 and tokenizer.token_bytes(ids[0]) == token.encode():
            skipped[token] = ids[0]
            continue
        new.append(AddedToken(size + len(new), token, special))
    content["added_tokens"] += [{"id": token.id, **token.as_json()} for token in new]
    _check_ids(folder, content, new)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / TOKENIZER_FILE, content)
    write_json(out / TOKENIZER_CONFIG_FILE, _extended(config, new))
    if out.resolve() != folder.resolve():
        for name in (CHAT_TEMPLATE_FILE, SPECIAL_TOKENS_MAP_FILE):
            if (folder / name).exists():
                shutil.copyfile(folder / name, out / name)
    return Extension({token.id: token.content for token in new}, skipped, size)


def _check(token: str, before: Sequence[str]) -> None:
    if not token:
        raise ConfigError("an empty token cannot be added")
    if token in before:
        raise ConfigError(f"the token {token!r} is named twice")
    try:
        token.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"the token {token!r} holds half a surrogate pair, which has no UTF-8") from None


def _extended(config: dict[str, Any], new: Sequence[AddedToken]) -> dict[str, Any]:
    """`tokenizer_config.json` with the new tokens where it lists them."""
    listed = {str(token.id): token.as_json() for token in new}
    special = [token.content for token in new if token.special]
    return {
        **config,
        "added_tokens_decoder": config.get("added_tokens_decoder", {}) | listed,
        "additional_special_tokens": list(config.get("additional_special_tokens") or []) + special,
    }


def _check_ids(folder: Path, content: dict[str, Any], new: Sequence[AddedToken]) -> None:
    """Raise ArtefactError when the library numbers the new tokens otherwise, as it does where the vocabulary has gaps."""
    library = tokenizers.Tokenizer.from_str(json.dumps(content))
    for token in new:
        if library.token_to_id(token.content) != token.id:
            raise ArtefactError(
                f"{folder / TOKENIZER_FILE}: the vocabulary has gaps in its ids, so {token.content!r} cannot be added to it"
            )
