"""Compilation of loops over bytes by Numba, and the cache of compiled code.

What is compiled is kept beside its source. Numba compiles it again when its own file changes, not when a function or a
constant changes that it has from another: after an upgrade, or an edit of `characters.py`, old loops would go on with old
tables. So what is kept is also marked with the hash of all that its file imports of ours.

Processes that begin together, as the workers of a stage, compile each function once: the others wait for it and load it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from numba import njit
from numba.core.compiler_lock import global_compiler_lock

from bessemer.core.hashing import hash_bytes

#: Seconds. The longest of ours takes a few.
_LONGEST_COMPILATION = 60
#: A file whose presence says that somebody was told.
_ANNOUNCED = "compiling.announced"
_IMPORT = re.compile(r"^from (bessemer\.data\.[\w.]+) import", re.MULTILINE)


def compiled(function: Callable[..., Any]) -> Any:
    """For functions that get all their arrays from outside and make none.

    They run without the interpreter's lock, and count no references: Numba would raise and lower a counter for each array at
    each inner call, which took two thirds of the time of `find_words`.
    """
    return _kept(njit(cache=True, nogil=True, _nrt=False)(function))  # type: ignore[call-overload]


def compiled_allocating(function: Callable[..., Any]) -> Any:
    """For functions that make arrays. They run without the interpreter's lock too."""
    return _kept(njit(cache=True, nogil=True)(function))


def _kept(dispatcher: Any) -> Any:
    """Mark what is kept of a function with what its file imports, beside its own hash, and let one process at a time compile
    it. Numba has no public way to do either."""
    # NUMBA_DISABLE_JIT, for a debugger
    if not hasattr(dispatcher, "_cache"):
        return dispatcher
    kept = dispatcher._cache._cache_file
    kept._source_stamp = (kept._source_stamp, imports_hash(Path(dispatcher.py_func.__code__.co_filename)))
    compile_alone, lock = dispatcher.compile, FileLock(f"{kept._index_path}.lock")

    def compile_once(signature: Any) -> Any:
        # Numba's own lock first: a thread that holds it may need a function that another thread is about to compile
        with global_compiler_lock, _held(lock):
            if not Path(kept._index_path).exists():
                _announce(Path(kept._index_path).parent)
            return compile_alone(signature)

    dispatcher.compile = compile_once
    return dispatcher


def _announce(folder: Path) -> None:
    """Say at a terminal what takes so long, once for all processes and packages. folder: of what is compiled, beside its source
    or, with those of others, in a folder of Numba's."""
    if not sys.stderr.isatty():
        return
    place = Path(__file__).parent / folder.name if folder.name == "__pycache__" else folder.parent
    try:
        (place / _ANNOUNCED).touch(exist_ok=False)
    except OSError:
        # another process has said it, or nothing can be written here
        return
    print("compiling the loops over text for this machine, once (about half a minute)", file=sys.stderr)


@contextmanager
def _held(lock: FileLock) -> Iterator[None]:
    """With a lock where it can be had: a folder may not be written to, and a process that holds it may have been stopped."""
    try:
        lock.acquire(timeout=_LONGEST_COMPILATION)
    except (OSError, NotImplementedError, Timeout):
        yield
        return
    try:
        yield
    finally:
        lock.release()


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
