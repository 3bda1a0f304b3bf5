"""Records (JSON objects, rows, dicts of a user's function) to documents, and bounded JSON parsing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from bessemer.core.errors import SourceError
from bessemer.core.hashing import hash_bytes
from bessemer.data.sources.document import Document, Tally, encodable
from bessemer.data.sources.io.archives import Entry
from bessemer.data.sources.io.cutting import bounded_lines

#: The longest record that is held in memory.
LONGEST_RECORD = 32 << 20

_RECORD_FIELDS = ("url", "license", "language")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def record_document(record: Mapping[str, Any], place: str, *, default_license: str | None = None) -> Document:
    """The document of a record (a JSONL line, or a dict that a user's function yields).

    `text` is needed; `id`, `url`, `license`, `language` and `metadata` are taken where present, and other plain
    values join the metadata. Raises SourceError naming `place` when there is no text.
    """
    text = record.get("text")
    if not isinstance(text, str):
        raise SourceError(f"{place}: a record needs a 'text' that is a string, got {type(text).__name__}")
    given = record.get("metadata")
    metadata = dict(given) if isinstance(given, Mapping) else {}
    metadata |= {key: value for key, value in record.items() if key not in ("id", "text", "metadata", *_RECORD_FIELDS)}
    plain = {
        encodable(str(key)): encodable(str(value)) for key, value in metadata.items() if isinstance(value, (str, int, float))
    }
    identity = None if record.get("id") is None else encodable(f"id:{record['id']}")
    fields: dict[str, Any] = {name: encodable(str(record[name])) for name in _RECORD_FIELDS if record.get(name) is not None}
    text = encodable(text)
    return Document(
        record_locator(identity, text),
        text,
        group=plain.get("package", identity),
        metadata=plain,
        **({"license": default_license} | fields),
    )


def record_locator(name: str | None, text: str) -> str:
    """The locator of a record: its name, where it has one, and its text.

    A name alone is not enough: shards that are each numbered from 0, and chunks that bear their document's id, repeat names.
    A file's name has no part in it, so that the same records spread over any number of files give the same documents.
    """
    return f"{name or 'text'}:{hash_bytes(text.encode())}"


def json_lines(
    entry: Entry, start: int, tally: Tally, limit: int = LONGEST_RECORD
) -> Iterator[tuple[int, dict[str, Any], str]]:
    """The objects of a file of JSON lines: the byte offset behind each, the object, its place for notes.

    A line that is too long, not JSON, nested too deeply or not an object is set aside.
    """
    with entry.open_text(start, tally) as stream:
        for begin, end, line in bounded_lines(stream, limit):
            place = f"{entry.place}: byte {begin}"
            if line is None:
                tally.set_aside("too_large", place, f"a line of {end - begin:,} bytes")
                continue
            text = decoded(line.removeprefix(_BYTE_ORDER_MARK) if begin == 0 else line, tally)
            if not text.strip():
                continue
            if not line.endswith(b"\n") and stream.damage is not None:
                # what the damage cut off is counted once, as damage
                break
            try:
                record = parse_json(text)
            except ValueError as error:
                tally.set_aside("bad_records", place, f"this line is not JSON ({error})")
                continue
            if isinstance(record, dict):
                yield end, record, place
            else:
                tally.set_aside("bad_records", place, f"a record needs to be a JSON object, got {type(record).__name__}")
        note_end(entry, stream.damage, stream.tell(), tally)


def parse_json(text: str | bytes) -> Any:
    """A JSON value. Raises ValueError, also for one nested too deeply or a number of thousands of digits."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def note_end(entry: Entry, damage: Any, size: int, tally: Tally) -> None:
    """Count what a reader finds out at the end of a file: that it was damaged, or empty."""
    if damage is not None:
        tally.set_aside(damage.kind, entry.place, f"{damage.why}; read to byte {size:,}")
    elif size == 0:
        tally.set_aside("empty_files", entry.place, "it is empty")


def decoded(line: bytes, tally: Tally) -> str:
    """A line as text, with its end as a single newline; bytes that are not UTF-8 become U+FFFD and are counted."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        text = line.decode("utf-8", errors="replace")
        tally.counts["undecodable_bytes"] += len(line) - len(line.decode("utf-8", errors="ignore").encode())
    return text[:-2] + "\n" if text.endswith("\r\n") else text
