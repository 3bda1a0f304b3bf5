"""Documents to index from what `collect` reads: a source by its name, or files and folders, each kind by its own source.

The source `python_docs` reads Python files, and compiled modules have none: they are imported here, which runs code of the
interpreter alone. A private module's objects are named after the public module that has them, `_struct` after `struct`.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from bessemer.core.errors import SourceError
from bessemer.core.progress import Progress
from bessemer.data.config import CollectConfig
from bessemer.data.sources.io.paths import READ_BY, advice, counted_kinds, suffix_of
from bessemer.data.sources.registry import SOURCES, SourceSettings, open_source, source_name
from bessemer.data.sources.source import Tally
from bessemer.retrieval.index import IndexedDocument

#: Longest document, in bytes: a longer text is cut at blank lines by the source, or set aside.
_DOCUMENT_BYTES = 10_000_000


def sources_of(given: str) -> list[SourceSettings]:
    """The sources for what a user names: a source without further settings, such as `python_docs`; or a file or a folder, with
    a source for each kind of file. Raises SourceError where nothing can be read."""
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
    """The documents of sources, one after the other; `python_docs` also gives those of compiled modules. `tally` counts and
    names what cannot be read."""
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
