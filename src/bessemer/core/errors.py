"""Errors that a user can mend: one clear line, exit code 2, never a traceback.

Anything that is our own promise broken is an `assert` instead.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class BessemerError(Exception):
    """Something the user can mend. Its text is one line: what is wrong, where, what to do."""


class ConfigError(BessemerError):
    """An unknown key, a wrong type or a value out of range, in a recipe, an override or an API call."""


class SourceError(BessemerError):
    """A source of documents that does not exist, cannot be read, or holds nothing usable."""


class ArtefactError(BessemerError):
    """An artefact that is missing, incomplete, damaged, or does not fit the one beside it."""


class CheckpointError(ArtefactError):
    """A training checkpoint that is damaged or belongs to another configuration."""


class RequestError(BessemerError):
    """A request to a model that it cannot serve: a prompt that is too long, a parameter out of range."""


class LostProcessError(BessemerError):
    """One of several processes that work together has ended, so none can go on."""


class StorageError(BessemerError):
    """The disk is full, a quota is reached, or a place cannot be written."""


class StaleMeasurementError(Exception):
    """A stage runs at another pace than its settings were measured for: it is to be measured again and started anew.

    Its text says how they differ. The runner, which had it measured, catches it.
    """


def ending_of_process(code: int) -> str:
    """What a process's exit code says: negative ones are signals."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"


_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is reached",
    errno.EFBIG: "a file reached the size limit",
}
_DENIED = {
    errno.EROFS: "the file system is read-only; name a place that can be written",
    errno.EACCES: "permission denied; let this user read and write it, or name another place",
    errno.EPERM: "the system does not permit it; name another place",
}
#: What native writers say in place of an errno.
_STORAGE_TEXTS = {
    r"No space left on device|database or disk is full": errno.ENOSPC,
    r"Disk quota exceeded": errno.EDQUOT,
    r"File too large": errno.EFBIG,
    r"\d+ requested and \d+ written": errno.ENOSPC,  # numpy's short write, which says no more
    r"Read-only file system|readonly database": errno.EROFS,
    r"Permission denied \(os error 13\)": errno.EACCES,  # Rust's: tokenizers, safetensors
}
#: Arrow's errors name their file in the text alone.
_QUOTED_FILE = re.compile(r"(?:file|directory) '([^']+)'")
#: A name under which something is written until it is whole: `.NAME.PROCESS.tmp`.
_UNFINISHED = re.compile(r"\.(?P<name>.+)\.\w+\.(?:tmp|partial|link)")


def as_storage_error(error: BaseException, place: Path | str | None = None) -> StorageError | None:
    """The `StorageError` that stands for `error`, or None when `error` is about something else.

    Native writers (safetensors, Arrow, PyTorch) wrap the system's error in their own type and keep only its
    text, so both the errno and the message are looked at, along the chain of causes.
    place: what was being written, where the error names no file.
    """
    seen: BaseException | None = error
    # what was refused counts where it is the cause; a full disk also where another error came of it
    is_cause = True
    while seen is not None:
        code = _storage_code(seen)
        if code in _FULL:
            where = _file_of(seen) or place
            told = f"{_FULL[code]} while writing{f' to {where}' if where else ''}"
            return StorageError(f"{told}; free some space and run the same command again, finished work is kept")
        if code in _DENIED and is_cause:
            # without a file, the system may have refused something else than to write: a port, a signal
            of_place = code == errno.EROFS or not isinstance(seen, OSError)
            where = _file_of(seen) or (place if of_place else None)
            if where or of_place:
                return StorageError(f"{where}: {_DENIED[code]}" if where else _DENIED[code])
        is_cause = is_cause and seen.__cause__ is not None
        seen = seen.__cause__ or seen.__context__
    return None


def as_user_error(error: BaseException) -> BessemerError | None:
    """One line for a system's error that no code has explained: of storage, of a file that it names, or of the network; None
    for another."""
    if (found := as_storage_error(error)) is not None or not isinstance(error, OSError):
        return found
    reason = (error.strerror or str(error)).strip()
    if (where := _file_of(error)) is not None:
        return BessemerError(f"{where}: {reason[:1].lower()}{reason[1:]}")
    if reason.startswith("No usable temporary directory"):
        return BessemerError(f"{reason}; let TMPDIR name a folder that can be written")
    if isinstance(error, (ConnectionError, TimeoutError)) or type(error).__name__ == "gaierror":
        return BessemerError(f"the network does not answer ({reason}); check the address and the connection")
    return None


@contextmanager
def writing_to(place: Path | str) -> Iterator[None]:
    """While `place` is written: a disk that is full or cannot be written is a StorageError, which names the place."""
    try:
        yield
    except BessemerError:
        raise
    except Exception as error:
        found = as_storage_error(error, place)
        if found is None:
            raise
        raise found from error


def _storage_code(error: BaseException) -> int | None:
    code = error.errno if isinstance(error, OSError) else None
    if code in _FULL or code in _DENIED:
        return code
    return next((known for text, known in _STORAGE_TEXTS.items() if re.search(text, str(error))), None)


def _file_of(error: BaseException) -> str | None:
    """The file that an error is about: of two, the one that was written; in place of a temporary one, what becomes of it."""
    if not isinstance(error, OSError):
        return None
    named = error.filename2 or error.filename
    if isinstance(named, bytes):
        named = os.fsdecode(named)
    if not isinstance(named, (str, os.PathLike)):
        quoted = _QUOTED_FILE.search(str(error))
        if quoted is None:
            return None
        named = quoted[1]
    parts = Path(named).parts
    for position, part in enumerate(parts):
        if unfinished := _UNFINISHED.fullmatch(part):
            return str(Path(*parts[:position], unfinished["name"]))
    return str(named)


#: What says that an allocation failed, with the amount where it is said: PyTorch's GPU and processor allocators, numpy.
_MEMORY_TEXTS = (
    r"out of memory\. Tried to allocate (?P<amount>[\d.]+) (?P<unit>[KMGTPE]?i?B)",
    r"you tried to allocate (?P<amount>\d+) (?P<unit>b)ytes",
    r"Unable to allocate (?P<amount>[\d.]+) (?P<unit>[KMGTPE]?i?B)",
    r"out of memory",
    r"std::bad_alloc",
)
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}


def asked_memory(error: BaseException) -> int | None:
    """The bytes that an allocation asked for and did not get, 0 when nobody says how many; None when `error`, along the chain
    of its causes, is about something else."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, (RuntimeError, MemoryError)):
            for text in _MEMORY_TEXTS:
                found = re.search(text, str(seen))
                if found is not None:
                    amount = found.groupdict()
                    return round(float(amount["amount"]) * 1024 ** _UNITS[amount["unit"][:-1].rstrip("i")]) if amount else 0
            if isinstance(seen, MemoryError):
                return 0
        seen = seen.__cause__ or seen.__context__
    return None
