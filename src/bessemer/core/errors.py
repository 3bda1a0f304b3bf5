"""Errors that a user can mend: one clear line, exit code 2, never a traceback.

Anything that is our own promise broken is an `assert` instead.
"""

from __future__ import annotations

import errno
import re
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
_FULL_TEXTS = {
    r"No space left on device": errno.ENOSPC,
    r"Disk quota exceeded": errno.EDQUOT,
    r"File too large": errno.EFBIG,
    r"\d+ requested and \d+ written": errno.ENOSPC,  # numpy's short write, which says no more
}


def as_storage_error(error: BaseException, place: Path | str) -> StorageError | None:
    """The `StorageError` that stands for `error`, or None when `error` is about something else.

    Native writers (safetensors, Arrow, PyTorch) wrap the system's error in their own type and keep only its
    text, so both the errno and the message are looked at, along the chain of causes.
    """
    seen: BaseException | None = error
    while seen is not None:
        code = seen.errno if isinstance(seen, OSError) else None
        if code not in _FULL:
            code = next((known for text, known in _FULL_TEXTS.items() if re.search(text, str(seen))), None)
        if code in _FULL:
            return StorageError(f"{_FULL[code]} while writing to {place}; free some space and run again, finished work is kept")
        seen = seen.__cause__ or seen.__context__
    return None


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
