"""Compilation of loops over bytes by Numba, and the cache of compiled code.

What is compiled is kept beside its source. Numba compiles it again when its own file changes, not when a function or a
constant changes that it has from another: after an upgrade, or an edit of `characters.py`, old loops would go on with old
tables. So what is kept is also marked with the hash of all that its file imports of ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from numba import njit

from bessemer.core.hashing import hash_bytes

_IMPORT = re.compile(r"^from (bessemer\.data\.[\w.]+) import", re.MULTILINE)


def compiled(function: Callable[..., Any]) -> Any:
    """For functions that get all their arrays from outside and make none.

    They run without the interpreter's lock, and count no references: Numba would raise and lower a counter for each array at
    each inner call, which took two thirds of the time of `find_words`.
    """
    return _with_imports(njit(cache=True, nogil=True, _nrt=False)(function))  # type: ignore[call-overload]


def compiled_allocating(function: Callable[..., Any]) -> Any:
    """For functions that make arrays. They run without the interpreter's lock too."""
    return _with_imports(njit(cache=True, nogil=True)(function))


def _with_imports(dispatcher: Any) -> Any:
    """Mark what is kept of a function with what its file imports, beside its own hash. Numba has no public way to do it."""
    # NUMBA_DISABLE_JIT, for a debugger
    if not hasattr(dispatcher, "_cache"):
        return dispatcher
    kept = dispatcher._cache._cache_file
    kept._source_stamp = (kept._source_stamp, imports_hash(Path(dispatcher.py_func.__code__.co_filename)))
    return dispatcher


@cache
def imports_hash(path: Path) -> str:
    """Hash of all files of `bessemer.data` that a file imports, directly or through others."""
    found: dict[Path, bytes] = {}
    waiting = [path]
    while waiting:
        for imported in _imports(waiting.pop()):
            if imported not in found:
                found[imported] = imported.read_bytes()
                waiting.append(imported)
    return hash_bytes(*(found[imported] for imported in sorted(found)))


@cache
def _imports(path: Path) -> tuple[Path, ...]:
    files = (_file_of(name) for name in dict.fromkeys(_IMPORT.findall(path.read_text(encoding="utf-8"))))
    return tuple(file for file in files if file is not None)


def _file_of(module: str) -> Path | None:
    spec = find_spec(module)
    return Path(spec.origin) if spec is not None and spec.origin is not None else None
