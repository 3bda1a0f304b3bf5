"""Sources on object storage, read from a local S3 server as they are read from a disk."""

from __future__ import annotations

import gzip
import sys

import pytest

from bessemer.core.errors import ConfigError, SourceError, StorageError
from bessemer.data.sources.source import Tally
from tests.cases import slow
from tests.data.sources.makers import examples, found, json_lines, opened, page, warc, zipped

EXAMPLES = examples()


def test_every_source_reads_objects_as_it_reads_files_and_goes_on_inside_them(tmp_path, bucket):
    for kind, name, content in EXAMPLES:
        folder = f"{kind}-{name}".replace(".", "-")
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(content)
        bucket.put(f"{folder}/{name}", content)
        here, there = Tally(), Tally()
        expected = [(p, d) for _, p, d in found(opened(kind, tmp_path / folder), here)]
        source = opened(kind, tmp_path, paths=[f"{bucket.address}/{folder}"])
        (unit,) = source.units()
        assert list(source.read(unit, 0, there)) == expected, folder
        assert there == here, folder
        middle = len(expected) // 2
        assert list(source.read(unit, expected[middle][0], Tally())) == expected[middle + 1 :], folder


TREE = {
    "LICENSE": b"MIT License\n\nPermission is hereby granted, free of charge, to any person obtaining a copy",
    "src/steel.py": b"def melt():\n    return 1538\n",
    "src/deep/iron.py": b"# Iron\nORE = 'magnetite'\n",
    "paper/main.tex": b"\\documentclass{article}\\begin{document}Before. \\input{part} After.\\end{document}",
    "paper/part.tex": b"The part that was put in.",
    "pages/a.html": page("<p>Steel.</p>"),
    "pages/b.zip": zipped({"c.html": page("<p>Iron.</p>").decode()}),
    "texts/a.jsonl": json_lines([{"id": 1, "text": "Ore."}]),
}


@pytest.fixture
def tree(tmp_path, bucket):
    """The same tree twice; its roots, on the disk and on the server."""
    for name, content in TREE.items():
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        bucket.put(f"deep/tree/{name}", content)
    return str(tmp_path / "tree"), f"{bucket.address}/deep/tree"


@pytest.mark.parametrize(
    ("kind", "paths"),
    [
        ("code", [""]),  # the licence stands in a file above
        slow("code", ["src/**/*.py"]),
        ("code", ["src/deep", "src/st*.py"]),
        ("latex", ["paper/main.tex"]),  # which reads its neighbour
        slow("html", ["pages/*"]),
        ("html", ["pages/[b]*", "pages/a.html"]),
    ],
)
def test_a_tree_has_the_same_names_licences_and_neighbours_wherever_it_lies(tree, tmp_path, kind, paths):
    read = [
        [(unit.name, d) for unit, _, d in found(opened(kind, tmp_path, paths=[f"{root}/{path}" for path in paths]))]
        for root in tree
    ]
    assert read[0] and read[1] == read[0]


def test_the_fingerprint_is_that_of_the_objects_and_opens_none(bucket, tmp_path, monkeypatch):
    bucket.put("a.jsonl", b'{"text": "Iron"}\n')
    source = opened("chats", tmp_path, paths=[bucket.address + "/*.jsonl"])
    monkeypatch.setattr("bessemer.core.object_storage.ObjectPath.open", None)
    before = source.fingerprint()
    bucket.put("a.jsonl", b'{"text": "Iron"}\n')
    assert source.fingerprint() == before
    bucket.put("a.jsonl", b'{"text": "Gold"}\n')
    assert source.fingerprint() != before


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["s3://BUCKET/none"], "s3://BUCKET/none: no such object or folder"),
        (["s3://BUCKET/*.warc"], "holds no file that the source reads"),
        (["s3://BUCKET/a.bin"], "not a kind of file that the source reads"),
        (["s3://BUCKET/a.bin", "b.warc"], "the paths of one source lie in one storage"),
        (["s3://"], "not an address such as s3://bucket/folder"),
        (["s3://key:word@BUCKET/a"], "s3://…@…: an address holds no credentials"),
    ],
)
def test_what_cannot_be_found_is_named(bucket, tmp_path, paths, message):
    bucket.put("a.bin", b"x")
    paths = [path.replace("BUCKET", bucket.name) for path in paths]
    with pytest.raises(SourceError) as error:
        opened("warc", tmp_path, paths=paths).units()
    assert message.replace("BUCKET", bucket.name) in str(error.value) and "\n" not in str(error.value)
    assert "word" not in str(error.value)


def test_a_missing_package_is_named_with_the_extra_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"gs://b/a: needs the package gcsfs: pip install .*\[gs\]'"):
        opened("warc", tmp_path, paths=["gs://b/a"]).units()


@pytest.mark.parametrize(
    ("kind", "name"),
    [("warc", "a.warc.gz"), ("html", "a.zip"), ("html", "a.tar.gz"), ("tables", "a.parquet"), ("mbox", "a.mbox")],
)
def test_a_connection_that_breaks_ends_the_run_and_is_no_damage_of_the_file(bucket, tmp_path, monkeypatch, kind, name):
    (content,) = [content for of, named, content in EXAMPLES if (of, named) == (kind, name)]
    bucket.put(name, content)
    source = opened(kind, tmp_path, paths=[f"{bucket.address}/{name}"])

    def broken(*_):
        raise ConnectionResetError("connection reset by peer")

    monkeypatch.setattr("s3fs.core.S3File._fetch_range", broken)
    with pytest.raises(StorageError, match=f"{name}: connection reset by peer"):
        found(source)


def test_an_object_that_is_replaced_while_it_is_read_ends_the_run(bucket, tmp_path):
    bucket.put("a.warc.gz", gzip.compress(b""))
    source = opened("warc", tmp_path, paths=[bucket.address])
    (unit,) = source.units()
    bucket.put("a.warc.gz", warc([("http://e.org/", page("<p>Another</p>"))]))
    with pytest.raises(StorageError, match="it was replaced while it was in use; run again"):
        list(source.read(unit, 0, Tally()))
