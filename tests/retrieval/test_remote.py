"""An index on object storage: built in a copy, uploaded whole, named by a pointer; on a local S3 server."""

from __future__ import annotations

import json

import pytest

from bessemer.core.errors import ArtefactError, StorageError
from bessemer.core.object_storage import ObjectPath
from bessemer.retrieval import remote
from bessemer.retrieval.config import IndexConfig
from bessemer.retrieval.index import IndexedDocument, build_index, open_index
from bessemer.retrieval.remote import fetched, local_index, remote_index
from bessemer.retrieval.search import search
from tests.retrieval.test_commands import run

pytest.importorskip("lancedb")

IRON, COPPER = IndexedDocument("a.md", "Iron rusts in water."), IndexedDocument("b.md", "Copper turns green.")


def build(address, cache, *documents):
    with remote_index(address, cache) as folder:
        return build_index(documents, folder, IndexConfig(embedder="none"))


def found(address, cache, query="iron copper"):
    return {hit.passage.document for hit in search(open_index(fetched(address, cache)), query)}


@pytest.fixture
def address(bucket):
    return ObjectPath.parse(f"{bucket.address}/deep/handbook.index")


def versions(address):
    start = len(address.key) + 1
    return {one.key[start:].split("/")[1] for one in (address / "versions").find()}


def test_an_index_is_read_on_another_machine_and_updated_from_there(address, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    build(address, here, IRON)
    assert found(address, there) == {"a.md"}
    # what is unchanged is neither cut again nor uploaded
    assert build(address, there, IRON, COPPER).added == 1 and found(address, here) == {"a.md", "b.md"}
    names = versions(address)
    assert str(build(address, here, IRON, COPPER)).endswith("(unchanged)") and versions(address) == names
    # of earlier versions one stays, which readers may be fetching
    build(address, here, COPPER)
    assert found(address, there) == {"b.md"} and {name.partition("-")[0] for name in versions(address)} == {"2", "3"}


def test_a_reader_finds_a_whole_version_whenever_the_writer_is_killed(address, tmp_path, monkeypatch):
    build(address, tmp_path / "a", IRON)
    uploads = []

    class Killed(BaseException):
        pass

    real = ObjectPath.upload

    def upload(self, file):
        if len(uploads) == limit:
            raise Killed
        uploads.append(self.name)
        real(self, file)

    monkeypatch.setattr(ObjectPath, "upload", upload)
    for limit in (0, 3):
        uploads.clear()
        with pytest.raises(Killed):
            build(address, tmp_path / "b", IRON, COPPER)
        assert found(address, tmp_path / "reader") == {"a.md"}, limit
    monkeypatch.setattr(remote.ObjectPath, "write_text", lambda *_, **__: (_ for _ in ()).throw(Killed))
    monkeypatch.setattr(ObjectPath, "upload", real)
    with pytest.raises(Killed):
        build(address, tmp_path / "b", IRON, COPPER)
    assert found(address, tmp_path / "reader") == {"a.md"}
    monkeypatch.undo()


def test_the_next_build_goes_on_with_what_was_built_and_removes_what_was_left(address, tmp_path, monkeypatch):
    build(address, tmp_path / "a", IRON)
    with monkeypatch.context() as patch:
        patch.setattr(ObjectPath, "write_text", lambda *_, **__: (_ for _ in ()).throw(StorageError("gone")))
        with pytest.raises(StorageError, match="gone"):
            build(address, tmp_path / "a", IRON, COPPER)
    assert len(versions(address)) == 2
    # the documents are in the copy already
    assert build(address, tmp_path / "a", IRON, COPPER).added == 0
    assert found(address, tmp_path / "b") == {"a.md", "b.md"} and len(versions(address)) == 2


def test_a_writer_is_refused_where_another_one_was_faster(address, tmp_path):
    build(address, tmp_path / "a", IRON)
    with (
        pytest.raises(ArtefactError, match="another process has written this index meanwhile"),
        remote_index(address, tmp_path / "a") as folder,
    ):
        build_index([IRON, COPPER], folder)
        build(address, tmp_path / "b", COPPER)
    assert found(address, tmp_path / "c") == {"b.md"} and len(versions(address)) == 2
    # and works on the other's version the next time
    assert build(address, tmp_path / "a", IRON, COPPER).added == 1
    assert found(address, tmp_path / "c") == {"a.md", "b.md"}


def test_what_is_missing_damaged_or_no_index_is_one_line(address, bucket, tmp_path):
    with pytest.raises(ArtefactError, match=r"s3://.*handbook\.index: no index of documents is here"):
        fetched(address, tmp_path)
    build(address, tmp_path / "a", IRON)
    place = json.loads((address / "index.json").read_text(encoding="utf-8"))["place"]
    (address / place).remove_all()
    with pytest.raises(ArtefactError, match="the version that the index names is not there"):
        fetched(address, tmp_path / "b")
    for text in ("no JSON", "[]", '{"version": 1, "config": {}}'):
        bucket.put("deep/handbook.index/index.json", text.encode())
        with pytest.raises(ArtefactError, match="this is no index of documents on object storage"):
            fetched(address, tmp_path / "b")


def test_commands_take_an_address_in_place_of_a_folder(address, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(remote, "cache_folder", lambda: tmp_path / "cache")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "metal.md").write_text("# Iron\n\nIron rusts in water.\n", encoding="utf-8")
    code, printed, _ = run(capsys, "index", str(tmp_path / "docs"), str(address), "--embedder", "none")
    assert code == 0 and "1 documents" in printed and f"{address}: uploaded" in printed
    assert local_index(str(address)).is_relative_to(tmp_path / "cache")
    code, printed, _ = run(capsys, "search", str(address), "rusts")
    assert code == 0 and "Iron rusts in water." in printed
    code, _, error = run(capsys, "index", str(tmp_path / "docs"), str(address), "--watch", "5")
    assert code == 2 and "--watch: of an index in a folder" in error
    # nobody's paths are there
    assert not (address / "roots.json").exists()
