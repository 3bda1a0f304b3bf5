"""Sources of papers: `latex` (arXiv's tar files, folders or archives of one paper) and `pdf` (the text layer, page by page).

LaTeX: the main file (with the `document` environment) is found, its inputs are put in place, comments, preamble and
bibliography are taken out; the mathematics stays as it is. Scanned pages of a PDF hold no text; they are counted.
"""

from __future__ import annotations

import io
import posixpath
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from bessemer.core.object_storage import Place
from bessemer.data.limited import RefusedError
from bessemer.data.sources.io.archives import Entry
from bessemer.data.sources.io.file_source import SettingsFormat
from bessemer.data.sources.registry import LatexSource, PdfSource
from bessemer.data.sources.source import Document, PositionedDocument, Tally, encodable

_TEX = (".tex", ".ltx", ".latex")
_ARXIV = re.compile(r"(\d{4}\.\d{4,5}(?:v\d+)?|[a-z-]+(?:\.[A-Z]{2})?\d{7}(?:v\d+)?)$")
_BEGIN, _END = re.compile(r"\\begin\s*\{document\}"), re.compile(r"\\end\s*\{document\}")
_CLASS = re.compile(r"^[^%\n]*\\document(?:class|style)\b", re.M)
_INPUT = re.compile(
    r"\\(?:input|include|subfile)\s*(?:\{([^{}\n]{1,300})\}|([^\s{}\\%]{1,300}))"
    r"|\\(?:sub)?import\*?\s*\{([^{}\n]{0,300})\}\s*\{([^{}\n]{1,300})\}"
)
_TITLE = re.compile(r"\\title\s*(?:\[[^\]]{0,500}\])?\s*\{")
_COMMENT = re.compile(r"(?<!\\)((?:\\\\)*)%.*")
_VERBATIM = re.compile(r"(\\begin\{(verbatim\*?|lstlisting|minted|comment)\}.*?\\end\{\2\})", re.S)
_BIBLIOGRAPHY = re.compile(r"\\begin\{thebibliography\}.*?(?:\\end\{thebibliography\}|\Z)", re.S)
_WITHOUT_TEXT = re.compile(
    r"\\(?:bibliography|bibliographystyle|label|includegraphics(?:\s*\[[^\]]{0,500}\])?|vspace\*?|hspace\*?|pagestyle"
    r"|thispagestyle)\s*\{[^{}]{0,500}\}|\\(?:maketitle|tableofcontents|newpage|clearpage|noindent|printbibliography)\b[ \t]*"
)
_MOST_DEPTH, _MOST_INPUTS, _LARGEST_INPUT = 16, 2000, 16 << 20
_USUAL_NAMES = ("main", "ms", "paper", "article", "manuscript", "arxiv")

#: From a name to a file's text; None where there is no such file.
_Lookup = Callable[[str], str | None]


@dataclass(frozen=True)
class Latex(SettingsFormat):
    """One document a paper: a .tex file with what it inputs, or an archive of one paper (tars hold papers as members)."""

    settings: LatexSource
    known: ClassVar[str] = ".tex, a paper's .tar.gz/.tgz/.zip or arXiv's .gz, or tars of them"
    small: ClassVar[bool] = True
    archives: ClassVar[tuple[str, ...]] = (".tar",)

    def reads(self, name: str) -> bool:
        suffix = PurePosixPath(name).suffix.lower()
        return suffix in (*_TEX, ".tar", ".zip") or (_ARXIV.search(name) is not None and suffix != ".pdf")

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        data = None if start else entry.content(self.settings.max_file_bytes, tally)
        if data is None:
            return
        folder = entry.path.parent if entry.path and entry.name.lower().endswith(_TEX) else None
        limits = (self.settings.max_file_bytes, self.settings.max_document_bytes)
        try:
            paper = entry.around.helpers.call(
                read_paper, self.settings.seconds, data, PurePosixPath(entry.name).name, folder, limits
            )
        except RefusedError as refused:
            tally.set_aside(refused.kind, entry.place, str(refused))
            return
        if paper is None:
            tally.counts["files_that_are_no_paper"] += 1
            return
        body, title = paper
        if not body:
            tally.set_aside("files_without_text", entry.place, "nothing stands in its document")
            return
        identity = re.sub(r"\.(tar|zip|tex|ltx|latex)$", "", entry.name, flags=re.I)
        metadata = {"file": entry.name} | ({"title": title} if title else {})
        if number := _ARXIV.search(identity):
            metadata["arxiv"] = number[1]
        url = f"https://arxiv.org/abs/{number[1]}" if number else None
        yield 1, Document(identity, body, heading=title, url=url, license=entry.license, metadata=metadata)


