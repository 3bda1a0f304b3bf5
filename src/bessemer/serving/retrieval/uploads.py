"""Clients' files: taken from a form, kept on disk, and read into documents to index.

A file lies in a folder of its own, `ID/`, under a name of ours: `uploaded-file` and the suffix by which a source reads it.
Nobody's names or paths are opened.
"""

from __future__ import annotations

import re
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import TYPE_CHECKING, Any

from bessemer.core.errors import ArtefactError, SourceError
from bessemer.core.store import read_json, write_json
from bessemer.serving.config import UPLOADED_BYTES, UPLOADS
from bessemer.serving.runtime.bodies import ApiError

if TYPE_CHECKING:
    from bessemer.retrieval.chunks import Box
    from bessemer.retrieval.index import IndexedDocument

_MIB = 2**20
_ABOUT, _CONTENT = "file.json", "uploaded-file"
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,12}")
#: Most characters of a file's name.
_NAME_CHARACTERS = 255
#: Most characters that a file may hold as text: a small file may unfold to much.
_TEXT_CHARACTERS = 20_000_000


@dataclass(frozen=True)
class FormPart:
    """A part of a form. filename: of a file; empty for a field."""

    content: bytes
    filename: str = ""


def read_form(content_type: str, body: bytes) -> dict[str, FormPart]:
    """The parts of a form by name (`multipart/form-data`, RFC 7578). Raises ApiError (400) for anything else."""
    header = Message()
    header["content-type"] = content_type
    boundary = header.get_param("boundary")
    if header.get_content_type() != "multipart/form-data" or not isinstance(boundary, str) or not boundary:
        raise ApiError("the body must be a form (multipart/form-data) with the fields file and purpose")
    parts: dict[str, FormPart] = {}
    for piece in (b"\r\n" + body).split(b"\r\n--" + boundary.encode())[1:]:
        if piece.startswith(b"--"):
            return parts
        head, gap, content = piece.partition(b"\r\n\r\n")
        about = Parser().parsestr(head.decode("utf-8", "replace").lstrip("\r\n \t"))
        name = about.get_param("name", header="content-disposition")
        if not gap or not isinstance(name, str):
            break
        parts[name] = FormPart(content, _plain_name(about.get_filename()))
    raise ApiError("the form is not whole: a part has no name, or its end is missing")


def _plain_name(given: str | None) -> str:
    """A file's name without folders and control characters. Browsers escape its quotation marks."""
    name = PurePosixPath((given or "").replace("%22", '"').replace("\\", "/")).name
    return "".join(character for character in name if character.isprintable())[:_NAME_CHARACTERS]


@dataclass(frozen=True)
class Upload:
    """A client's file. owner: the client's id. size: in bytes. created: seconds since 1970."""

    id: str
    owner: str
    filename: str
    size: int
    created: int
    purpose: str

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's form of it."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.size,
            "created_at": self.created,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }


class Uploads:
    """The files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = Lock()
        self._files = {upload.id: upload for upload in _kept(folder)}

    def add(self, owner: str, filename: str, content: bytes, purpose: str) -> Upload:
        """Keep a file. Raises ApiError (400) for an empty one, and for a key's files beyond their limits."""
        if not content:
            raise ApiError("file: it is empty", parameter="file", code="invalid_value")
        upload = Upload(f"file-{uuid.uuid4().hex}", owner, filename or "file", len(content), int(time.time()), purpose)
        with self._lock:
            own = [file for file in self._files.values() if file.owner == owner]
            if len(own) >= UPLOADS.most:
                raise ApiError(f"file: {UPLOADS.most:,} files are kept for a key; delete some", parameter="file")
            if sum(file.size for file in own) + upload.size > UPLOADED_BYTES.most * _MIB:
                raise ApiError(f"file: {UPLOADED_BYTES.most:,} MiB are kept for a key; delete some", parameter="file")
            folder = self._folder / upload.id
            folder.mkdir(parents=True)
            self.path(upload).write_bytes(content)
            write_json(folder / _ABOUT, asdict(upload))
            self._files[upload.id] = upload
        return upload

    def find(self, id: str, owner: str) -> Upload:
        """A file of an owner. Raises ApiError (404)."""
        upload = self._files.get(id)
        if upload is None or upload.owner != owner:
            raise ApiError(f"there is no file '{id}'", status=404, parameter="file_id", code="file_not_found")
        return upload

    def of(self, owner: str) -> list[Upload]:
        """All files of an owner."""
        return [upload for upload in self._files.values() if upload.owner == owner]

    def path(self, upload: Upload) -> Path:
        """Where its content lies."""
        suffix = PurePosixPath(upload.filename).suffix
        return self._folder / upload.id / (_CONTENT + (suffix.lower() if _SUFFIX.fullmatch(suffix) else ""))

    def remove(self, upload: Upload) -> None:
        """Delete a file for good."""
        with self._lock:
            self._files.pop(upload.id, None)
            shutil.rmtree(self._folder / upload.id, ignore_errors=True)

    def documents(self, upload: Upload) -> list[IndexedDocument]:
        """What a file says, as documents whose places begin with its id. Raises SourceError for one without text."""
        path = self.path(upload)
        try:
            read = _documents_of(path)
        except (SourceError, ArtefactError) as error:
            raise SourceError(str(error).replace(str(path), upload.filename).replace(path.name, upload.filename)) from None
        if not any(document.text.strip() for document in read):
            raise SourceError(f"{upload.filename}: no text is in it")
        if sum(len(document.text) for document in read) > _TEXT_CHARACTERS:
            raise SourceError(f"{upload.filename}: it holds more than {_TEXT_CHARACTERS:,} characters")
        return [
            replace(one, place=f"{upload.id}/{one.place}", title=one.title or upload.filename, source="upload") for one in read
        ]


def _kept(folder: Path) -> list[Upload]:
    """The files of an earlier server."""
    abouts = sorted(folder.glob(f"*/{_ABOUT}"))
    return sorted((Upload(**read_json(path, "uploaded file")) for path in abouts), key=lambda upload: upload.created)


def _documents_of(path: Path) -> Sequence[IndexedDocument]:
    """The documents of a file; a file of no known kind is one document if it is text."""
    # the sources load the extra `data`
    from bessemer.data.sources.io.paths import advice, compression_of
    from bessemer.data.sources.source import Tally
    from bessemer.retrieval.documents import documents_of, sources_of
    from bessemer.retrieval.index import IndexedDocument

    if compression_of(path.name):
        raise SourceError(f"{path}: compressed files are not read")
    try:
        sources = sources_of(str(path))
    except SourceError:
        content = path.read_bytes()
        if b"\x00" in content:
            raise SourceError(f"{path}: files of this kind cannot be read{advice(path.name)}") from None
        try:
            return [IndexedDocument(path.name, content.decode("utf-8-sig"))]
        except UnicodeDecodeError:
            raise SourceError(f"{path}: files of this kind cannot be read{advice(path.name)}") from None
    tally = Tally()
    documents = list(documents_of(sources, path.parent / "cache", tally))
    if not documents and (losses := list(tally.losses)):
        # a loss begins with the file's name
        raise SourceError(str(losses[0]))
    return documents


def page_image(path: Path, number: int, box: Box | None) -> bytes:
    """A page of a document as PNG. box: of a passage on it, to be marked. Raises RequestError where there is none to show."""
    from bessemer.retrieval.reading.page_image import page_image as draw

    return draw(path, number, box)


def file_of_document(index: Path, document: str) -> Path | None:
    """The file that a document of an index was read from; None where it is not known, or not there any more."""
    from bessemer.retrieval.documents import file_of

    return file_of(index, document)
