"""Source `hugging_face`: data sets of the Hub, streamed, for which the package `datasets` and a network are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from bessemer.core.errors import SourceError
from bessemer.core.progress import Progress
from bessemer.data.sources.document import Tally
from bessemer.data.sources.records import record_document
from bessemer.data.sources.source import Found, Unit
from bessemer.data.sources.tables import Columns


@dataclass(frozen=True)
class HuggingFace:
    """One document a row; a unit is a shard of the data set."""

    dataset: str
    max_document_bytes: int
    configuration: str | None = None
    split: str = "train"
    revision: str | None = None
    columns: Columns = field(default_factory=Columns)
    license: str | None = None

    def units(self, progress: Progress | None = None) -> list[Unit]:
        count = int(getattr(self._open(), "num_shards", None) or 1)
        return [Unit(f"{self.dataset}/{self.split}/{number:05d}-of-{count:05d}", 0) for number in range(count)]

    def read(self, unit: Unit, start: int, tally: Tally) -> Iterator[Found]:
        number, _, count = unit.name.rpartition("/")[2].partition("-of-")
        rows = self._open()
        if int(count) > 1:
            rows = rows.shard(num_shards=int(count), index=int(number))
        if start:
            rows = rows.skip(start)
        position = start
        try:
            for position, row in enumerate(rows, start=start + 1):
                text, place = row.get(self.columns.text), f"{unit.name}: row {position:,}"
                if not isinstance(text, str):
                    tally.set_aside("bad_records", place, f"no text under {self.columns.text!r}")
                elif len(text) > self.max_document_bytes:
                    tally.set_aside("too_large", place, f"a text of {len(text):,} characters")
                elif text.strip():
                    record = self.columns.record(row)
                    record.setdefault("id", f"{unit.name}#{position}")
                    yield position, record_document(record, place, default_license=self.license)
        except (OSError, ValueError) as error:  # what the library and its network raise in the middle of a stream
            raise SourceError(f"{unit.name}: the stream broke at row {position:,}: {_first_line(error)}; run again") from error

    def fingerprint(self) -> Any:
        return {"dataset": self.dataset, "revision": self.revision}

    def _open(self) -> Any:
        """The data set as a stream. Raises SourceError when `datasets` is missing or the Hub cannot be reached."""
        try:
            import datasets
        except ImportError:
            raise SourceError(
                f"{self.dataset}: data sets of the Hub need the package `datasets`: pip install datasets"
            ) from None
        try:
            return datasets.load_dataset(
                self.dataset, self.configuration, split=self.split, revision=self.revision, streaming=True
            )
        except Exception as error:  # a network's many ways to fail, and the library's own errors
            raise SourceError(f"{self.dataset}: it cannot be opened: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