open_latex = Latex.open


def read_paper(data: bytes, name: str, folder: Place | None, limits: tuple[int, int]) -> tuple[str, str] | None:
    """The body and title of a submission: a tar, a zip or a single file, `name`, that inputs others from `folder`.

    `limits`: bytes of each file in it, and of the whole text. None where nothing in it is a paper.
    Raises ValueError and what archives raise when it is damaged or too long.
    """
    max_file_bytes, max_document_bytes = limits
    sources = _sources(data, name, max_file_bytes)
    main = _main_file(sources)
    if main is None:
        return None
    lookup = _Files(sources, folder)
    text = _inputs_replaced(_without_comments(sources[main]), posixpath.dirname(main), lookup, max_document_bytes)
    if len(text.encode(errors="replace")) > max_document_bytes:
        raise ValueError(f"over {max_document_bytes:,} bytes with what it inputs")
    return _body(text), _title(text)


def _sources(data: bytes, name: str, max_bytes: int) -> dict[str, str]:
    """The texts in a submission by their names."""
    if data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            wanted = [info for info in archive.infolist() if info.filename.lower().endswith(_TEX)]
            return {posixpath.normpath(info.filename): _text(archive.open(info).read(max_bytes)) for info in wanted}
    if data[257:262] == b"ustar":
        sources = {}
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                stream = tar.extractfile(member) if member.isreg() and member.name.lower().endswith(_TEX) else None
                if stream is not None and not member.issparse():
                    sources[posixpath.normpath(member.name)] = _text(stream.read(max_bytes))
        return sources
    return {name: _text(data)} if b"\\" in data else {}


