"""Documents to index: files and folders, each kind by its own source, or another source of `collect` by its name.

Office files and PDF are read by `reading`, with the places of their parts. A folder is watched by looking at it again and
again, which works on every file system, network drives included.

The source `python_docs` reads Python files, and compiled modules have none: they are imported here, which runs code of the
interpreter alone. A private module's objects are named after the public module that has them, `_struct` after `struct`.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.machinery
import importlib.util
import inspect
import re
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from bessemer.core.errors import ArtefactError, SourceError
from bessemer.core.progress import Progress
from bessemer.core.store import read_json, write_json
from bessemer.data.config import CollectConfig
from bessemer.data.sources.io.paths import READ_BY, advice, counted_kinds, suffix_of, uncompressed_name
from bessemer.data.sources.registry import SOURCES, SourceSettings, open_source, source_name
from bessemer.data.sources.source import Source, Tally
from bessemer.retrieval.chunks import Region
from bessemer.retrieval.index import IndexedDocument
from bessemer.retrieval.reading.files import OfficeSource, PlacedDocument, ReadFiles, is_office_file, open_office

#: Longest document, in bytes: a longer text is cut at blank lines by the source, or set aside.
_DOCUMENT_BYTES = 10_000_000
_NOWHERE: tuple[Region, ...] = ()
#: Below the folder of what sources download: the texts of office files.
_READ = "read"
#: File of an index that says where its documents lie.
_ROOTS = "roots.json"
#: Characters that text does not have, their greatest share, and how far a document is looked at for them.
_NO_TEXT, _MOST_NO_TEXT, _LOOKED_AT = re.compile("[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\x9f\ufffd]"), 0.03, 20_000
#: Of each file its size, the time of its last change in nanoseconds, and its inode.
Snapshot = Mapping[str, tuple[int, int, int]]


def sources_of(given: str) -> list[SourceSettings]:
    """The sources for what a user names: a source without further settings, such as `python_docs`; or a file or a folder, with
    a source for each kind of file. Raises SourceError where nothing can be read."""
    if given in SOURCES and not Path(given).exists():
        return _parsed([{"source": given}])
    place = Path(given)
    if not place.exists():
        raise SourceError(f"{given}: no such file or folder, and no source of this name")
    names = _names_below(place)
    kinds = sorted({kind for name in names if (kind := _kind_of(name)) is not None})
    if not kinds:
        others = counted_kinds(names) if place.is_dir() else advice(given).removeprefix("; ")
        raise SourceError(f"{given}: no file here can be read{f' ({others})' if others else ''}")
    settings: dict[str, Any] = {"paths": [given], "max_document_bytes": _DOCUMENT_BYTES}
    office: list[SourceSettings] = [OfficeSource(**settings)] if "office" in kinds else []
    of_collect = [{"source": kind, **settings} for kind in kinds if kind != "office"]
    return (_parsed(of_collect) if of_collect else []) + office


def other_kinds(given: str) -> str:
    """Files in a folder that hold text and are of no kind that is read, with how to convert them; empty without any."""
    place = Path(given)
    if not place.is_dir():
        return ""
    return counted_kinds(
        name for name in _names_below(place) if _kind_of(name) is None and not Path(name).name.startswith("~$")
    )


def _names_below(place: Path) -> list[str]:
    return [str(path) for path in place.rglob("*") if path.is_file()] if place.is_dir() else [str(place)]


def _kind_of(name: str) -> str | None:
    """The source that reads a file of this name; None for a file of another kind."""
    if is_office_file(uncompressed_name(name)):
        return "office"
    kind = READ_BY.get(suffix_of(name))
    return None if kind == "pdf" else kind


def documents_of(
    sources: list[SourceSettings], cache: Path, tally: Tally, progress: Progress | None = None
) -> Iterator[IndexedDocument]:
    """The documents of sources, one after the other; `python_docs` also gives those of compiled modules. `tally` counts and
    names what cannot be read."""
    seen: set[str] = set()
    read_files = ReadFiles(cache / _READ)
    for settings in sources:
        if isinstance(settings, OfficeSource):
            source: Source = open_office(settings, Path(), read_files)
        else:
            source = open_source(settings, Path(), cache)
        for unit in source.units(progress):
            for _, document in source.read(unit, 0, tally):
                if _is_binary(document.text):
                    tally.set_aside("unreadable_files", document.locator, "it is binary, whatever its name says")
                    continue
                name, regions = source_name(settings), _NOWHERE
                if isinstance(document, PlacedDocument):
                    name, regions = document.kind, document.regions
                # a locator is unique within its source
                place = document.locator if document.locator not in seen else f"{name}:{document.locator}"
                seen.add(place)
                yield IndexedDocument(place, document.text, document.heading, name, document.url or "", regions=regions)
        if source_name(settings) == "python_docs":
            yield from builtin_documents()
    read_files.forget_others()


def _is_binary(text: str) -> bool:
    """Whether a text is bytes of something else, by the characters at its beginning that no text has."""
    head = text[:_LOOKED_AT]
    return len(_NO_TEXT.findall(head)) > _MOST_NO_TEXT * len(head)


def remember_roots(index: Path, given: Sequence[str]) -> None:
    """Note in an index where the files of its documents lie."""
    roots = [str(Path(name).resolve()) for name in given if Path(name).exists()]
    if not (index / _ROOTS).exists() or read_json(index / _ROOTS) != roots:
        write_json(index / _ROOTS, roots)


def file_of(index: Path, document: str) -> Path | None:
    """The file that a document of an index was read from; None where it is not there any more, lies in an archive, came from
    another source, or may be one of several."""
    try:
        roots = read_json(index / _ROOTS)
    except ArtefactError:
        return None
    found: set[Path] = set()
    for root in map(Path, roots):
        folder = root if root.is_dir() else root.parent
        # texts and records have a place in their file
        for name in {document, document.rpartition("#")[0]} - {""}:
            path = (folder / name).resolve()
            if path.is_relative_to(folder) and path.is_file() and (folder == root or path == root):
                found.add(path)
    return found.pop() if len(found) == 1 else None


def snapshot_of(given: Sequence[str]) -> Snapshot:
    """The state of the files that are read of what is given. What is not there, or is gone meanwhile, is left out."""
    states: dict[str, tuple[int, int, int]] = {}
    for name in given:
        place = Path(name)
        for path in place.rglob("*") if place.is_dir() else [place]:
            if _kind_of(path.name) is None:
                continue
            try:
                status = path.stat()
            except OSError:
                continue
            if stat.S_ISREG(status.st_mode):
                states[str(path)] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return states


def wait_for_change(
    look: Callable[[], Snapshot], before: Snapshot, seconds: float, sleep: Callable[[float], None] = time.sleep
) -> Snapshot:
    """Poll at an interval until the files differ from `before` and did not change since the last poll, so that none is read
    while it is written. Returns their state."""
    last = before
    while True:
        sleep(seconds)
        now = look()
        if now != before and now == last:
            return now
        last = now


def _parsed(sources: list[dict[str, Any]]) -> list[SourceSettings]:
    return list(CollectConfig.parse({"sources": sources}, "index").sources)


#: Compiled modules whose objects are known by another module's name.
_KNOWN_AS = {"posix": "os", "nt": "os"}
#: Compiled modules that are tests, or parts of the interpreter that nobody calls.
_LEFT_OUT = frozenset(
    {"_testcapi", "_testinternalcapi", "_xxtestfuzz", "_ctypes_test", "_imp", "_frozen_importlib", "xxlimited"}
)
_SOURCE = "python"


def builtin_documents() -> Iterator[IndexedDocument]:
    """A document for each object of a compiled module, and each of its methods, that has a docstring."""
    seen: set[str] = set()
    for name in sorted({*sys.stdlib_module_names, *sys.builtin_module_names}):
        if name in _LEFT_OUT or name.startswith(("_test", "_xx", "xx")) or (module := _compiled(name)) is None:
            continue
        known_as = _public(name)
        if known_as.startswith("_"):
            # nobody imports it by this name
            continue
        for own, value in sorted(vars(module).items()):
            if own.startswith("_") or inspect.ismodule(value):
                continue
            qualified = own if module is builtins else f"{known_as}.{own}"
            members = [(qualified, value)]
            if inspect.isclass(value):
                members += [
                    (f"{qualified}.{method}", member)
                    for method, member in sorted(vars(value).items())
                    if not method.startswith("_")
                ]
            for place, member in members:
                text = _documentation(member)
                if text and place not in seen:
                    seen.add(place)
                    yield IndexedDocument(f"python:{place}", text, place + _signature(member), _SOURCE)


def _compiled(name: str) -> ModuleType | None:
    """A module of the standard library that has no Python file; None for another, and for one that is not on this machine."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            return None
        suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
        if spec.origin == "built-in" or spec.origin.endswith(suffixes):
            with warnings.catch_warnings():
                # importing a deprecated module warns
                warnings.simplefilter("ignore", DeprecationWarning)
                return importlib.import_module(name)
    except (ImportError, ValueError):
        pass
    return None


def _public(name: str) -> str:
    """The module that objects of a compiled one are known by."""
    public = name.removeprefix("_")
    return _KNOWN_AS.get(name, public if public in sys.stdlib_module_names else name)


def _documentation(value: object) -> str:
    # an instance has its class's documentation, which is not its own
    if not (callable(value) or inspect.isdatadescriptor(value)):
        return ""
    text = getattr(value, "__doc__", None)
    return inspect.cleandoc(text) if isinstance(text, str) else ""


def _signature(value: object) -> str:
    try:
        return str(inspect.signature(value)) if callable(value) else ""
    except (TypeError, ValueError, AttributeError):  # some declare signatures that Python cannot read
        return ""
