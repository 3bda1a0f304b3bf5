"""Compilation of loops over bytes by Numba, the cache of compiled code, and hash tables for such loops.

Compiled code is kept beside its source. Numba compiles it again when its own file changes, not when an imported function or
constant does, so the cache is also keyed by the hash of all modules of `bessemer.data` that the file imports. Processes that
start together, as the workers of a stage, compile each function once: the others wait for it and load it.

Hashes are of 64 bits. Two different words, lines or n-grams of one text share one with a probability of about n²/2⁶⁵, so they
are compared by it alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numba import njit
from numba.core.compiler_lock import global_compiler_lock
from numba.core.types import unliteral

from bessemer.core.hashing import hash_bytes

#: Seconds to wait for another process's compilation; the longest takes a few.
_LONGEST_COMPILATION = 60
#: Marker file: the compilation was announced to a user.
_ANNOUNCED = "compiling.announced"
_IMPORT = re.compile(r"^from (bessemer\.data\.[\w.]+) import", re.MULTILINE)


def compiled(function: Callable[..., Any]) -> Any:
    """For functions that get all their arrays from outside and make none.

    They run without the interpreter's lock, and count no references: Numba would raise and lower a counter for each array at
    each inner call, which took two thirds of the time of `find_words`.
    """
    return _kept(njit(cache=True, nogil=True, no_cfunc_wrapper=True, _nrt=False)(function))  # type: ignore[call-overload]


def compiled_allocating(function: Callable[..., Any]) -> Any:
    """For functions that make arrays. They run without the interpreter's lock too."""
    return _kept(njit(cache=True, nogil=True, no_cfunc_wrapper=True)(function))  # type: ignore[call-overload]


def _kept(dispatcher: Any) -> Any:
    """Mark what is kept of a function with what its file imports, beside its own hash, and let one process at a time compile
    it. Numba has no public way to do either.

    An integer that is written in a call is an integer like any other. To Numba it is a type of its own, for which it would
    compile the called function once more: an eighth of all compiled code, and a sixth of the time.
    """
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
            return compile_alone(tuple(map(unliteral, signature)) if isinstance(signature, tuple) else signature)

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


_SEED = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x100000001B3)
_MIX = np.uint64(0xFF51AFD7ED558CCD)
_HALF = np.uint64(32)


@compiled
def fnv_hash(data: np.ndarray, start: int, end: int) -> Any:
    """FNV-1a (Fowler, Noll and Vo) of `data[start:end]`, uint64, mixed at the end so that all bits are usable."""
    value = _SEED
    for index in range(start, end):
        value = (value ^ np.uint64(data[index])) * _PRIME
    value = (value ^ (value >> _HALF)) * _MIX
    return value ^ (value >> _HALF)


@compiled
def slot_of(keys: np.ndarray, key: Any) -> Any:
    """The slot of `key` in an open-addressing table of 2^k keys, or the free slot (a zero) where it belongs."""
    mask = np.uint64(len(keys) - 1)
    slot = key & mask
    while keys[slot] != key and keys[slot] != 0:
        slot = (slot + np.uint64(1)) & mask
    return slot


def table_of(entries: Mapping[bytes, int]) -> tuple[np.ndarray, np.ndarray]:
    """A table from the hash of each key to its value: keys uint64 and values int64, 2^k of each, at most a quarter in use."""
    size = 1 << (4 * max(1, len(entries)) - 1).bit_length()
    keys, values = np.zeros(size, np.uint64), np.zeros(size, np.int64)
    for spelt, value in entries.items():
        key = np.uint64(fnv_hash(np.frombuffer(spelt, np.uint8), 0, len(spelt)))
        slot = slot_of(keys, key)
        keys[slot], values[slot] = key, value
    return keys, values


@compiled
def longest_text(offsets: np.ndarray) -> int:
    """Bytes of the longest of some texts, at least 1."""
    longest = 1
    for text in range(len(offsets) - 1):
        longest = max(longest, offsets[text + 1] - offsets[text])
    return longest
