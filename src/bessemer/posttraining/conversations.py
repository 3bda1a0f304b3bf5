"""Conversations on disk: JSON lines in the form that TRL and `datasets` read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.core.errors import SourceError
from bessemer.core.hashing import hash_file, hash_value
from bessemer.core.store import write_text
from bessemer.posttraining.config import DOCS_QUESTIONS, SFTConfig
from bessemer.tokenization.chat import ROLES


@dataclass(frozen=True)
class Conversation:
    """Messages in order, each {"role", "content"}, and where they come from."""

    messages: tuple[dict[str, str], ...]
    source: str

    @property
    def id(self) -> str:
        """Hash of the messages."""
        return hash_value(list(self.messages))


def read_conversations(path: Path) -> list[Conversation]:
    """All conversations of a file; blank lines are passed over.

    Raises SourceError naming the file and line of the first that is malformed, or when there is none.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise SourceError(f"{path}: this file of conversations cannot be read ({error.strerror})") from None
    conversations = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            messages = _checked(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{path}:{number}: {error}") from None
        conversations.append(Conversation(messages, path.name))
    if not conversations:
        raise SourceError(f"{path}: holds no conversation")
    return conversations


def write_conversations(path: Path, conversations: Iterable[Conversation]) -> None:
    """Write a file of conversations, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = (
        {"id": conversation.id, "source": conversation.source, "messages": list(conversation.messages)}
        for conversation in conversations
    )
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _checked(record: Any) -> tuple[dict[str, str], ...]:
    """The messages of one line. Raises ValueError saying what is wrong with it."""
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError("needs a key 'messages' with a list of at least one message")
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {position + 1} must be {{'role': …, 'content': a text}}")
        if message.get("role") not in ROLES:
            raise ValueError(f"message {position + 1} has the role {message.get('role')!r}; known: {', '.join(ROLES)}")
        try:
            message["content"].encode()
        except UnicodeEncodeError:
            raise ValueError(f"message {position + 1} holds half a surrogate pair, which is no character") from None
    if not any(message["role"] == "assistant" and message["content"] for message in messages):
        raise ValueError("the assistant says nothing in it, so there is nothing to learn")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def data_fingerprint(config: SFTConfig, folder: Path) -> dict[str, str]:
    """Hashes of the files of conversations, which belong in the stage's key. Raises SourceError for one that is missing."""
    files = [name for name in config.data if name != DOCS_QUESTIONS]
    for name in files:
        if not (folder / name).is_file():
            raise SourceError(f"{folder / name}: there is no such file of conversations")
    return {name: hash_file(folder / name) for name in files}
