"""Regular expressions out of files that somebody else wrote: matched within a time, whatever they are."""

from __future__ import annotations

import time
from pathlib import Path

import regex

from bessemer.core.errors import ArtefactError

#: Seconds that all matches of one file may take together; honest ones take milliseconds.
_SECONDS = 2.0


class FilePatterns:
    """The regular expressions of one file. `re` would follow `(a+)+b` for ever, and hold every other thread; `regex` looks at
    the clock as it backtracks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._left = _SECONDS

    def matches(self, expression: str, name: str, setting: str, before: str = "", after: str = "") -> bool:
        """Whether the expression, between two others, matches from the name's beginning. setting: where it stands in the file.

        Raises ArtefactError for one that is no regular expression, and where the file's have taken too long.
        """
        began = time.perf_counter()
        try:
            return regex.match(before + expression + after, name, timeout=max(self._left, 1e-3)) is not None
        except TimeoutError:
            raise ArtefactError(
                f"{self._path}: {setting}: {expression[:60]!r} takes more than {_SECONDS:g} s to match; write it without "
                "repetitions of repetitions"
            ) from None
        except (regex.error, RecursionError, OverflowError) as error:
            raise ArtefactError(f"{self._path}: {setting}: {expression[:60]!r} is no regular expression ({error})") from None
        finally:
            self._left -= time.perf_counter() - began
