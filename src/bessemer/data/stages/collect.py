"""Stage `collect`: reads the sources, gives each document its id and its split, writes documents by bucket.

Units of sources (files, archives) are read in parallel into segments; when all are closed, each bucket gathers its rows from
them. So the documents depend neither on the order of units nor on who read them, and a killed collection resumes inside a
large file.

Validation split: documents are held out by group (a package, a file), by the hash of its name alone, so that adding documents
never moves others, and no run trains on what another validates on. Only a corpus so small that one side would be empty needs a
`remedy`.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bessemer.core.errors import SourceError
from bessemer.core.hashing import hash_bytes
from bessemer.core.object_storage import Place
from bessemer.core.progress import Progress, Silent, Speed
from bessemer.core.store import read_json, write_text
from bessemer.data.config import CollectConfig
from bessemer.data.corpus.reader import SCHEMA, TRAIN, VALIDATION, part_name, without_removed
from bessemer.data.corpus.remote import SCRATCH, begin, finish
from bessemer.data.corpus.staging import (
    BucketRows,
    groups_and_ids,
    in_order_of_ids,
    last_head,
    segment_files,
    with_split,
    write_segments,
)
from bessemer.data.corpus.stats import PartStats, stage_stats
from bessemer.data.corpus.writer import PartWriter, batch_slices
from bessemer.data.engine import run_tasks
from bessemer.data.sources.docs import DownloadError
from bessemer.data.sources.files import Files
from bessemer.data.sources.io.paths import advice, suffix_of
from bessemer.data.sources.registry import SourceSettings, WheelsSource, open_source, source_name
from bessemer.data.sources.source import FAILURES, FIRST_LOSSES, OTHER_KIND, Source, Tally, Unit

#: Never changed, so that the split stays. Chosen so that several unlike packages of the shipped lock are held out.
_SALT = b"hold"


@dataclass(frozen=True)
class Splitter:
    """The rule: `share` of the groups is held out. `moved` (group, split) overrides the hash for one group; `by_document` makes
    every document its own group."""

    share: float
    moved: tuple[str, str] | None = None
    by_document: bool = False

    def split(self, group: str | None, identity: str) -> str:
        """The split of a document with this group and id."""
        group = self.group(group, identity)
        if self.moved and self.moved[0] == group:
            return self.moved[1]
        return VALIDATION if place_of(group) < self.share else TRAIN

    def group(self, group: str | None, identity: str) -> str:
        """The group with which a document is held out or not: its id where it has none."""
        return identity if group is None or self.by_document else group

    def remedy(self, groups: NearestGroups) -> Splitter | None:
        """How to split the same documents so that neither side is empty; None when that is so, or cannot be. The group nearest
        to the empty side moves there; a single group is split by document."""
        if not self.share or self.moved or groups.lowest is None or groups.highest is None:
            return None
        splits = {self.split(group, group) for _, group in (groups.lowest, groups.highest)}
        if len(splits) == 2:
            return None
        if groups.lowest == groups.highest:
            return None if self.by_document else Splitter(self.share, by_document=True)
        moved = (groups.lowest[1], VALIDATION) if splits == {TRAIN} else (groups.highest[1], TRAIN)
        return Splitter(self.share, moved=moved, by_document=self.by_document)


@dataclass
class NearestGroups:
    """The two groups of a corpus that lie nearest to either side: (place of the hash, name). Enough to find a remedy."""

    lowest: tuple[float, str] | None = None
    highest: tuple[float, str] | None = None

    def include(self, groups: Iterable[str]) -> None:
        """Take some groups into account."""
        for group in groups:
            placed = (place_of(group), group)
            self.lowest = min(self.lowest or placed, placed)
            self.highest = max(self.highest or placed, placed)

    @property
    def names(self) -> list[str]:
        """The names of both; empty before any group."""
        return [group[1] for group in (self.lowest, self.highest) if group is not None]


def place_of(group: str) -> float:
    """A group's hash as a number from 0 to 1."""
    return int(hash_bytes(_SALT, group.encode(), bits=64), 16) / 2**64


# notes of a source in the metrics
_MOST_NOTES = 100
_NOTES_SAID = 20
_NOTES_HELD = 1000


