"""Source `hugging_face`: data sets of the Hub, streamed, or in a folder as the Hub or `save_to_disk` wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bessemer.core.environment import install_extra
from bessemer.core.errors import SourceError
from bessemer.core.progress import Progress
from bessemer.data.sources.io.fetch import Clock, growing_wait, tried_again
from bessemer.data.sources.io.file_source import record_document
from bessemer.data.sources.io.paths import ContentFingerprints
from bessemer.data.sources.registry import HuggingFaceSource
from bessemer.data.sources.source import PositionedDocument, Tally, Unit
from bessemer.data.sources.tables import record_of_row

#: Attempts after the first, about a minute of waiting in all.
_RETRIES = 6


@dataclass(frozen=True)
class HuggingFace:
    """One document a row; a unit is a shard of the data set. `place` is the folder of one on this machine."""

    settings: HuggingFaceSource
    place: Path | None = None
    clock: Clock = field(default_factory=Clock)

    def units(self, progress: Progress | None = None) -> list[Unit]:
        count = int(getattr(self._open(), "num_shards", None) or 1)
        # the name, not the path: a folder may be moved
        name = self.place.name if self.place else self.settings.dataset
        return [Unit(f"{name}/{self.settings.split}/{number:05d}-of-{count:05d}", 0) for number in range(count)]

    def read(self, unit: Unit, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        for position, row in self._rows(unit, start, tally):
            text, place = row.get(self.settings.columns.text), f"{unit.name}: row {position:,}"
            if not isinstance(text, str):
                tally.set_aside("bad_records", place, f"no text under {self.settings.columns.text!r}")
            elif len(text) > self.settings.max_document_bytes:
                tally.set_aside("too_large", place, f"a text of {len(text):,} characters")
            elif text.strip():
                record = record_of_row(self.settings.columns, row)
                record.setdefault("id", f"{unit.name}#{position}")
                yield position, record_document(record, place, default_license=self.settings.license)

    def _rows(self, unit: Unit, position: int, tally: Tally) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of a shard behind `position`. A stream that breaks is opened again where it broke, after growing waits; one
        that breaks at the same row each time is set aside from there on.

        Raises SourceError when the Hub itself cannot be reached any more: what was read is kept, and another run goes on there.
        """
        number, _, count = unit.name.rpartition("/")[2].partition("-of-")
        attempt = 0
        while True:
            try:
                rows = self._open()
            except SourceError as error:
                raise SourceError(f"{unit.name}: read to row {position:,}; {error}; run again") from error
            try:
                if int(count) > 1:
                    rows = rows.shard(num_shards=int(count), index=int(number))
                for row in rows.skip(position) if position else rows:
                    position, attempt = position + 1, 0
                    yield position, row
            except Exception as error:  # what the library and its network raise in the middle of a stream
                if attempt == self._retries:
                    why = f"it broke behind row {position:,}, {attempt + 1} times: {type(error).__name__}: {_first_line(error)}"
                    tally.set_aside("broken_streams" if self.place is None else "damaged_files", unit.name, why)
                    return
                self.clock.sleep(growing_wait(attempt))
                attempt += 1
            else:
                return

    def fingerprint(self, fingerprints: ContentFingerprints | None = None) -> Any:
        if self.place is None:
            return {"dataset": self.settings.dataset, "revision": self.settings.revision}
        files = sorted(path for path in self.place.rglob("*") if path.is_file())
        contents = (fingerprints or ContentFingerprints()).of(files)
        return [[path.relative_to(self.place).as_posix(), content] for path, content in zip(files, contents, strict=True)]

    @property
    def _retries(self) -> int:
        """None for a folder on this machine, which reads the same each time."""
        return _RETRIES if self.place is None else 0

    def _open(self) -> Any:
        """The data set as a stream, after growing waits where a network fails. Raises SourceError when `datasets` is missing or
        the Hub cannot be reached."""
        try:
            import datasets
        except ImportError:
            raise SourceError(
                f"{self.settings.dataset}: data sets of the Hub need the package `datasets`: {install_extra('hub')}"
            ) from None
        try:
            return tried_again(partial(self._loaded, datasets), self._retries, self.clock)
        except Exception as error:  # a network's many ways to fail, and the library's own errors
            raise SourceError(f"{self.settings.dataset}: it cannot be opened: {_first_line(error)}") from error

    def _loaded(self, datasets: Any) -> Any:
        if saved := self._saved():
            return datasets.load_from_disk(str(saved)).to_iterable_dataset(num_shards=len(list(saved.glob("data-*.arrow"))))
        return datasets.load_dataset(
            str(self.place or self.settings.dataset),
            self.settings.configuration,
            split=self.settings.split,
            revision=self.settings.revision,
            streaming=True,
        )

    def _saved(self) -> Path | None:
        """Where `save_to_disk` wrote the split, if it did: the folder itself, or the split's in a dictionary of splits."""
        places = (self.place, self.place / self.settings.split) if self.place else ()
        return next((place for place in places if (place / "state.json").is_file()), None)


def open_hugging_face(settings: HuggingFaceSource, folder: Path, cache: Path) -> HuggingFace:
    """The source `hugging_face`: of the Hub, or of a folder relative to `folder` where there is one of the data set's name."""
    place = folder / settings.dataset
    return HuggingFace(settings, place if place.is_dir() else None)


def hugging_face_fingerprint(
    settings: HuggingFaceSource, folder: Path, cache: Path, fetch: bool, progress: Progress | None
) -> Any:
    """The data set and its revision, or the contents of a folder's files. Raises as `open_hugging_face`."""
    source = open_hugging_face(settings, folder.absolute(), cache)
    return source.fingerprint(ContentFingerprints(cache, progress))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
