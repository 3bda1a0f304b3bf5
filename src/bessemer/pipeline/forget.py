"""Removes a document from every corpus of a store, and names what was made from it.

Parts are rewritten by their own writer: every other document keeps its bytes. Tokens and models made from the document are
named, and removed on request; they can only be made again. Keys of artefacts stay, since `collect` honours the list of
forgotten ids (`bessemer.data.corpus.reader`) and would make the same corpus again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.hashing import hash_files
from bessemer.core.store import MANIFEST, Artefact, Store, follow, read_json, write_json
from bessemer.data.corpus.reader import (
    SIDES,
    add_removed_ids,
    document_schema,
    find_document,
    holds_documents,
    iterate_documents,
    part_of,
    read_part,
)
from bessemer.data.corpus.remote import INDEX, copies_of, replacing
from bessemer.data.corpus.writer import PartWriter
from bessemer.pipeline.stages import STAGES

_REASON = "reason"


@dataclass(frozen=True)
class Holding:
    """A finished data stage that has the document on one of its `SIDES`; `forgotten` is when it was taken out, if it was."""

    key: str
    folder: Path
    stage: str
    side: str
    split: str
    forgotten: str | None = None


@dataclass(frozen=True)
class Derived:
    """An artefact made, directly or not, from a corpus while it held the document; `remedy` is what to do about it."""

    key: str
    folder: Path
    stage: str
    remedy: str
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Copy:
    """Another document with the same text, or one that was dropped as a copy of it."""

    identity: str
    why: str


@dataclass(frozen=True)
class Traces:
    """Where a document is in a store, and what was made from it."""

    identity: str
    holdings: Sequence[Holding]
    derived: Sequence[Derived]
    copies: Sequence[Copy] = ()
    #: Folders of interrupted stages, which may hold it.
    unfinished: Sequence[Path] = field(default_factory=tuple)

    @property
    def present(self) -> list[Holding]:
        """The holdings that still have it."""
        return [holding for holding in self.holdings if holding.forgotten is None]

    @property
    def was_trained_on(self) -> bool:
        """Whether it lay in a split that models are trained on; what is held out is only measured."""
        return any(holding.split != "validation" for holding in self.holdings)


def trace(runs: Path, identity: str, *, copies: bool = True) -> Traces:
    """Find a document's traces in the store of `runs`. Nothing is changed.

    copies: look for copies too, which reads the ids and reasons of all documents. Raises ArtefactError for a damaged folder.
    """
    store = Store(runs / ".store")
    finished = sorted(path.parent for path in store.root.glob(f"*/{MANIFEST}") if not path.parent.name.endswith(".partial"))
    manifests = {folder.name: Artefact(folder.name, folder).manifest for folder in finished}
    manifests = dict(sorted(manifests.items(), key=lambda item: (str(item[1]["created"]), _generation(item[0], manifests))))
    holdings = [
        holding for key, manifest in manifests.items() for holding in _holdings(key, store.root / key, manifest, identity)
    ]
    return Traces(
        identity,
        holdings,
        _derived(store, manifests, holdings, _runs_by_key(runs)),
        _copies(store, manifests, holdings, identity) if copies else (),
        tuple(sorted(store.root.glob("*.partial"))),
    )


def texts_of(traces: Traces) -> list[str]:
    """The different texts under which corpora still hold the document; stages that edit texts leave several."""
    rows = (find_document(holding.folder / holding.side, traces.identity) for holding in traces.present)
    return list(dict.fromkeys(row["text"] for row in rows if row is not None))


class TestedModel(NamedTuple):
    """A model that saw the document. is_quantised: its weights are rounded already, and are tested as they are."""

    key: str
    folder: Path
    is_quantised: bool


def models_of(traces: Traces) -> list[TestedModel]:
    """The models that saw the document: those that were trained, merged or quantised."""
    models = []
    for derived in traces.derived:
        spec = STAGES.get(derived.stage)
        for kind in ("model", "quantised"):
            if spec is None or kind not in spec.makes or (kind == "model" and not spec.trains and derived.stage == "model"):
                continue
            if (folder := derived.folder / spec.makes[kind]).is_dir():
                models.append(TestedModel(derived.key, folder, kind == "quantised"))
    return models


def forget(runs: Path, traces: Traces, *, now: datetime | None = None) -> None:
    """Remove the document from every corpus that holds it and from examples in manifests and reports, and keep it out.

    Its id is written to the store's list first, so that a second call continues after an interruption.
    """
    from bessemer.pipeline.report import write_report
    from bessemer.pipeline.run_folder import RunFolder

    store = Store(runs / ".store")
    add_removed_ids(store.root, [traces.identity])
    date = (now or datetime.now(UTC)).isoformat(timespec="seconds")
    for key in dict.fromkeys(holding.key for holding in traces.present):
        with store.lock(key):
            _take_out(store.root / key, [holding for holding in traces.present if holding.key == key], traces.identity, date)
            shutil.rmtree(copies_of(runs / ".cache", key), ignore_errors=True)
    touched = {holding.key for holding in traces.holdings}
    for run in sorted(path.parent for path in runs.glob("*/run.json")):
        folder = RunFolder(runs, run.name)
        if (run / "report.html").exists() and touched & {stage.name for stage in folder.stages().values()}:
            write_report(folder)


def remove_derived(runs: Path, keys: Sequence[str]) -> None:
    """Remove artefacts from the store, so that the next run makes them anew."""
    store = Store(runs / ".store")
    for key in keys:
        with store.lock(key):
            store.remove(key)


def _holdings(key: str, folder: Path, manifest: Mapping[str, Any], identity: str) -> Iterator[Holding]:
    """Where a stage has or had the document. A removal without a date was interrupted and has to be repeated."""
    records = {record["side"]: record for record in manifest.get("forgotten", []) if record["id"] == identity}
    for side in _sides(folder):
        row = find_document(folder / side, identity)
        if row is not None:
            yield Holding(key, folder, manifest["stage"], side, row["split"])
        elif side in records:
            yield Holding(key, folder, manifest["stage"], side, records[side]["split"], records[side]["date"])


def _generation(key: str, manifests: Mapping[str, Mapping[str, Any]]) -> int:
    """Length of the longest chain of stages that led to an artefact: it orders those of the same second."""
    sources = [source["key"] for source in manifests[key]["inputs"].values() if source["key"] in manifests]
    return 1 + max((_generation(source, manifests) for source in sources), default=0)


def _sides(folder: Path) -> list[str]:
    return [side for side in SIDES if holds_documents(folder / side)]


def _derived(
    store: Store, manifests: Mapping[str, Mapping[str, Any]], holdings: Sequence[Holding], runs: Mapping[str, Sequence[str]]
) -> list[Derived]:
    """Artefacts that read the document, and those made from them, without data stages: these are holdings.

    A corpus that has forgotten the document counts for what was made before that.
    """
    # key of a corpus → when it forgot the document; None: it holds it still
    saw: dict[str, str | None] = {}
    for holding in holdings:
        if holding.side == "documents":
            saw[holding.key] = holding.forgotten
    tainted: list[str] = []
    waiting = list(manifests)
    while waiting:
        readers = [
            key
            for key in waiting
            if not _sides(store.root / key)
            and any(
                source["key"] in tainted or (source["key"] in saw and _before(manifests[key]["created"], saw[source["key"]]))
                for source in manifests[key]["inputs"].values()
            )
        ]
        if not readers:
            break
        tainted += readers
        waiting = [key for key in waiting if key not in readers]
    return [
        Derived(key, store.root / key, kind, STAGES[kind].remedy if kind in STAGES else "make again", tuple(runs.get(key, ())))
        for key, kind in ((key, manifests[key]["stage"]) for key in tainted)
    ]


def _before(created: str, forgotten: str | None) -> bool:
    return forgotten is None or datetime.fromisoformat(created) <= datetime.fromisoformat(forgotten)


def _runs_by_key(runs: Path) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for run in sorted(path.parent for path in runs.glob("*/run.json")):
        for link in sorted((run / "stages").glob("*")):
            names.setdefault(follow(link).name, []).append(run.name)
    return names


def _copies(store: Store, manifests: Mapping[str, Mapping[str, Any]], holdings: Sequence[Holding], identity: str) -> list[Copy]:
    """Other documents of the store: with the same text, dropped as copies of this one, or kept in its place."""
    hashes: set[str] = set()
    copies: dict[str, str] = {}
    for holding in holdings:
        if holding.forgotten is None and (row := find_document(holding.folder / holding.side, identity)):
            hashes.add(row["text_hash"])
            reason = row.get(_REASON) or ""
            if " duplicate of " in f" {reason}":
                copies.setdefault(reason.partition(" of ")[2][:32], "it stayed in the place of this one")
    for key in manifests if holdings else ():
        for side in _sides(store.root / key):
            columns = ["id", "text_hash", *([_REASON] if side == "rejected" else [])]
            for batch in iterate_documents(store.root / key / side, columns, batch_rows=1 << 16):
                _note_copies(batch, hashes, identity, copies)
    copies.pop(identity, None)
    return [Copy(other, why) for other, why in sorted(copies.items())]


def _note_copies(batch: pa.RecordBatch, hashes: set[str], identity: str, copies: dict[str, str]) -> None:
    same = pc.is_in(batch.column("text_hash"), pa.array(sorted(hashes), pa.string()))
    for other in batch.column("id").filter(same).to_pylist():
        copies.setdefault(other, "it has the same text")
    if _REASON in batch.schema.names:
        named = pc.match_substring(batch.column(_REASON), f" of {identity}")
        for other, reason in zip(
            batch.column("id").filter(named).to_pylist(), batch.column(_REASON).filter(named).to_pylist(), strict=True
        ):
            copies.setdefault(other, f"it was dropped as a {reason.partition(' of ')[0]} of this one")


def _take_out(folder: Path, holdings: Sequence[Holding], identity: str, date: str) -> None:
    """Rewrite the parts without the document, and in the manifest their hashes, the examples, and a record of the removal.

    The record is first written without a date: a removal that is killed in between is seen and repeated.
    """
    manifest = read_json(folder / MANIFEST, "manifest")
    manifest["metrics"] = _without(manifest["metrics"], identity)
    sides = {holding.side: holding.split for holding in holdings}
    others = [record for record in manifest.get("forgotten", []) if record["id"] != identity or record["side"] not in sides]

    def note(when: str | None) -> None:
        own = [{"id": identity, "date": when, "side": side, "split": split} for side, split in sides.items()]
        manifest["forgotten"] = [*others, *own]
        write_json(folder / MANIFEST, manifest)

    note(None)
    for side in sides:
        path = part_of(folder / side, identity)
        if find_document(folder / side, identity) is not None:
            with replacing(folder / side, path), PartWriter(path, document_schema(folder / side)) as writer:
                for batch in read_part(path):
                    writer.write(batch.filter(pc.not_equal(batch.column("id"), identity)))
        manifest["outputs"] |= hash_files(folder, [path if isinstance(path, Path) else folder / side / INDEX])
    note(date)


def _without(value: Any, identity: str) -> Any:
    """A JSON value without the objects in its lists that have the document's id."""
    if isinstance(value, dict):
        return {key: _without(item, identity) for key, item in value.items()}
    if isinstance(value, list):
        return [_without(item, identity) for item in value if not (isinstance(item, dict) and item.get("id") == identity)]
    return value
