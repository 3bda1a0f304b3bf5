"""Data stages whose documents lie on a local S3 server: the bytes are those of a run on this machine's disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import cloudpickle
import pytest

from bessemer.core.errors import ArtefactError, StorageError
from bessemer.core.object_storage import ObjectPath
from bessemer.core.store import read_json
from bessemer.data.config import CleanConfig, CollectConfig, DeduplicateConfig, SelectConfig
from bessemer.data.corpus.reader import document_files, find_document, iterate_documents
from bessemer.data.corpus.remote import INDEX, documents_at_hand
from bessemer.data.engine import run_tasks
from bessemer.data.stages import collect as collecting
from bessemer.data.stages import mixture as mixture_stats
from bessemer.data.stages import transform as transforming
from bessemer.data.stages.clean import clean
from bessemer.data.stages.collect import collect
from bessemer.data.stages.deduplicate import deduplicate
from bessemer.data.stages.select import select
from tests.cases import slow
from tests.conftest import SECRET, Bucket

SETTINGS = {
    "collect": {"buckets": 2},
    "clean": {"edit": ["pii"], "score": ["gopher_quality"]},
    "deduplicate": {"methods": ["exact", "minhash", "lines"]},
    "select": {"keep": [], "languages": [], "thresholds": {"gopher_words": {"min": 40}}, "mix": {"epochs": {"web": 0.5}}},
}
KINDS = {"collect": CollectConfig, "clean": CleanConfig, "deduplicate": DeduplicateConfig, "select": SelectConfig}


@pytest.fixture(scope="module")
def records():
    """120 texts in two sources: copies, a line in common, some too short, an address in each."""
    words = ["the", "furnace", "melts", "iron", "and", "of", "that", "heat", "has", "to", "be", "cast", "hot", "with", "care"]
    texts = []
    for number in range(120):
        if number % 6 == 5:
            texts.append(texts[number // 2])
        else:
            body = " ".join(
                words[(number * 7 + k * (number % 11 + 1)) % len(words)] + str(k % 5) for k in range(20 + number % 60)
            )
            texts.append(f"{body}\n\nThis line stands in many documents of the corpus.\n\nsmelter{number}@furnace.org")
    return {
        source: [json.dumps({"id": n, "text": text}) for n, text in enumerate(texts) if n % 2 == side]
        for side, source in enumerate(("web", "books"))
    }


def run_stages(root, sources, last="select", **where):
    """The data stages one after the other; their metrics."""
    before, metrics = None, {}
    for name, kind in KINDS.items():
        out = root / f"{name}.partial"
        if (out / "documents" / INDEX).exists():  # finished before
            before = out / "documents"
            continue
        out.mkdir(parents=True, exist_ok=True)
        given = {"sources": sources} if name == "collect" else {}
        config = kind.parse(SETTINGS[name] | given | where, name)
        if name == "collect":
            metrics[name] = collect(config, out, cache=root / "cache")
        else:
            stage = {"clean": clean, "deduplicate": deduplicate, "select": select}[name]
            metrics[name] = stage(config, before, out)
        before = out / "documents"
        if name == last:
            break
    return metrics


def sources_at(root):
    return [{"source": "files", "name": name, "paths": f"{root}/{name}/*.jsonl"} for name in ("web", "books")]


@pytest.fixture(scope="module")
def local(records, tmp_path_factory):
    """A run from the disk to the disk: its folder, the folder of its sources, its metrics."""
    root = tmp_path_factory.mktemp("local")
    for source, lines in records.items():
        for part in range(3):
            path = root / "sources" / source / f"{part}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines[part::3]), encoding="utf-8")
    metrics = run_stages(root / "runs", sources_at(root / "sources"))
    assert 20 < metrics["select"]["documents_out"] < metrics["select"]["documents_in"] < 120
    return root / "runs", root / "sources", metrics


@pytest.fixture
def stored(bucket, local):
    """The same sources in a bucket."""
    _, sources, _ = local
    for path in sources.rglob("*.jsonl"):
        bucket.put(f"sources/{path.relative_to(sources).as_posix()}", path.read_bytes())
    return sources_at(f"{bucket.address}/sources")


def files_of(root):
    return {
        path.relative_to(root).as_posix().replace(".partial/", "/"): path.read_bytes() for path in root.rglob("part-*.parquet")
    }


@dataclass(frozen=True)
class Remote:
    """A run that reads a bucket and puts its documents there: what is left, and what was sent to those that did the work."""

    folder: Path
    bucket: Bucket
    metrics: dict
    sent: list[bytes]


@pytest.fixture(scope="module")
def remotes():
    return []


@pytest.fixture
def remote(remotes, bucket, stored, tmp_path_factory, monkeypatch):
    """Made for the first test that asks; its bucket stays as long as the server does."""
    if not remotes:
        sent = []

        def noted(function, pieces, engine=None):
            sent.append(cloudpickle.dumps((function, list(pieces))))
            return run_tasks(function, pieces, engine)

        for module in (collecting, transforming, mixture_stats):
            monkeypatch.setattr(module, "run_tasks", noted)
        folder = tmp_path_factory.mktemp("remote")
        remotes.append(Remote(folder, bucket, run_stages(folder, stored, storage=f"{bucket.address}/corpus"), sent))
    return remotes[0]


def test_documents_on_object_storage_are_those_on_disk_byte_for_byte(remote, local):
    here, _, expected = local
    assert remote.bucket.objects("corpus/") == files_of(here)  # and nothing else: what a next run would need is gone
    assert not list(remote.folder.rglob("*.parquet")) and not list(remote.folder.rglob(".checkpoints"))
    assert remote.metrics == expected


def test_readers_see_the_documents_wherever_they_lie(remote, local, tmp_path):
    here, _, _ = local
    one, other = (root / "clean.partial" / "documents" for root in (here, remote.folder))
    rows = [row for batch in iterate_documents(one, skip=3) for row in batch.to_pylist()]
    assert [row for batch in iterate_documents(other, skip=3) for row in batch.to_pylist()] == rows
    assert find_document(other, rows[5]["id"]) == rows[5]
    assert find_document(other, "0" * 32) is None
    copies = documents_at_hand(other, tmp_path / "copies")
    assert {path.name: path.read_bytes() for path in copies.iterdir()} == {p.name: p.read_bytes() for p in one.iterdir()}
    assert documents_at_hand(one, tmp_path / "unused") == one


def test_nothing_that_travels_to_the_workers_names_the_runs_folder_or_credentials(remote):
    assert len(remote.sent) == 7  # read, merge, clean, deduplicate, select: sizes, parts, mixture
    assert not [data for data in remote.sent if remote.folder.name.encode() in data]  # a path is pickled in its parts
    left = [path.read_bytes() for path in remote.folder.rglob("*") if path.is_file()]
    assert not [data for data in (*remote.sent, *left, *remote.bucket.objects().values()) if SECRET.encode() in data]


@pytest.fixture
def uploads(monkeypatch):
    """What is put: the names of parts and segments; once there are `most` of them the storage fails."""

    class Uploads(list):
        most = None

    names, upload = Uploads(), ObjectPath.upload

    def counted(place, file):
        if len(names) == names.most:
            raise StorageError(f"{place}: out of order")
        upload(place, file)
        names.append(place.name)

    def in_order(function, pieces, engine=None):
        yield from ((number, function(piece)) for number, piece in enumerate(pieces))

    monkeypatch.setattr(ObjectPath, "upload", counted)
    for module in (collecting, transforming, mixture_stats):
        monkeypatch.setattr(module, "run_tasks", in_order)
    return names


@pytest.mark.parametrize("most", [15, *map(slow, (0, 3, 7, 10, 19))])
def test_a_stage_that_was_stopped_goes_on_with_what_lies_on_object_storage(bucket, stored, local, tmp_path, uploads, most):
    here, _, _ = local
    uploads.most = most
    with pytest.raises(StorageError, match="out of order"):
        run_stages(tmp_path, stored, storage=f"{bucket.address}/corpus")
    (left,) = tmp_path.rglob(".checkpoints")  # what the runner takes for a stage to go on with
    assert (left / "storage").read_text(encoding="utf-8") == f"{bucket.address}/corpus/{left.parent.stem}\n"
    uploads.most = None
    run_stages(tmp_path, stored, storage=f"{bucket.address}/corpus")
    assert bucket.objects("corpus/") == files_of(here)
    # 6 segments, 2 parts, 3 times 4 parts kept and rejected, 1 file of lines to cut; of one part the first half, and the lines
    assert 21 <= len(uploads) <= 21 + 2


def test_a_part_that_is_gone_or_replaced_is_named_and_an_index_names_versions(bucket, stored, tmp_path):
    run_stages(tmp_path, stored, last="collect", storage=f"{bucket.address}/corpus/")
    documents = tmp_path / "collect.partial" / "documents"
    index = read_json(documents / INDEX)
    assert index["place"] == f"{bucket.address}/corpus/collect/documents"
    assert list(index["parts"]) == [f"part-0{number}.parquet" for number in range(2)]
    assert all(part["bytes"] > 0 and len(part["version"]) == 32 for part in index["parts"].values())

    first, second = document_files(documents)[:2]
    bucket.storage.rm(second.key)
    with pytest.raises(ArtefactError, match=f"{second}: this part of the documents is missing"):
        find_document(documents, f"{1:032x}")  # in part 1
    with pytest.raises(ArtefactError, match=f"{second}: this part of the documents is missing"):
        documents_at_hand(documents, tmp_path / "copies")
    bucket.put(first.key.partition("/")[2], b"PAR1 of somebody else")
    with pytest.raises(StorageError, match=f"{first}: it was replaced"):
        document_files(documents)
