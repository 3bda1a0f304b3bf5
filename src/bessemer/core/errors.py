"""Errors that a user can mend: one clear line, exit code 2, never a traceback. Broken promises of our own are `assert`s.

    BessemerError               any of these
    ├── ConfigError             a setting in a recipe, an override or an API call
    ├── SourceError             a source of documents
    ├── ArtefactError           a file or folder that Bessemer reads
    │   └── CheckpointError     a training checkpoint
    ├── RequestError            a request to a model
    ├── LostProcessError        another process of the same job has ended
    └── StorageError            a full disk, or a place that cannot be written

Packages derive further ones, such as `ApiError` and `SandboxError`. `StaleMeasurementError` is not for users: the pipeline
catches it. The functions below turn errors of the system and of libraries into these.
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
    """An artefact that is missing, incomplete, damaged, or does not fit another one."""


class CheckpointError(ArtefactError):
    """A training checkpoint that is damaged or belongs to another configuration."""


class RequestError(BessemerError):
    """A request that a model cannot serve: a prompt that is too long, a parameter out of range."""


class LostProcessError(BessemerError):
    """One of several processes that work together has ended, so none can go on."""


class StorageError(BessemerError):
    """The disk is full, a quota is reached, or a place cannot be written."""


class StaleMeasurementError(Exception):
    """A stage runs at another speed than the measurement that its settings come from. Its text says how the two differ.

    The pipeline's runner catches it, measures again and restarts the stage.
    """


def ending_of_process(code: int) -> str:
    """A process's exit code in words: `exit code 1`, or `signal 9` for -9."""
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
#: Texts of native writers' errors, which have no errno.
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
#: A temporary name of an unfinished file or folder: `.NAME.PROCESS.tmp`.
_UNFINISHED = re.compile(r"\.(?P<name>.+)\.\w+\.(?:tmp|partial|link)")


def as_storage_error(error: BaseException, place: Path | str | None = None) -> StorageError | None:
    """The `StorageError` for `error`, or None when `error` is not about storage.

    Native writers (safetensors, Arrow, PyTorch) wrap the system's error in their own type and keep only its text, so the errno
    and the message are examined, along the chain of causes. place: what was being written, for an error that names no file.
    """
    current: BaseException | None = error
    # a refusal counts only as the cause of `error`; a full disk also as its context
    is_cause = True
    while current is not None:
        code = _storage_code(current)
        if code in _FULL:
            where = _file_of(current) or place
            problem = f"{_FULL[code]} while writing{f' to {where}' if where else ''}"
            return StorageError(f"{problem}; free some space and run the same command again, finished work is kept")
        if code in _DENIED and is_cause:
            # an OSError without a file may be about something else than writing, such as a port or a signal
            is_of_place = code == errno.EROFS or not isinstance(current, OSError)
            where = _file_of(current) or (place if is_of_place else None)
            if where or is_of_place:
                return StorageError(f"{where}: {_DENIED[code]}" if where else _DENIED[code])
        is_cause = is_cause and current.__cause__ is not None
        current = current.__cause__ or current.__context__
    return None


def as_user_error(error: BaseException) -> BessemerError | None:
    """A one-line error for a system's error that no other code explains: about storage, a file that it names, or the network.
    None for any other error."""
    if (storage_error := as_storage_error(error)) is not None or not isinstance(error, OSError):
        return storage_error
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
    """While `place` is written: a full or unwritable disk raises a StorageError that names the place."""
    try:
        yield
    except BessemerError:
        raise
    except Exception as error:
        storage_error = as_storage_error(error, place)
        if storage_error is None:
            raise
        raise storage_error from error


def _storage_code(error: BaseException) -> int | None:
    code = error.errno if isinstance(error, OSError) else None
    if code in _FULL or code in _DENIED:
        return code
    return next((known for text, known in _STORAGE_TEXTS.items() if re.search(text, str(error))), None)


def _file_of(error: BaseException) -> str | None:
    """The file that an error is about: of two, the one that was written; for a temporary file, its final name."""
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


#: Messages of failed allocations, with the amount if they have it: PyTorch's GPU and CPU allocators, numpy.
_MEMORY_TEXTS = (
    r"out of memory\. Tried to allocate (?P<amount>[\d.]+) (?P<unit>[KMGTPE]?i?B)",
    r"you tried to allocate (?P<amount>\d+) (?P<unit>b)ytes",
    r"Unable to allocate (?P<amount>[\d.]+) (?P<unit>[KMGTPE]?i?B)",
    r"out of memory",
    r"std::bad_alloc",
)
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}


def failed_allocation(error: BaseException) -> int | None:
    """The bytes of an allocation that failed, 0 when the message does not say; None when neither `error` nor a cause of it is a
    failed allocation."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, (RuntimeError, MemoryError)):
            for text in _MEMORY_TEXTS:
                if match := re.search(text, str(current)):
                    amount = match.groupdict()
                    return round(float(amount["amount"]) * 1024 ** _UNITS[amount["unit"][:-1].rstrip("i")]) if amount else 0
            if isinstance(current, MemoryError):
                return 0
        current = current.__cause__ or current.__context__
    return None
