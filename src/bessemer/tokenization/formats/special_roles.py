"""Roles of special tokens in a Hugging Face folder: begin, end, unknown, padding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bessemer.core.store import read_json
from bessemer.tokenization.folder import TOKENIZER_CONFIG_FILE
from bessemer.tokenization.tokenizer import CHAT_TEMPLATE_FILE, SPECIAL_TOKENS_MAP_FILE

#: The roles that `tokenizer_config.json` names tokens for.
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def read_roles(folder: Path) -> dict[str, str | None]:
    """The token of each role as the folder's files name it, the newer file before the older; None where none does."""
    config = read_config(folder)
    older = folder / SPECIAL_TOKENS_MAP_FILE
    named = (read_json(older, "map of special tokens") if older.exists() else {}) | config
    return {role: content(named.get(role)) for role in ROLES}


def read_config(folder: Path) -> dict[str, Any]:
    """The content of `tokenizer_config.json`, nothing when there is no such file."""
    path = folder / TOKENIZER_CONFIG_FILE
    config: dict[str, Any] = read_json(path, "tokenizer configuration") if path.exists() else {}
    return config


def read_chat_template(folder: Path) -> str | None:
    """The chat template, from its own file or from the configuration; the one named `default` where there are several."""
    path = folder / CHAT_TEMPLATE_FILE
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = read_config(folder).get("chat_template")
    if isinstance(template, list):
        by_name = {entry["name"]: entry["template"] for entry in template}
        template = by_name.get("default")
    return template


def content(token: Any) -> str | None:
    """A special token in these files is a string, or an object that holds it."""
    return token.get("content") if isinstance(token, Mapping) else token
