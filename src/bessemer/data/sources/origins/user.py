"""Source of a user's own `file.py:function`, which yields dicts with a `text` and, best, an `id`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bessemer.core.errors import BessemerError, SourceError
from bessemer.core.progress import Progress
from bessemer.core.usercode import load_user_function, user_function_hash
from bessemer.data.sources.config import UserSource
from bessemer.data.sources.document import Document, Tally
from bessemer.data.sources.formats.records import record_document
from bessemer.data.sources.source import PositionedDocument, Unit, counted


@dataclass(frozen=True)
class UserFunction:
    """All that the function yields is one unit."""

    function: str
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)

    def units(self, progress: Progress | None = None) -> list[Unit]:
        return [Unit(self.function, 0)]

    def read(self, unit: Unit, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        yield from counted(lambda _: self._documents(), start, tally)

    def _documents(self) -> Iterator[Document]:
        function = load_user_function(self.function, self.folder)
        try:
            records = iter(function(**self.options))
            while (record := next(records, None)) is not None:
                yield record_document(record, self.function)
        except BessemerError:
            raise
        except Exception as error:  # anything a user's function may raise
            raise SourceError(f"{self.function}: it failed: {type(error).__name__}: {error}") from error

    def fingerprint(self) -> Any:
        return user_function_hash(self.function, self.folder)


def open_user_function(settings: UserSource, folder: Path, cache: Path) -> UserFunction:
    """The source of a user's function. Raises ConfigError when it cannot be loaded, before anything is read."""
    load_user_function(settings.source, folder)
    return UserFunction(settings.source, folder, settings.options)
