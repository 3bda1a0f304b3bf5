"""Source `files`: `.txt`, `.md` and `.jsonl`, plain or compressed as `.gz` or `.zst`.

A text file is one document, or several cut at blank lines where it is long; each is named by the file's path below
the source's root and its byte offset. A JSONL record is named by its `id`, or by its text where it has none, so that
the same records spread over any number of files give the same documents.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import zstandard

from bessemer.core.errors import SourceError
from bessemer.core.hashing import hash_bytes, hash_file
from bessemer.data.sources.document import Document, Tally, encodable

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl",)
_COMPRESSED = (".gz", ".zst")
_KNOWN = "/".join((*TEXT_SUFFIXES, *RECORD_SUFFIXES)) + ", plain or with " + " or ".join(_COMPRESSED)
_RECORD_FIELDS = ("url", "license", "language")


def find_files(paths: list[str], folder: Path) -> dict[str, Path]:
    """The files that paths, folders and patterns mean, by their name below the source's root, sorted by it.

    The root is the deepest folder that holds everything named, whatever a pattern or a folder turns out to hold.
    Raises SourceError for a path that does not exist, a file of an unknown kind, or a pattern without matches.
    """
    roots, found = [], set()
    for path in paths:
        full = Path(os.path.normpath(folder.resolve() / path))
        if full.is_dir():
            matches = {file for file in full.rglob("*") if file.is_file() and _kind(file)}
            roots.append(full)
        elif full.is_file():
            if not _kind(full):
                raise SourceError(f"{path}: not a kind of file that the source reads ({_KNOWN})")
            matches = {full}
            roots.append(full.parent)
        else:
            fixed = _fixed_part(full)
            if fixed == full:
                raise SourceError(f"{path}: no such file or folder")
            pattern = full.relative_to(fixed).as_posix()
            matches = {file for file in fixed.glob(pattern) if file.is_file() and _kind(file)}
            roots.append(fixed)
        if not matches:
            raise SourceError(f"{path}: holds no file that the source reads ({_KNOWN})")
        found |= matches
    root = Path(os.path.commonpath(roots))
    return dict(sorted((encodable(file.relative_to(root).as_posix()), file) for file in found))


def files_fingerprint(paths: list[str], folder: Path) -> list[list[str]]:
    """The content of the matched files: the hash of each, with its name below the root where documents are named by it."""
    return sorted(
        ["" if _kind(file) in RECORD_SUFFIXES else name, hash_file(file)] for name, file in find_files(paths, folder).items()
    )


def read_files(paths: list[str], folder: Path, max_document_bytes: int, tally: Tally) -> Iterator[Document]:
    """The documents of the source. Bytes that are not UTF-8 are replaced, counted and reported.

    Raises SourceError for a damaged archive or a line that is not a JSON object with a `text`.
    """
    for name, file in find_files(paths, folder).items():
        tally.files += 1
        tally.bytes += file.stat().st_size
        with _opened(file) as stream:
            replaced = tally.counts["undecodable_bytes"]
            if _kind(file) in TEXT_SUFFIXES:
                yield from _text_documents(stream, _uncompressed_name(name), max_document_bytes, tally)
            else:
                yield from _records(stream, file, tally)
            if (here := tally.counts["undecodable_bytes"] - replaced) > 0:
                tally.counts["files_with_undecodable_bytes"] += 1
                tally.notes.append(f"{name}: {here} bytes are not UTF-8 and were replaced")


def record_document(record: Mapping[str, Any], place: str) -> Document:
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
    identity = record.get("id")
    fields: dict[str, Any] = {name: encodable(str(record[name])) for name in _RECORD_FIELDS if record.get(name) is not None}
    text = encodable(text)
    return Document(
        f"text:{hash_bytes(text.encode())}" if identity is None else encodable(f"id:{identity}"),
        text,
        group=plain.get("package"),
        metadata=plain,
        **fields,
    )


def _records(stream: IO[bytes], file: Path, tally: Tally) -> Iterator[Document]:
    for number, line in enumerate(stream, start=1):
        text = _decoded(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, tally)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise SourceError(f"{file}:{number}: this line is not JSON ({error})") from None
        if not isinstance(record, dict):
            raise SourceError(f"{file}:{number}: a record needs to be a JSON object, got {type(record).__name__}")
        yield record_document(record, f"{file}:{number}")


def _text_documents(stream: IO[bytes], name: str, max_bytes: int, tally: Tally) -> Iterator[Document]:
    """Cut at the last blank line before a document would be longer than `max_bytes`; a longer paragraph stays whole."""
    start = offset = pending_bytes = 0
    pending: list[str] = []  # whole paragraphs, their blank lines behind them
    paragraph: list[str] = []
    paragraph_bytes = 0

    for line in stream:
        text = _decoded(line.removeprefix(b"\xef\xbb\xbf") if offset == 0 else line, tally)
        offset += len(line)
        paragraph.append(text)
        paragraph_bytes += len(line)
        if not text.strip():
            if pending and pending_bytes + paragraph_bytes > max_bytes:
                yield _text_document(name, start, pending)
                start, pending, pending_bytes = start + pending_bytes, [], 0
            pending += paragraph
            pending_bytes += paragraph_bytes
            paragraph, paragraph_bytes = [], 0
    if pending and pending_bytes + paragraph_bytes > max_bytes:
        yield _text_document(name, start, pending)
        start, pending = start + pending_bytes, []
    yield _text_document(name, start, pending + paragraph)


def _text_document(name: str, start: int, lines: list[str]) -> Document:
    return Document(f"{name}#{start}", "".join(lines).strip("\n"), group=name, metadata={"file": name, "offset": str(start)})


def _decoded(line: bytes, tally: Tally) -> str:
    """A line as text, with its end as a single newline; bytes that are not UTF-8 become U+FFFD and are counted."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        text = line.decode("utf-8", errors="replace")
        tally.counts["undecodable_bytes"] += len(line) - len(line.decode("utf-8", errors="ignore").encode())
    return text[:-2] + "\n" if text.endswith("\r\n") else text


@contextmanager
def _opened(file: Path) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a file. Raises SourceError, also while reading, when its compression is damaged."""
    try:
        with file.open("rb") as raw:
            if file.suffix == ".gz":
                yield io.BufferedReader(gzip.GzipFile(fileobj=raw))  # type: ignore[type-var]
            elif file.suffix == ".zst":
                reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                yield io.BufferedReader(reader)  # type: ignore[type-var]
            else:
                yield raw
    except (gzip.BadGzipFile, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise SourceError(f"{file}: damaged or cut off {file.suffix} file ({error})") from None


def _kind(file: Path) -> str | None:
    suffix = Path(_uncompressed_name(file.name)).suffix
    return suffix if suffix in TEXT_SUFFIXES + RECORD_SUFFIXES else None


def _uncompressed_name(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in _COMPRESSED if name.endswith(suffix)), name)


def _fixed_part(pattern: Path) -> Path:
    """The leading folders of a path that hold no wildcard."""
    parts = []
    for part in pattern.parts:
        if any(wildcard in part for wildcard in "*?["):
            break
        parts.append(part)
    return Path(*parts)
