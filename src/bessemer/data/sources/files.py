"""Sources `files` (`.txt`, `.md`, `.jsonl`) and `chats` (conversations as JSON lines), plain, compressed, or in archives.

A text file is one document, or several cut at blank lines where it is long; each is named by the file's path below the
source's root and its byte offset. A JSONL record is named by its `id`, where it has one, and its text, so that the same
records spread over any number of files give the same documents. Chats are read in the forms that chat data sets use.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from bessemer.core.errors import SourceError
from bessemer.data.sources.io.archives import Entry, is_archive
from bessemer.data.sources.io.file_source import (
    FileSource,
    SettingsFormat,
    decoded,
    json_lines,
    note_end,
    record_document,
    record_locator,
)
from bessemer.data.sources.io.paths import COMPRESSIONS, uncompressed_name
from bessemer.data.sources.io.streams import Stream
from bessemer.data.sources.registry import ChatsSource, FilesSource
from bessemer.data.sources.source import Document, PositionedDocument, Tally, encodable

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl",)
#: A paragraph stays whole, unless it is so long that it may be no text at all; then it is cut here.
_LONGEST_PARAGRAPH = 16 << 20
#: Of a record without a text: how many of its fields are named.
_NAMED_FIELDS = 20
_KNOWN = (
    "/".join((*TEXT_SUFFIXES, *RECORD_SUFFIXES))
    + f", plain, with {' or '.join(COMPRESSIONS)}, or in an archive such as .zip or .tar.gz"
)


@dataclass(frozen=True)
class TextFiles(SettingsFormat):
    """Text and JSONL."""

    settings: FilesSource
    longest_paragraph: int = _LONGEST_PARAGRAPH
    known: ClassVar[str] = _KNOWN

    def reads(self, name: str) -> bool:
        return _suffix(name) in TEXT_SUFFIXES + RECORD_SUFFIXES

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        replaced = tally.counts["undecodable_bytes"]
        if _suffix(entry.name) in TEXT_SUFFIXES:
            with entry.open_text(start, tally) as stream:
                yield from self._text_documents(stream, entry, start, tally)
                note_end(entry, stream.damage, stream.tell(), tally)
        else:
            for position, record, place in json_lines(entry, start, tally):
                try:
                    document = record_document(record, place, default_license=entry.license)
                except SourceError as error:
                    tally.set_aside("bad_records", place, str(error).removeprefix(f"{place}: ") + _instead_of_text(record))
                else:
                    yield position, document
        if (here := tally.counts["undecodable_bytes"] - replaced) > 0:
            tally.set_aside("files_with_undecodable_bytes", entry.place, f"{here} bytes are not UTF-8 and were replaced")

    def _text_documents(self, stream: Stream, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        """Cut at the last blank line before a document would be longer than `max_document_bytes`."""
        offset, pending_bytes = start, 0
        # whole paragraphs, their blank lines behind them
        pending: list[str] = []
        paragraph: list[str] = []
        paragraph_bytes = 0

        while line := stream.readline(self.longest_paragraph):
            while not line.endswith(b"\n") and (following := stream.peek(1)[:1]) and 0x80 <= following[0] < 0xC0:
                # reads on to the end of a character that the limit cut
                line += stream.read(1)
            text = decoded(line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line, tally)
            offset += len(line)
            paragraph.append(text)
            paragraph_bytes += len(line)
            if is_cut := paragraph_bytes >= self.longest_paragraph:
                tally.set_aside("cut_paragraphs", f"{entry.place}: byte {offset - paragraph_bytes}", "this paragraph was cut")
            if is_cut or not text.strip():
                if pending and pending_bytes + paragraph_bytes > self.settings.max_document_bytes:
                    yield start + pending_bytes, _text_document(entry, start, pending)
                    start, pending, pending_bytes = start + pending_bytes, [], 0
                pending += paragraph
                pending_bytes += paragraph_bytes
                paragraph, paragraph_bytes = [], 0
        if pending and pending_bytes + paragraph_bytes > self.settings.max_document_bytes:
            yield start + pending_bytes, _text_document(entry, start, pending)
            start, pending = start + pending_bytes, []
        if pending or paragraph:
            yield offset, _text_document(entry, start, pending + paragraph)


def _instead_of_text(record: Mapping[str, Any]) -> str:
    """End of a message about a record without `text`: its fields, and the setting that reads the longest of them."""
    if "text" in record or not record:
        return ""
    fields = ", ".join(map(repr, list(record)[:_NAMED_FIELDS]))
    lengths = {name: len(value) for name, value in record.items() if isinstance(value, str)}
    longest = max(lengths, key=lambda name: lengths[name], default=None)
    remedy = "" if longest is None else f", and {{source: tables, columns: {{text: {longest}}}}} reads {longest!r}"
    return f"; it has {fields}{remedy}"


def _text_document(entry: Entry, start: int, lines: list[str]) -> Document:
    text = "".join(lines).strip("\n")
    metadata = {"file": entry.name, "offset": str(start)}
    return Document(f"{entry.name}#{start}", text, license=entry.license, group=entry.name, metadata=metadata)


@dataclass(frozen=True)
class Files(FileSource):
    """The source `files`, whose fingerprint knows that records are not named after their files."""

    def _stable_name(self, name: str) -> str:
        return "" if not is_archive(name) and _suffix(uncompressed_name(name)) in RECORD_SUFFIXES else name


def open_files(settings: FilesSource, folder: Path, cache: Path) -> Files:
    """The source `files` over the paths of its settings, relative to `folder`."""
    return Files(tuple(settings.paths), folder, TextFiles(settings), settings.license)


def may_hold_records(paths: list[str], folder: Path) -> bool:
    """Whether any of the files is, or is an archive that may hold, JSONL."""
    units = open_files(FilesSource(paths=paths), folder, folder).units()
    return any(
        is_archive(name) or _suffix(uncompressed_name(name)) in RECORD_SUFFIXES for unit in units for name, _ in unit.files
    )


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


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
class Chats(SettingsFormat):
    """One document a conversation; `messages` names the list in each record, the usual names where it is None."""

    settings: ChatsSource
    known: ClassVar[str] = ".jsonl/.ndjson, plain, compressed or in archives"

    def reads(self, name: str) -> bool:
        return name.lower().endswith((".jsonl", ".ndjson"))

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        for position, record, place in json_lines(entry, start, tally, self.settings.max_document_bytes):
            keys = (self.settings.messages,) if self.settings.messages else _LIST_KEYS
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


open_chats = Chats.open


def conversation_text(messages: list[Any]) -> str:
    """Messages as paragraphs, `Speaker: words`; what is not a message with words is left out."""
    turns = []
    for message in messages:
        if isinstance(message, str):
            turns.append(message.strip())
        elif isinstance(message, Mapping):
            words = next((value for key in _WORDS_KEYS if (value := _words(message.get(key)))), "")
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
        # some exports hold the author as an object
        if isinstance(speaker, Mapping):
            speaker = speaker.get("role") or speaker.get("name") or speaker.get("username")
        if isinstance(speaker, str) and speaker.strip():
            return _SPEAKERS.get(speaker.strip().lower(), speaker.strip().capitalize())
    return "Message"


def _plain(value: Any) -> str | None:
    return encodable(value) if isinstance(value, str) and value else None
