"""Source `python_docs`: the docstrings of the running interpreter's standard library, parsed from its files."""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.core.hashing import hash_file, hash_value
from bessemer.core.progress import Progress
from bessemer.data.sources.config import PythonDocsSource
from bessemer.data.sources.document import Document, Tally
from bessemer.data.sources.origins.docstrings import docstrings, is_documentation_code
from bessemer.data.sources.source import PositionedDocument, Unit, counted

_LICENSE = "PSF-2.0"
_URL = "https://docs.python.org/3/library/"


def read_python_docs(tally: Tally) -> Iterator[Document]:
    """The documents of the standard library. Each top-level module is a group of its own, so that it lies in one split."""
    root = _standard_library()
    for name in _files(root):
        tally.files += 1
        top = name.split("/")[0].removesuffix(".py")
        common = {"package": f"python/{top}", "version": platform.python_version()}
        try:
            source = (root / name).read_bytes()
            tally.bytes += len(source)
            for found in docstrings(source, name):
                yield found.document(name, common, url=_URL, license=_LICENSE, group=common["package"])
        except (SyntaxError, ValueError) as error:
            tally.counts["unparseable_files"] += 1
            tally.notes.append(f"standard library: {name}: {error}")


@dataclass(frozen=True)
class PythonDocs:
    """The standard library's documents, as one unit."""

    def units(self, progress: Progress | None = None) -> list[Unit]:
        return [Unit("standard library", 0)]

    def read(self, unit: Unit, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        yield from counted(read_python_docs, start, tally)

    def fingerprint(self) -> Any:
        return python_docs_fingerprint()


def open_python_docs(settings: PythonDocsSource, folder: Path, cache: Path) -> PythonDocs:
    """The source `python_docs`, which has no settings."""
    return PythonDocs()


def python_docs_fingerprint() -> dict[str, Any]:
    """What the standard library holds: the interpreter's version and a hash of the files that would be read."""
    root = _standard_library()
    return {"python": platform.python_version(), "files": hash_value([[name, hash_file(root / name)] for name in _files(root)])}


def _standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _files(root: Path) -> list[str]:
    found = (path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return sorted(name for name in found if is_documentation_code(name))
