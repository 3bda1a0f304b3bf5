"""Store of fetched pages: WARC files, and a journal of the outcome of every address, so that a killed crawl resumes.

A page counts when its line stands in the journal. The line names how long its WARC file was then; on opening, whatever a
killed run wrote beyond that is cut off.
"""

from __future__ import annotations

import gzip
import json
import threading
import uuid
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bessemer.data.sources.http.fetch import Answer
from bessemer.data.sources.source import Unit

_JOURNAL, _COMPLETE = "journal.jsonl", "complete"
_FILE_BYTES = 512 << 20
#: The field in which a record keeps what its host said against training, for the reader of the WARC.
OPT_OUT_FIELD = "Bessemer-Opt-Out"


class PageStore:
    """A folder of fetched pages. One process writes, from any number of threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        #: What became of each address: `page`, or the kind of what went wrong, and why.
        self.outcomes: dict[str, tuple[str, str]] = {}
        lengths: dict[str, int] = {}
        for line in self._journal_lines():
            if self.is_complete or not _may_heal(line["outcome"]):
                self.outcomes[line["url"]] = (line["outcome"], line.get("why", ""))
            if "file" in line:
                lengths[line["file"]] = max(lengths.get(line["file"], 0), line["end"])
        for path in self.folder.glob("pages-*.warc.gz"):
            with path.open("r+b") as stream:
                stream.truncate(lengths.get(path.name, 0))
        self._journal = (folder / _JOURNAL).open("ab")

    def _journal_lines(self) -> list[dict[str, Any]]:
        lines, length = _journal(self.folder)
        path = self.folder / _JOURNAL
        if path.exists() and path.stat().st_size > length:
            # a killed run left half a line
            with path.open("r+b") as stream:
                stream.truncate(length)
        return lines

    @property
    def is_complete(self) -> bool:
        """Whether everything that was asked for has an outcome."""
        return (self.folder / _COMPLETE).exists()

    def complete(self) -> None:
        """Note that everything that was asked for has an outcome; not where nothing came, which a network may explain."""
        if self._files():
            (self.folder / _COMPLETE).touch()

    def add_page(self, url: str, answer: Answer, opt_out: str | None) -> None:
        """Keep a page under the address that was asked for."""
        self.add_member(url, gzip.compress(_record(url, answer, opt_out), 6, mtime=0))

    def add_member(self, url: str, member: bytes) -> None:
        """Keep a record as the whole gzip member that it is."""
        with self._lock:
            path = self._file()
            with path.open("ab") as stream:
                stream.write(member)
                end = stream.tell()
            self._note({"url": url, "outcome": "page", "file": path.name, "end": end})

    def add_failure(self, url: str, kind: str, why: str) -> None:
        """Note that an address brought no page."""
        with self._lock:
            self._note({"url": url, "outcome": kind, "why": why})

    def _note(self, line: dict[str, Any]) -> None:
        self.outcomes[line["url"]] = (line["outcome"], line.get("why", ""))
        self._journal.write(json.dumps(line, ensure_ascii=True).encode() + b"\n")
        self._journal.flush()

    def _file(self) -> Path:
        files = self._files()
        if files and files[-1].stat().st_size < _FILE_BYTES:
            return files[-1]
        return self.folder / f"pages-{len(files):05d}.warc.gz"

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("pages-*.warc.gz"))

    def units(self) -> list[Unit]:
        """The WARC files."""
        return [Unit(path.name, path.stat().st_size, ((path.name, path),)) for path in self._files()]

    def failures(self) -> Counter[str]:
        """How many addresses brought no page, by kind."""
        return Counter(kind for kind, _ in self.outcomes.values() if kind != "page")

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _journal(folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a journal, and how many bytes they are."""
    path = folder / _JOURNAL
    content = path.read_bytes() if path.exists() else b""
    length = content.rfind(b"\n") + 1
    return [json.loads(line) for line in content[:length].splitlines()], length


def failures_in(folder: Path) -> dict[str, tuple[str, str]]:
    """The addresses that brought no page, with the kind and the reason, in a store that is not being written."""
    outcomes = {line["url"]: (line["outcome"], line.get("why", "")) for line in _journal(folder)[0]}
    return {url: outcome for url, outcome in outcomes.items() if outcome[0] != "page"}


def _may_heal(outcome: str) -> bool:
    """Whether a failure may be the network's or a busy server's, so that a later run tries again."""
    return outcome in ("unreachable", "timed_out", "broken_answers", "status_429") or outcome.startswith("status_5")


def _record(url: str, answer: Answer, opt_out: str | None) -> bytes:
    """A WARC/1.1 response record; the body stands in it as it was expanded, so the headers about its coding go."""
    dropped = ("content-encoding", "transfer-encoding", "content-length", "connection")
    headers = [(name, value) for name, value in answer.headers if name.lower() not in dropped]
    head = f"HTTP/1.1 {answer.status} OK\r\n" + "".join(f"{name}: {_one_line(value)}\r\n" for name, value in headers)
    block = head.encode("latin-1", errors="replace") + f"Content-Length: {len(answer.body)}\r\n\r\n".encode() + answer.body
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    fields = {
        "WARC-Type": "response",
        "WARC-Record-ID": f"<urn:uuid:{uuid.uuid4()}>",
        "WARC-Date": now,
        "WARC-Target-URI": url,
        "Content-Type": "application/http; msgtype=response",
        "Content-Length": str(len(block)),
    }
    if opt_out:
        fields[OPT_OUT_FIELD] = opt_out
    named = "".join(f"{name}: {_one_line(value)}\r\n" for name, value in fields.items())
    return b"WARC/1.1\r\n" + named.encode() + b"\r\n" + block + b"\r\n\r\n"


def _one_line(value: str) -> str:
    return " ".join(value.split())
