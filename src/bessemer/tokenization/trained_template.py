"""The chat template that a model or an adapter was trained with, kept beside it: under `bessemer` in `tokenizer_config.json`,
which goes wherever the tokenizer goes, and in `adapter_config.json`.

A template that was changed since makes prompts that the model has not seen in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bessemer.core.errors import ArtefactError
from bessemer.core.store import read_json, write_json
from bessemer.tokenization.folder import TOKENIZER_CONFIG_FILE, read_chat_template, template_hash

_ADAPTER_CONFIG = "adapter_config.json"
_OURS, _KEY = "bessemer", "trained_template"
#: The hashes of the tokenizers that one has all tokens of, and beside these control tokens alone.
_EXTENDS = "extends"


@dataclass(frozen=True)
class TrainedTemplate:
    """hash: of the chat template in training. tool_format: the name of the format in which calls of tools were written."""

    hash: str
    tool_format: str


def read_trained_template(folder: Path) -> TrainedTemplate | None:
    """The record of a model's or an adapter's folder; None where it has none, as a model that was not trained on conversations
    here."""
    content = _content(folder / _config_file(folder)).get(_OURS)
    record = content.get(_KEY) if isinstance(content, dict) else None
    if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in ("hash", "tool_format")):
        return None
    return TrainedTemplate(record["hash"], record["tool_format"])


def extended_tokenizers(folder: Path) -> list[str]:
    """The hashes of the tokenizers that a folder's one encodes texts as: it has more control tokens than they have."""
    path = folder / TOKENIZER_CONFIG_FILE
    ours = _content(path).get(_OURS) if path.is_file() else None
    given = ours.get(_EXTENDS) if isinstance(ours, dict) else None
    return [one for one in given if isinstance(one, str)] if isinstance(given, list) else []


def write_extended(folder: Path, hashes: Iterable[str]) -> None:
    """Note in a tokenizer's folder which ones it extends by control tokens."""
    path = folder / TOKENIZER_CONFIG_FILE
    content = _content(path)
    ours = content.get(_OURS)
    content[_OURS] = {**(ours if isinstance(ours, dict) else {}), _EXTENDS: list(hashes)}
    write_json(path, content)


def write_trained_template(folder: Path, record: TrainedTemplate) -> None:
    """Write the record into a model's or an adapter's folder."""
    path = folder / _config_file(folder)
    content = _content(path)
    ours = content.get(_OURS)
    content[_OURS] = {**(ours if isinstance(ours, dict) else {}), _KEY: asdict(record)}
    write_json(path, content)


def record_training(
    out: Path, tokenizer_folder: Path, tool_format: str, response_template: Mapping[str, Any] | None = None
) -> None:
    """Write the template of a tokenizer's folder as that of training into all models and adapters of a stage's folder; nothing
    where it has none. response_template: how `transformers` reads answers, for models that do not say so themselves."""
    template = read_chat_template(tokenizer_folder)
    if template is None:
        return
    record = TrainedTemplate(template_hash(template), tool_format)
    for folder in (*out.glob("model*"), *out.glob("adapter*")):
        path = folder / _config_file(folder)
        if not path.is_file():
            continue
        write_trained_template(folder, record)
        if response_template is not None and path.name == TOKENIZER_CONFIG_FILE:
            write_json(path, {"response_template": dict(response_template), **_content(path)})


def check_trained_template(folders: Iterable[Path], chat_template: str | None) -> None:
    """Raise ArtefactError where the chat template is not the one that a model or an adapter was trained with."""
    now = None if chat_template is None else template_hash(chat_template)
    for folder in folders:
        record = read_trained_template(folder)
        if record is not None and record.hash != now:
            raise ArtefactError(
                f"{folder}: was trained with another chat template than the one that it would be served with (then "
                f"{record.hash}, now {now or 'none'}); put that template back, train again, or serve it so with "
                "--other-template"
            )


def _config_file(folder: Path) -> str:
    is_adapter = (folder / _ADAPTER_CONFIG).is_file() and not (folder / TOKENIZER_CONFIG_FILE).is_file()
    return _ADAPTER_CONFIG if is_adapter else TOKENIZER_CONFIG_FILE


def _content(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.is_file() else {}
    if not isinstance(content, dict):
        raise ArtefactError(f"{path}: this file is damaged (not a mapping)")
    return content
