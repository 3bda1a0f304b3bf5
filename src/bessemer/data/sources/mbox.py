"""Source `mbox`: archives of mailing lists, message by message."""

from __future__ import annotations

import contextlib
import email.header
import email.message
import email.parser
import email.policy
import email.utils
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bessemer.data.sources.io.archives import Entry
from bessemer.data.sources.io.file_source import SettingsFormat, bounded_lines, note_end
from bessemer.data.sources.io.streams import Stream
from bessemer.data.sources.markup import text_of_markup
from bessemer.data.sources.registry import MboxSource
from bessemer.data.sources.source import Document, PositionedDocument, Tally, encodable

#: The line that begins a message: `From`, an address, and a date with its time.
_FROM = re.compile(rb"From \S.*\d{1,2}:\d{2}")
_QUOTED_FROM = re.compile(rb"^>(>*From )", re.M)
_MESSAGE_ID = re.compile(r"<[^<>\s]+>")
_LONGEST_LINE = 1 << 20
#: Names and encodings of mail that are none of web pages.
_MAIL_CHARSETS = {
    "latin-1": "cp1252",
    "utf-7": "utf-7",
    "hz-gb-2312": "hz",
    "iso-2022-kr": "iso2022_kr",
    **{f"{prefix}{number}": f"cp{number}" for prefix in ("cp", "ibm") for number in ("437", "850", "852")},
}
_IN_ASCII = ("utf-7", "hz", "iso2022", "utf-16")
#: Headers by which a sender asks that a message is not kept.
_NO_ARCHIVE = ("x-no-archive", "x-no-archiving")


@dataclass(frozen=True)
class Mbox(SettingsFormat):
    """One document a message; a thread's messages share a split."""

    settings: MboxSource
    known: ClassVar[str] = ".mbox/.mbx or a list's .txt, plain, compressed or in archives"

    def reads(self, name: str) -> bool:
        return name.lower().endswith((".mbox", ".mbx", ".mbox.txt")) or name.lower().rpartition("/")[2] == "mbox"

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        with entry.open(start) as stream:
            for begin, end, message in _messages(stream, self.settings.max_document_bytes):
                place = f"{entry.place}: byte {begin:,}"
                if message is None:
                    tally.set_aside("too_large", place, f"a message of {end - begin:,} bytes")
                    continue
                try:
                    document = _document(message, f"{entry.name}#{begin}", entry, tally)
                except Exception as error:  # the standard library's parser raises many things over hostile headers
                    tally.set_aside("damaged_records", place, f"{type(error).__name__}: {error}")
                    continue
                if document is None:
                    tally.counts["messages_without_text"] += 1
                else:
                    yield end, document
            note_end(entry, stream.damage, stream.tell(), tally)


open_mbox = Mbox.open


def _messages(stream: Stream, limit: int) -> Iterator[tuple[int, int, bytes | None]]:
    """The messages of an mbox: begin, end, bytes without the `From ` line; None for one over `limit` bytes."""
    lines: list[bytes] = []
    begin: int | None = None
    size, after_blank, last = 0, True, stream.tell()
    for offset, end, line in bounded_lines(stream, _LONGEST_LINE):
        if line is not None and after_blank and _FROM.match(line):
            if begin is not None:
                yield begin, offset, b"".join(lines) if size <= limit else None
            begin, lines, size = offset, [], 0
        elif begin is not None:
            size += end - offset
            if line is None:
                size = max(size, limit + 1)
            elif size <= limit:
                lines.append(line)
            else:
                lines = []
        after_blank = line is not None and not line.strip()
        last = end
    if begin is not None:
        yield begin, last, b"".join(lines) if size <= limit else None


def _document(message: bytes, locator: str, entry: Entry, tally: Tally) -> Document | None:
    parsed = email.parser.BytesParser(policy=email.policy.compat32).parsebytes(_QUOTED_FROM.sub(rb"\1", message))
    text = _text(parsed)
    if not text:
        return None
    subject = _header(parsed, "Subject")
    identity = _MESSAGE_ID.search(_header(parsed, "Message-ID"))
    thread = _MESSAGE_ID.search(_header(parsed, "References") or _header(parsed, "In-Reply-To"))
    metadata = {"subject": subject, "date": _header(parsed, "Date"), "list": _header(parsed, "List-Id")}
    metadata = {name: value for name, value in metadata.items() if value} | {"file": entry.name}
    if any(_header(parsed, name).lower() == "yes" for name in _NO_ARCHIVE):
        metadata["opt_out"] = "no-archive"
        tally.counts["opted_out"] += 1
    named = identity[0] if identity else locator
    return Document(
        named, text, heading=subject, license=entry.license, group=thread[0] if thread else named, metadata=metadata
    )


def _header(message: email.message.Message, name: str) -> str:
    value = message.get(name)
    if value is None:
        return ""
    parts = email.header.decode_header(str(value).replace("\r", " ").replace("\n", " "))
    text = "".join(part if isinstance(part, str) else _decoded(part, charset or "utf-8") for part, charset in parts)
    return encodable(" ".join(text.split()))


def _text(message: email.message.Message) -> str:
    """The plain parts of a message, or its HTML where it has no other; attachments are left out."""
    plain, markup = [], []
    for part in message.walk():
        if part.is_multipart() or part.get_content_disposition() == "attachment":
            continue
        payload = part.get_payload(decode=True)
        if not isinstance(payload, bytes):
            continue
        text = _decoded(payload, _charset(part))
        if part.get_content_type() == "text/plain":
            plain.append(text)
        elif part.get_content_type() == "text/html":
            markup.append(text)
    text = "\n\n".join(plain) or "\n\n".join(map(text_of_markup, markup))
    lines = [line.rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    # a signature follows a line of two dashes and a space
    if "--" in lines:
        lines = lines[: len(lines) - 1 - lines[::-1].index("--")] if len(lines) - lines.index("--") <= 12 else lines
    return encodable(re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip())


def _charset(part: email.message.Message) -> str:
    """The encoding that a part declares. `get_content_charset` would decode an RFC 2231 value by the codec that it names."""
    stated = part.get_param("charset") or "utf-8"
    return stated[2] if isinstance(stated, tuple) else str(stated)


def _decoded(data: bytes, charset: str) -> str:
    from bessemer.data.extraction.extract import codec_of

    label = charset.strip().lower()
    codec = _MAIL_CHARSETS.get(label) or codec_of(label) or "utf-8"
    # bytes in other encodings are hardly ever UTF-8 by chance, but for those that write everything in ASCII
    names = (codec, "utf-8") if codec.startswith(_IN_ASCII) else ("utf-8", codec)
    for name in names:
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode(name)
    return data.decode(codec, errors="replace")
