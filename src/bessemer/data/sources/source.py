"""Protocol of a source: units that can be read apart, and positions from which reading resumes.

A *unit* is a file, an archive, or a bundle of small files. Units are read independently, in any order and in parallel.
Inside a unit every document comes with the position behind it; `read(unit, position, …)` goes on from there without
doing the work before it again. Positions are the source's own affair (a byte offset, a record, a row): they are whole
numbers that only grow within a unit, and 0 is its beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from bessemer.core.object_storage import Place
from bessemer.core.progress import Progress
from bessemer.data.sources.document import Document, Tally

#: A document and the position behind it.
PositionedDocument = tuple[int, Document]


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a source that is read as one.

    `name` is unique within the source and stays the same while the source's content does. `files` are what it is read
    from, by their stable names. Plain values throughout, so that a unit can be sent to another process or machine.
    """

    name: str
    size_bytes: int
    files: tuple[tuple[str, Place], ...] = ()


class Source(Protocol):
    """Something that yields documents. Implementations are frozen and can be pickled."""

    def units(self, progress: Progress | None = None) -> list[Unit]:
        """The parts, in a stable order. What has to be fetched first is fetched here and reported to `progress`.

        Raises SourceError when what the settings name does not exist or holds nothing.
        """

    def read(self, unit: Unit, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        """The documents of a unit behind the position `start`, each with the position behind itself.

        What cannot be read is counted and named in `tally`; it never ends the run.
        """

    def fingerprint(self) -> Any:
        """What the documents depend on beyond the settings, as a JSON value for the stage's key."""


def counted(documents: Callable[[Tally], Iterator[Document]], start: int, tally: Tally) -> Iterator[PositionedDocument]:
    """Positions for what can only be read from its beginning: how many documents came. The first `start` are read over,
    and what is met among them is not tallied again."""
    met = Tally()
    for position, document in enumerate(documents(met), start=1):
        if position > start:
            tally.take(met)
            yield position, document
        else:
            met.clear()
    tally.take(met)
