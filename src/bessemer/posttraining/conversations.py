"""Conversation files: JSON lines in the format of TRL and `datasets`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.core.errors import RequestError, SourceError
from bessemer.core.hashing import hash_file, hash_value
from bessemer.core.store import write_text
from bessemer.posttraining.config import DOCS_QUESTIONS, SFTConfig
from bessemer.tokenization.chat import checked_messages, checked_tools

#: Keys of a message that are kept besides role and content, for chat templates that write them.
_KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content")


@dataclass(frozen=True)
class Conversation:
    """Messages in order, their source, and the tools that the assistant could call."""

    messages: tuple[dict[str, Any], ...]
    source: str
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def id(self) -> str:
        """Hash of the messages and the tools."""
        messages = list(self.messages)
        return hash_value([messages, list(self.tools)] if self.tools else messages)


def read_conversations(path: Path) -> list[Conversation]:
    """All conversations of a file; blank lines are skipped.

    Raises SourceError with file and line of the first malformed one, or when there is none.
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
            messages, tools = _checked(json.loads(line))
        except (ValueError, RecursionError, RequestError) as error:
            raise SourceError(f"{path}:{number}: {error}") from None
        conversations.append(Conversation(messages, path.name, tools))
    if not conversations:
        raise SourceError(f"{path}: holds no conversation")
    return conversations


def write_conversations(path: Path, conversations: Iterable[Conversation]) -> None:
    """Write a file of conversations atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = (
        {
            "id": conversation.id,
            "source": conversation.source,
            "messages": list(conversation.messages),
            **({"tools": list(conversation.tools)} if conversation.tools else {}),
        }
        for conversation in conversations
    )
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _checked(record: Any) -> tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]:
    """The messages and tools of one line. Raises ValueError or RequestError when it is malformed."""
    given = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(given, list) or not given:
        raise ValueError("needs a key 'messages' with a list of at least one message")
    messages = checked_messages(given, first=1)
    if not any(message["role"] == "assistant" and (message.get("content") or "tool_calls" in message) for message in messages):
        raise ValueError("the assistant says nothing in it, so there is nothing to learn")
    kept = ({key: message[key] for key in ("role", "content", *_KEPT) if key in message} for message in messages)
    return tuple(kept), tuple(checked_tools(_tools(record)) or ())


def _tools(record: dict[str, Any]) -> Any:
    """The tools of a record; some data sets hold them as a JSON string."""
    tools = record.get("tools")
    return json.loads(tools) if isinstance(tools, str) else tools


def data_fingerprint(config: SFTConfig, folder: Path) -> dict[str, str]:
    """Hashes of the files of conversations, for the stage's key. Raises SourceError for a missing one."""
    files = [name for name in config.data if name != DOCS_QUESTIONS]
    for name in files:
        if not (folder / name).is_file():
            raise SourceError(f"{folder / name}: there is no such file of conversations")
    return {name: hash_file(folder / name) for name in files}