def _text(data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        # the encoding of old papers
        text = data.decode("cp1252", errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


@dataclass(frozen=True)
class _Files:
    """The files that a paper can input: of its archive, or of the folder in which a single file lies."""

    sources: dict[str, str]
    folder: Place | None

    def __call__(self, name: str) -> str | None:
        for candidate in (name, f"{name}.tex"):
            normal = posixpath.normpath(candidate)
            if normal.startswith(("..", "/")):
                return None
            if normal in self.sources:
                return self.sources[normal]
            if self.folder is not None and normal.lower().endswith(_TEX) and self._lies_below(path := self.folder / normal):
                return _text(path.read_bytes()[:_LARGEST_INPUT])
        return None

    def _lies_below(self, path: Place) -> bool:
        """Whether it is a file of the paper's folder, also when links are followed."""
        if not (isinstance(path, Path) and isinstance(self.folder, Path)):
            # objects have no links
            return path.is_file()
        return path.is_file() and self.folder is not None and path.resolve().is_relative_to(self.folder.resolve())


def _main_file(sources: dict[str, str]) -> str | None:
    """The file that is compiled: with a class and a document, not a part of another, of a usual name, then the longest."""
    candidates = [name for name, text in sources.items() if _BEGIN.search(text) and _CLASS.search(text)]
    if not candidates:
        return None
    inputs = {posixpath.splitext(match[1] or match[2] or "")[0] for text in sources.values() for match in _INPUT.finditer(text)}

    def rank(name: str) -> tuple[bool, bool, int, str]:
        stem = posixpath.splitext(posixpath.basename(name))[0].lower()
        return posixpath.splitext(name)[0] in inputs, stem not in _USUAL_NAMES, -len(sources[name]), name

    return min(candidates, key=rank)


def _inputs_replaced(text: str, folder: str, lookup: _Lookup, limit: int) -> str:
    """The text with the files that it inputs in their places, to a depth and a size that no paper reaches. A stack of what is
    left to write takes recursion's place."""
    parts: list[str] = []
    size = inputs = 0
    waiting: list[tuple[str, int]] = [(text, 0)]
    while waiting and size <= limit:
        current, depth = waiting.pop()
        match = _INPUT.search(current) if depth < _MOST_DEPTH and inputs < _MOST_INPUTS else None
        if match is None:
            parts.append(current)
            size += len(current)
            continue
        parts.append(current[: match.start()])
        size += match.start()
        waiting.append((current[match.end() :], depth))
        braced, bare, path, imported = match.groups()
        name = (braced or bare or posixpath.join(path or "", imported or "")).strip().strip('"')
        content = lookup(name) if not folder else (lookup(posixpath.join(folder, name)) or lookup(name))
        if content is not None:
            inputs += 1
            inner = _without_comments(content)
            # a subfile has a preamble of its own
            begin, end = _BEGIN.search(inner), _END.search(inner)
            waiting.append((inner[begin.end() if begin else 0 : end.start() if end else None], depth + 1))
    return "".join(parts)


def _without_comments(text: str) -> str:
    """The text without `%` and what follows it; a line that was all comment goes with its end. Listings are left alone."""
    parts = _VERBATIM.split(text)
    kept = []
    for number in range(0, len(parts), 3):
        lines = []
        for line in parts[number].split("\n"):
            bare = _COMMENT.sub(r"\1", line)
            if bare.strip() or not line.strip():
                lines.append(bare.rstrip() if bare != line else line)
        kept.append("\n".join(lines))
        if number + 2 < len(parts) and parts[number + 2] != "comment":
            kept.append(parts[number + 1])
    return "".join(kept)


def _body(text: str) -> str:
    begin = _BEGIN.search(text)
    body = text[begin.end() if begin else 0 :]
    end = _END.search(body)
    body = _BIBLIOGRAPHY.sub("", body[: end.start()] if end else body)
    lines = [line.rstrip() for line in _WITHOUT_TEXT.sub("", body).split("\n")]
    return encodable(re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip())


def _title(text: str) -> str:
    r"""What `\title{…}` holds, its commands left out."""
    match = _TITLE.search(text)
    if match is None:
        return ""
    depth, end = 1, match.end()
    while end < len(text) and depth and end - match.end() < 2000:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    title = re.sub(r"\\(?:thanks|footnote)\s*\{[^{}]*\}", "", text[match.end() : end - 1])
    title = re.sub(r"\\\\(?:\[[^\]]{0,20}\])?|\\[a-zA-Z]+\*?", " ", title)
    return encodable(" ".join(title.replace("{", "").replace("}", "").split()))


_DESCRIBED = {"Title": "title", "Author": "author", "CreationDate": "created"}
_MOST_PAGES = 20_000
#: A word cut at a line's end: pdfium marks the hyphen with U+FFFE, or leaves it.
_CUT_WORD = re.compile(r"(?<=[^\W\d_])(?:\ufffe|\xad|[-‐]\n(?=[a-z]))\n?")


@dataclass(frozen=True)
class Pdf(SettingsFormat):
    """One document a file."""

    settings: PdfSource
    known: ClassVar[str] = ".pdf"
    small: ClassVar[bool] = True

    def reads(self, name: str) -> bool:
        return name.lower().endswith(".pdf")

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        data = None if start else entry.content(self.settings.max_file_bytes, tally)
        if data is None:
            return
        try:
            pages, metadata, is_whole = entry.around.helpers.call(
                pages_of_pdf, self.settings.seconds, data, self.settings.max_document_bytes
            )
        except RefusedError as refused:
            if "password" in str(refused).lower():
                tally.set_aside("encrypted_files", entry.place, "it needs a password")
            else:
                tally.set_aside(refused.kind, entry.place, str(refused))
            return
        text = "\n\n".join(page for page in pages if page)
        if not text:
            tally.set_aside("files_without_text", entry.place, f"none of its {len(pages)} pages has text; scanned?")
            return
        if not is_whole:
            tally.set_aside("cut_documents", entry.place, f"its text was cut after page {len(pages)}")
        described = {"file": entry.name, "pages": str(len(pages))} | metadata
        yield 1, Document(entry.name, text, license=entry.license, metadata=described)


open_pdf = Pdf.open


def pages_of_pdf(data: bytes, max_bytes: int) -> tuple[list[str], dict[str, str], bool]:
    """The text of each page, what the file says about itself, and whether that is all of it or `max_bytes` were reached."""
    import pypdfium2

    document = pypdfium2.PdfDocument(data)
    try:
        said = document.get_metadata_dict()
        metadata = {ours: encodable(said[theirs]) for theirs, ours in _DESCRIBED.items() if said.get(theirs)}
        pages: list[str] = []
        size = 0
        for number in range(len(document)):
            if size > max_bytes or number >= _MOST_PAGES:
                return pages, metadata, False
            pages.append(_page_text(document, number))
            size += len(pages[-1].encode())
        return pages, metadata, True
    finally:
        document.close()


def _page_text(document: Any, number: int) -> str:
    try:
        page = document[number]
        text = page.get_textpage().get_text_range(errors="ignore")
    except Exception:  # pdfium's own, for a damaged page: the others may be whole
        return ""
    page.close()
    lines = [line.rstrip() for line in _CUT_WORD.sub("", encodable(text.replace("\r\n", "\n"))).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