@dataclass(frozen=True)
class _Reading:
    """One unit of a source, read into a folder of segments."""

    source_name: str
    source: Source
    unit: Unit
    segments: Place


def collect(
    config: CollectConfig,
    out: Path,
    *,
    cache: Path,
    progress: Progress | None = None,
    folder: Path = Path(),
    removed: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """Write the documents of all sources to `out/documents` (or their index, where `config.storage` says where they are put),
    and return the stage's metrics.

    `cache` keeps downloads between runs; paths in the config are relative to `folder`; documents whose ids are in `removed`
    are left out. What is held out depends on the names of packages alone, not on a seed, so that no run trains on another's
    validation documents.
    Raises SourceError when a source does not exist, or nothing at all was found.
    """
    progress = progress or Silent()
    place, scratch = begin(config.storage, out)
    engine = config.where()
    tallies = {source_name(source): Tally() for source in config.sources}
    readings, skipped = _readings(config.sources, scratch, cache, folder, progress, tallies)
    sizes = sum(reading.unit.size_bytes for reading in readings)
    groups, documents_as_groups = NearestGroups(), NearestGroups()
    documents_of: Counter[str] = Counter()
    documents = read = 0
    speed = Speed()
    with progress.task("collecting", total=sizes or None, unit="bytes") as task:
        for number, figures in run_tasks(partial(_read, buckets=config.buckets), readings, engine):
            reading = readings[number]
            documents += figures["documents"]
            documents_of[reading.source_name] += figures["documents"]
            groups.include(figures["groups"])
            documents_as_groups.include(figures["documents_as_groups"])
            _add(tallies[reading.source_name], figures["tally"])
            read += reading.unit.size_bytes
            note = f"{documents:,} documents · {speed.of(documents, read)} · {reading.source_name}"
            task.advance(reading.unit.size_bytes, note=note)
    broken = [name for name, tally in tallies.items() if not documents_of[name] and FAILURES & tally.counts.keys()]
    for reading in readings:
        # removed, so that the next run tries again
        if reading.source_name in broken:
            _remove(reading.segments)
    if broken or not documents:
        names = broken or list(tallies)
        notes = [note for name in names for note in tallies[name].notes]
        first = f"; the first of what was set aside: {notes[0]}" if notes else ""
        raise SourceError(f"collect: no document with text was found in {', '.join(names)}{first}")

    splitter = Splitter(config.validation_share, by_document=config.hold_out == "documents")
    while (remedy := splitter.remedy(documents_as_groups if splitter.by_document else groups)) is not None:
        splitter = remedy
    merge = partial(
        _merge,
        out=place,
        readings=readings,
        splitter=splitter,
        buckets=config.buckets,
        removed=removed,
    )
    with progress.task("sorting", total=config.buckets, unit="parts") as task:
        parts = {}
        for bucket, figures in run_tasks(merge, range(config.buckets), engine):
            parts[bucket] = figures
            task.advance()
    finish(place, out, ["documents"], [part_name(bucket, config.buckets) for bucket in parts])
    metrics = stage_stats(parts[bucket] for bucket in sorted(parts))
    left_out = sum(figures["forgotten"] for figures in parts.values())
    repeated_ids = documents - metrics["documents_out"] - left_out
    _report(tallies, repeated_ids, progress)
    return metrics | {
        "documents_read": documents,
        "repeated_ids": repeated_ids,
        "forgotten": left_out,
        "skipped_sources": skipped,
        "bytes_read": {name: tally.bytes for name, tally in tallies.items()},
        "files_read": {name: tally.files for name, tally in tallies.items()},
        "problems": {name: dict(tally.counts) for name, tally in tallies.items() if tally.counts},
        "notes": {name: tally.notes[:_MOST_NOTES] for name, tally in tallies.items() if tally.notes},
        "losses": {name: tally.losses for name, tally in tallies.items() if tally.losses},
    }


def _readings(
    sources: Sequence[SourceSettings],
    scratch: Place,
    cache: Path,
    folder: Path,
    progress: Progress,
    tallies: dict[str, Tally],
) -> tuple[list[_Reading], list[str]]:
    """Every unit of every source, and the names of optional sources that cannot be fetched. Files of other kinds in
    the folders of a source are noted in its tally."""
    readings, skipped = [], []
    for settings in sources:
        name = source_name(settings)
        try:
            source = open_source(settings, folder.absolute(), cache)
            units = source.units(progress)
        except DownloadError as error:
            if not (isinstance(settings, WheelsSource) and settings.optional):
                raise
            skipped.append(name)
            progress.say(f"  going on without an optional source: {error}")
        else:
            if isinstance(source, Files) and (others := source.others()):
                _note_others(others, tallies[name])
            for unit in units:
                key = hash_bytes(name.encode(), unit.name.encode(), bits=64)
                readings.append(_Reading(name, source, unit, scratch / key))
    return readings, skipped


def _note_others(names: list[str], tally: Tally) -> None:
    """Set aside files of kinds that the source does not read, with one note for all of a kind."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(suffix_of(name), []).append(name)
    for suffix, some in kinds.items():
        more = f" and {len(some) - 1:,} more {suffix}" if len(some) > 1 else ""
        tally.set_aside(OTHER_KIND, f"{some[0]}{more}", f"not a kind of file that the source reads{advice(some[0])}")
        tally.counts[OTHER_KIND] += len(some) - 1


def _remove(folder: Place) -> None:
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        folder.remove_all()


def _read(reading: _Reading, buckets: int) -> dict[str, Any]:
    """Read what is not yet read of a unit; return what was met in all of it."""
    number, head = last_head(reading.segments)
    if not head.is_last:
        tally = Tally()
        documents = reading.source.read(reading.unit, head.position, tally)
        head = write_segments(reading.source_name, documents, reading.segments, head, number, tally, buckets)
    groups, documents_as_groups = NearestGroups(), NearestGroups()
    names = set()
    for group, identity in groups_and_ids(segment_files(reading.segments)):
        names.add(identity if group is None else group)
        documents_as_groups.include([identity])
    groups.include(names)
    return {
        "documents": head.documents,
        "tally": head.tally,
        "groups": groups.names,
        "documents_as_groups": documents_as_groups.names,
    }


def _merge(
    bucket: int, out: Place, readings: list[_Reading], splitter: Splitter, buckets: int, removed: frozenset[str]
) -> dict[str, Any]:
    """Write one part from the segments of all units, and return its figures, which are also left in the scratch folder."""
    record = out / SCRATCH / f"figures-{bucket}.json"
    if record.is_file():
        return dict(read_json(record))
    rows = BucketRows([path for reading in readings for path in segment_files(reading.segments)], bucket)
    sorted_rows, stats = in_order_of_ids(rows), PartStats()
    order = without_removed(sorted_rows, rows.ids, removed)
    with PartWriter(out / "documents" / part_name(bucket, buckets), SCHEMA) as writer:
        for batch in batch_slices(rows.sizes[order]):
            some = rows.take(order[batch])
            pairs = zip(some.column("group").to_pylist(), some.column("id").to_pylist(), strict=True)
            documents = with_split(some, [splitter.split(group, identity) for group, identity in pairs])
            stats.add(documents)
            writer.write(documents)
    figures = stats.result() | {"forgotten": len(sorted_rows) - len(order)}
    # the part is not synchronised either
    write_text(record, json.dumps(figures), synchronise=False)
    return figures


def _add(total: Tally, read: dict[str, Any]) -> None:
    total.files += read["files"]
    total.bytes += read["bytes"]
    total.counts += Counter(read["counts"])
    # sorted, so that the kept ones do not depend on the order of units
    total.notes = sorted([*total.notes, *read["notes"]])[:_NOTES_HELD]
    total.losses = sorted([*total.losses, *read.get("losses", [])])[:FIRST_LOSSES]


def _report(tallies: dict[str, Tally], repeated_ids: int, progress: Progress) -> None:
    """Report repeated ids and the sources' notes to the user."""
    if repeated_ids:
        progress.say(f"  {repeated_ids:,} documents had the id of another and were left out")
    for name, tally in tallies.items():
        for note in tally.notes[:_NOTES_SAID]:
            progress.say(f"  {note}")
        if len(tally.notes) > _NOTES_SAID:
            progress.say(f"  … and {len(tally.notes) - _NOTES_SAID} more notes like these from {name}")
