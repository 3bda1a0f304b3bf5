"""Source of a user's own `file.py:function`, which yields dicts with a `text` and, best, an `id`."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bessemer.core.errors import BessemerError, SourceError
from bessemer.core.progress import Progress
from bessemer.core.usercode import load_user_function, user_function_hash
from bessemer.data.sources.io.fetch import Clock, growing_wait, may_pass
from bessemer.data.sources.io.file_source import record_document
from bessemer.data.sources.registry import UserSource
from bessemer.data.sources.source import Document, PositionedDocument, Tally, Unit, counted

#: Attempts after the first to get a record, where waiting may help.
_RETRIES = 3
#: Failed records in a row after which the function counts as broken.
_MOST_WRONG = 100
_END = object()


@dataclass(frozen=True)
class UserFunction:
    """All that the function yields is one unit."""

    function: str
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)

    def units(self, progress: Progress | None = None) -> list[Unit]:
        return [Unit(self.function, 0)]

    def read(self, unit: Unit, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        yield from counted(self._documents, start, tally)

    def _documents(self, tally: Tally) -> Iterator[Document]:
        """The documents of what the function gives. What is no record is set aside. Raises SourceError when the function fails
        before it has given a document, or gives many records and no document."""
        good = wrong = 0
        reason = ""
        for number, record in self._records(tally):
            place = f"{self.function}: record {number:,}"
            try:
                if isinstance(record, Exception):
                    raise SourceError(f"{place}: it failed: {_named(record)}")
                if not isinstance(record, Mapping):
                    raise SourceError(f"{place}: a record needs to be a dict, got {type(record).__name__}")
                document = record_document(record, place)
            except SourceError as error:
                reason = reason or str(error)
                wrong += 1
                tally.set_aside("bad_records", place, str(error).removeprefix(f"{place}: "))
                if not good and wrong == _MOST_WRONG:
                    raise SourceError(f"{reason}; so it was with the first {wrong} records") from None
            else:
                good += 1
                yield document
        if wrong and not good:
            raise SourceError(reason)

    def _records(self, tally: Tally) -> Iterator[tuple[int, Any]]:
        """The function's records, numbered from 1, or the error in place of a record that failed.

        Where waiting may help, the function is called again, and read over to where it failed. A generator is at its end when
        it has failed: what it would have given is set aside. Other iterators, such as that of `map`, go on behind the record.
        """
        function = load_user_function(self.function, self.folder)
        number = attempt = failed = 0
        records: Iterator[Any] | None = None
        while True:
            try:
                if records is None:
                    records = iter(function(**self.options))
                    _skip(records, number)
                record = next(records, _END)
            except BessemerError:
                raise
            except Exception as error:  # anything a user's function may raise
                if may_pass(error) and attempt < _RETRIES:
                    self.clock.sleep(growing_wait(attempt))
                    attempt, records = attempt + 1, None
                    continue
                failed += 1
                if records is None or inspect.isgenerator(records) or failed == _MOST_WRONG:
                    if number == 0:
                        raise SourceError(f"{self.function}: it failed: {_named(error)}") from error
                    why = f"it failed behind record {number:,}, and what would follow is missing: {_named(error)}"
                    tally.set_aside("failed_functions", self.function, why)
                    return
                record = error
            else:
                if record is _END:
                    return
                failed = 0
            number, attempt = number + 1, 0
            yield number, record

    def fingerprint(self) -> Any:
        return user_function_hash(self.function, self.folder)


def open_user_function(settings: UserSource, folder: Path, cache: Path) -> UserFunction:
    """The source of a user's function. Raises ConfigError when it cannot be loaded, before anything is read."""
    load_user_function(settings.source, folder)
    return UserFunction(settings.source, folder, settings.options)


def _skip(records: Iterator[Any], number: int) -> None:
    """Read over records that were met before, those included that could not be given."""
    forgiven = () if inspect.isgenerator(records) else (Exception,)
    for _ in range(number):
        with contextlib.suppress(*forgiven):
            next(records, None)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
