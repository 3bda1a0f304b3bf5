"""Documents to index from what `collect` reads: a source by its name, or files and folders, each kind by its own source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bessemer.core.errors import SourceError
from bessemer.core.progress import Progress
from bessemer.data.config import CollectConfig
from bessemer.data.sources.io.paths import READ_BY, advice, counted_kinds, suffix_of
from bessemer.data.sources.registry import SOURCES, SourceSettings, open_source, source_name
from bessemer.data.sources.source import Tally
from bessemer.retrieval.index import IndexedDocument
from bessemer.retrieval.python_builtins import builtin_documents

#: Longest document, in bytes: a longer text is cut at blank lines by the source, or set aside.
_DOCUMENT_BYTES = 10_000_000


def sources_of(given: str) -> list[SourceSettings]:
    """The sources of what a user names: a source that needs no more than its name, such as `python_docs`, or a file or folder,
    whose kinds of files are each read by their own source. Raises SourceError where nothing can be read."""
    if given in SOURCES and not Path(given).exists():
        return _parsed([{"source": given}])
    place = Path(given)
    if not place.exists():
        raise SourceError(f"{given}: no such file or folder, and no source of this name")
    names = [str(path) for path in place.rglob("*") if path.is_file()] if place.is_dir() else [given]
    kinds = sorted({READ_BY[suffix] for name in names if (suffix := suffix_of(name)) in READ_BY})
    if not kinds:
        others = counted_kinds(names) if place.is_dir() else advice(given).removeprefix("; ")
        raise SourceError(f"{given}: no file here can be read{f' ({others})' if others else ''}")
    limits = {"max_document_bytes": _DOCUMENT_BYTES}
    return _parsed([{"source": kind, "paths": [given], **limits} for kind in kinds])


def documents_of(
    sources: list[SourceSettings], cache: Path, tally: Tally, progress: Progress | None = None
) -> Iterator[IndexedDocument]:
    """The documents of sources, one after the other; of `python_docs` what is compiled too. What cannot be read is counted and
    named in `tally`."""
    seen: set[str] = set()
    for settings in sources:
        source, name = open_source(settings, Path(), cache), source_name(settings)
        for unit in source.units(progress):
            for _, document in source.read(unit, 0, tally):
                # a locator is unique within its source
                place = document.locator if document.locator not in seen else f"{name}:{document.locator}"
                seen.add(place)
                yield IndexedDocument(place, document.text, document.heading, name, document.url or "")
        if name == "python_docs":
            yield from builtin_documents()


def _parsed(sources: list[dict[str, Any]]) -> list[SourceSettings]:
    return list(CollectConfig.parse({"sources": sources}, "index").sources)
