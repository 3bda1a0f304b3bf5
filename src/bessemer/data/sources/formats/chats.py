"""Source `chats`: conversations as JSON lines, in the forms that chat data sets use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bessemer.data.sources.config import ChatsSource
from bessemer.data.sources.document import Document, Tally, encodable
from bessemer.data.sources.formats.records import json_lines, record_locator
from bessemer.data.sources.io.archives import ARCHIVES, Entry
from bessemer.data.sources.io.tree import FileSource, file_source
from bessemer.data.sources.source import PositionedDocument

#: Where a message keeps its speaker and its words: OpenAI's and TRL's names, ShareGPT's, and those of chat exports.
_SPEAKER_KEYS = ("role", "from", "author", "user", "speaker", "name")
_WORDS_KEYS = ("content", "value", "text", "message")
_SPEAKERS = {
    "human": "User",
    "user": "User",
    "prompter": "User",
    "gpt": "Assistant",
    "assistant": "Assistant",
    "bot": "Assistant",
}
_LIST_KEYS = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns")


@dataclass(frozen=True)
class Chats:
    """One document a conversation; `messages` names the list in each record, the usual names where it is None."""

    max_document_bytes: int
    messages: str | None = None
    known: str = ".jsonl/.ndjson, plain, compressed or in archives"
    small: bool = False
    archives: tuple[str, ...] = field(default=ARCHIVES)

    def reads(self, name: str) -> bool:
        return name.lower().endswith((".jsonl", ".ndjson"))

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        for position, record, place in json_lines(entry, start, tally, self.max_document_bytes):
            keys = (self.messages,) if self.messages else _LIST_KEYS
            messages = next((record[key] for key in keys if isinstance(record.get(key), list)), None)
            if messages is None:
                tally.set_aside("bad_records", place, f"no list of messages under {' or '.join(keys)}")
                continue
            text = conversation_text(messages)
            if not text:
                tally.set_aside("bad_records", place, "a conversation in which nobody says anything")
                continue
            identity = next(
                (encodable(f"id:{record[key]}") for key in ("id", "conversation_id", "uuid") if record.get(key) is not None),
                None,
            )
            plain = {
                encodable(key): encodable(str(value))
                for key, value in record.items()
                if isinstance(value, (str, int, float)) and key not in ("id", "license", "language", "url")
            }
            yield (
                position,
                Document(
                    record_locator(identity, text),
                    text,
                    url=_plain(record.get("url")),
                    license=_plain(record.get("license")) or entry.license,
                    language=_plain(record.get("language")),
                    group=identity,
                    metadata=plain | {"messages": str(len(messages))},
                ),
            )


def open_chats(settings: ChatsSource, folder: Path, cache: Path) -> FileSource:
    """The source `chats` over the paths of its settings, relative to `folder`."""
    return file_source(settings, folder, Chats(settings.max_document_bytes, settings.messages))


def conversation_text(messages: list[Any]) -> str:
    """Messages as paragraphs, `Speaker: words`; what is not a message with words is left out."""
    turns = []
    for message in messages:
        if isinstance(message, str):
            turns.append(message.strip())
        elif isinstance(message, Mapping):
            words = next((found for key in _WORDS_KEYS if (found := _words(message.get(key)))), "")
            if words:
                turns.append(f"{_speaker(message)}: {words}")
    return encodable("\n\n".join(turn for turn in turns if turn))


def _words(content: Any) -> str:
    """The words of a message, also where they are a list of parts, of which images and calls have none."""
    if isinstance(content, str):
        return content.strip()
    if isinstance(content, list):
        parts = (part.get("text") if isinstance(part, Mapping) else part for part in content)
        return "\n\n".join(part.strip() for part in parts if isinstance(part, str) and part.strip())
    return ""


def _speaker(message: Mapping[str, Any]) -> str:
    for key in _SPEAKER_KEYS:
        speaker = message.get(key)
        # exports hold an author as an object
        if isinstance(speaker, Mapping):
            speaker = speaker.get("role") or speaker.get("name") or speaker.get("username")
        if isinstance(speaker, str) and speaker.strip():
            return _SPEAKERS.get(speaker.strip().lower(), speaker.strip().capitalize())
    return "Message"


def _plain(value: Any) -> str | None:
    return encodable(value) if isinstance(value, str) and value else None
