from __future__ import annotations

import io
import json
import re

import pytest

from bessemer.core.errors import ConfigError, SourceError
from bessemer.core.hashing import hash_files, hash_value
from bessemer.core.progress import PlainLines
from bessemer.data.config import COLLECT_VERSION, CollectConfig, SelectConfig
from bessemer.data.corpus import staging
from bessemer.data.corpus.reader import VALIDATION, iterate_documents
from bessemer.data.sources import python_docs
from bessemer.data.sources.registry import source_fingerprint
from bessemer.data.sources.user import UserFunction
from bessemer.data.stages.collect import Splitter, collect
from bessemer.data.stages.select import select
from tests.cases import slow


def gather(tmp_path, sources, *, name="out", share=0.05, folder=None, progress=None, **settings):
    out = tmp_path / name
    out.mkdir(exist_ok=True)
    config = CollectConfig.parse({"sources": sources, "validation_share": share, **settings})
    metrics = collect(config, out, cache=tmp_path / "cache", folder=folder or tmp_path, progress=progress)
    return [row for batch in iterate_documents(out / "documents") for row in batch.to_pylist()], metrics


def content_hash(rows):
    """Hash of what is in a folder, whichever version of Parquet's library wrote it."""
    return hash_value([{**row, "metadata": sorted(map(list, row["metadata"]))} for row in rows])


class Heard:
    """A progress that keeps what was said."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)

    def task(self, *arguments, **options):
        from bessemer.core.progress import Silent

        return Silent().task(*arguments, **options)


def test_progress_tells_documents_and_bytes_a_second_and_the_share_kept(tmp_path):
    texts = "".join(json.dumps({"id": n, "text": f"text {n}", "license": "MIT" if n % 4 else "BSD"}) + "\n" for n in range(40))
    (tmp_path / "a.jsonl").write_text(texts, encoding="utf-8")
    stream = io.StringIO()
    gather(tmp_path, [{"source": "files", "paths": "a.jsonl"}], progress=PlainLines(stream, interval=0))
    (tmp_path / "selected").mkdir()
    settings = SelectConfig.parse({"keep": "all", "languages": [], "licenses": ["MIT"]})
    select(settings, tmp_path / "out" / "documents", tmp_path / "selected", progress=PlainLines(stream, interval=0))
    speed = r"[\d,]+ documents/s · [\d.]+ k?M?B/s"
    assert re.search(rf"collecting: .* · 40 documents · {speed} · files", stream.getvalue())
    assert re.search(rf"applying thresholds: 40/40 documents · {speed} · 75% kept", stream.getvalue())


def test_the_bytes_do_not_depend_on_how_many_files_hold_the_records(tmp_path, prose):
    records = [{"text": prose(n), "package": f"p{n % 9}"} | ({"id": n} if n % 2 else {}) for n in range(200)]
    written = []
    for count in (1, 7, 64):
        folder = tmp_path / f"in{count}"
        folder.mkdir()
        for index in range(count):
            lines = [json.dumps(record) + "\n" for record in records[index::count]]
            (folder / f"{index}.jsonl").write_text("".join(reversed(lines)), encoding="utf-8")
        gather(tmp_path, [{"source": "files", "paths": "."}], name=f"out{count}", folder=folder)
        written.append(hash_files(tmp_path / f"out{count}", (tmp_path / f"out{count}").rglob("*.parquet")))
    assert written[0] == written[1] == written[2]


def test_an_interrupted_collection_goes_on_behind_the_last_closed_segment(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "_ROWS_PER_SEGMENT", 10)
    body = "def f(fails):\n    for n in range(95):\n        if n == fails:\n            raise SourceError('that is all')\n"
    body = "from bessemer.core.errors import SourceError\n\n" + body
    (tmp_path / "mine.py").write_text(body + "        yield {'id': n, 'text': f'text {n} of {fails}'}\n", encoding="utf-8")
    source = {"source": "mine.py:f", "options": {"fails": 57}}
    with pytest.raises(SourceError, match="that is all"):
        gather(tmp_path, [source])
    rows, metrics = gather(tmp_path, [source | {"options": {"fails": -1}}])
    assert sorted(row["text"].endswith("57") for row in rows) == [False] * 45 + [True] * 50  # fifty were not read again
    assert (metrics["documents_read"], metrics["repeated_ids"]) == (95, 0)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["documents"]


def test_a_heading_stands_above_the_text_but_does_not_tell_copies_apart(tmp_path, lock, pip):
    rows, _ = gather(tmp_path, [{"source": "wheels", "lock": "my.lock"}])
    melt = next(row for row in rows if dict(row["metadata"])["qualname"] == "Ingot.melt")
    assert melt["text"] == (
        "ingot.files.Ingot.melt(self, temperature=1538.0, /, *others, **options)\n\nMelt it.\n\nSlowly:\n    with care."
    )
    (tmp_path / "melt.jsonl").write_text(json.dumps({"text": "Melt it. Slowly: with care."}) + "\n", encoding="utf-8")
    (plain,), _ = gather(tmp_path, [{"source": "files", "paths": "melt.jsonl"}], name="plain")
    assert plain["text_hash"] == melt["text_hash"]


def test_the_output_of_this_version_is_fixed(tmp_path, lock, pip, prose):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.md").write_text(prose(1) + "\n\n" + prose(2), encoding="utf-8")
    (tmp_path / "texts" / "b.jsonl").write_text(
        json.dumps({"id": "x", "text": prose(3), "license": "MIT"}) + "\n", encoding="utf-8"
    )
    rows, _ = gather(tmp_path, [{"source": "wheels", "lock": "my.lock"}, {"source": "files", "paths": "texts"}], share=0.4)
    assert (COLLECT_VERSION, content_hash(rows)) == (5, "a6b3c657f746b1af2854250e190b75ee"), (
        "another output needs another COLLECT_VERSION"
    )


@pytest.mark.parametrize("packages, least", [(("json/", "asyncio/"), 300), slow("", 1000)], ids=["two packages", "all"])
def test_the_standard_library_is_collected_with_its_licence(tmp_path, monkeypatch, packages, least):
    files = python_docs._files
    monkeypatch.setattr(python_docs, "_files", lambda root: [name for name in files(root) if name.startswith(packages)])
    rows, metrics = gather(tmp_path, ["python_docs"])
    decoder = next(row for row in rows if dict(row["metadata"])["qualname"] == "JSONDecoder.raw_decode")
    assert decoder["license"] == "PSF-2.0"
    assert decoder["text"].startswith("json.decoder.JSONDecoder.raw_decode(self, s, idx=0)\n\nDecode a JSON document")
    assert metrics["documents_out"] > least
    assert {row["split"] for row in rows} == {"train", "validation"}


def test_a_missing_index_is_fatal_unless_the_source_is_optional(tmp_path, lock, pip):
    pip.has_index = False
    (tmp_path / "a.txt").write_text("text", encoding="utf-8")
    wheels = {"source": "wheels", "lock": "my.lock"}
    files = {"source": "files", "paths": "a.txt"}
    with pytest.raises(SourceError, match=r"pip could not download ingot-tools 1.2"):
        gather(tmp_path, [wheels, files], name="fatal")
    heard = Heard()
    rows, metrics = gather(tmp_path, [wheels | {"optional": True}, files], progress=heard)
    assert [row["source"] for row in rows] == ["files"]
    assert metrics["skipped_sources"] == ["wheels"]
    assert any("going on without an optional source" in line for line in heard.lines)


def test_an_optional_source_that_cannot_be_fetched_has_another_fingerprint(tmp_path, lock, pip):
    (source,) = CollectConfig.parse([{"source": "wheels", "lock": "my.lock", "optional": True}]).sources
    options = {"cache": tmp_path / "cache", "folder": tmp_path}
    pip.has_index = False
    assert source_fingerprint(source, **options) == {"lock": None}
    pip.has_index = True
    assert source_fingerprint(source, **options, fetch=False) == {"lock": None}
    fetched = source_fingerprint(source, **options)
    assert fetched["lock"]
    assert source_fingerprint(source, **options, fetch=False) == fetched


def test_a_users_function_is_a_source(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def numbers(count):\n    for n in range(count):\n        yield {'id': n, 'text': f'text {n}'}\n", encoding="utf-8"
    )
    rows, _ = gather(tmp_path, [{"source": "mine.py:numbers", "options": {"count": 3}}])
    assert sorted(row["text"] for row in rows) == ["text 0", "text 1", "text 2"]
    assert {row["source"] for row in rows} == {"numbers"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    raise RuntimeError('no')", "mine.py:f: it failed: RuntimeError: no"),
        ("    return [{'txt': 1}]", "mine.py:f: record 1: a record needs a 'text'"),
        ("    return ['x', {}]", "mine.py:f: record 1: a record needs to be a dict, got str"),
        ("    return map(int, ['x', 'y'])", "mine.py:f: record 1: it failed: ValueError: invalid literal"),
        ("    return [{}] * 1000", "mine.py:f: record 1: .*; so it was with the first 100 records"),
        ("    yield {'text': 1}\n    raise KeyError('no')", "mine.py:f: record 1: a record needs a 'text'"),
        ("    return None", "mine.py:f: it failed: TypeError"),
    ],
)
def test_a_users_function_that_fails_is_named(tmp_path, body, message):
    (tmp_path / "mine.py").write_text(f"def f():\n{body}\n", encoding="utf-8")
    with pytest.raises(SourceError, match=message):
        gather(tmp_path, ["mine.py:f"])


@pytest.mark.parametrize(
    ("body", "problem", "note"),
    [
        (
            "    yield {'text': 'a'}\n    yield {'txt': 1}\n    yield {'text': 'b'}",
            "bad_records",
            "mine.py:f: record 2: a record needs a 'text' that is a string, got NoneType",
        ),
        (
            "    return map(lambda text: {'text': text[0]}, ['a', '', 'b'])",
            "bad_records",
            "mine.py:f: record 2: it failed: IndexError: string index out of range",
        ),
        (
            "    yield {'text': 'a'}\n    yield {'text': 'b'}\n    raise ValueError('no')",
            "failed_functions",
            "mine.py:f: it failed behind record 2, and what would follow is missing: ValueError: no",
        ),
    ],
)
def test_what_a_users_function_fails_on_is_set_aside_with_its_reason(tmp_path, body, problem, note):
    (tmp_path / "mine.py").write_text(f"def f():\n{body}\n", encoding="utf-8")
    heard = Heard()
    rows, metrics = gather(tmp_path, ["mine.py:f"], progress=heard)
    assert sorted(row["text"] for row in rows) == ["a", "b"]
    assert (metrics["problems"], metrics["notes"]) == ({"f": {problem: 1}}, {"f": [note]})
    assert any(note in line for line in heard.lines)


def test_a_source_of_which_nothing_could_be_read_ends_the_run_and_the_next_one_tries_again(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("iron", encoding="utf-8")
    (tmp_path / "mine.py").write_text("def f():\n    yield {'text': 'steel'}\n", encoding="utf-8")
    whole = UserFunction.read

    def broken(source, unit, start, tally):
        tally.set_aside("broken_streams", unit.name, "it broke behind row 0")
        yield from ()

    monkeypatch.setattr(UserFunction, "read", broken)
    sources = [{"source": "files", "paths": "a.txt"}, "mine.py:f"]
    message = "no document with text was found in f; the first of what was set aside: mine.py:f: it broke behind row 0"
    with pytest.raises(SourceError, match=message):
        gather(tmp_path, sources)
    monkeypatch.setattr(UserFunction, "read", whole)
    rows, metrics = gather(tmp_path, sources)
    assert sorted(row["text"] for row in rows) == ["iron", "steel"]
    assert metrics["problems"] == {}


def test_a_users_function_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no file .*mine\.py"):
        gather(tmp_path, ["mine.py:f"])


def test_sources_without_any_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text(" \n\n ", encoding="utf-8")
    with pytest.raises(SourceError, match="no document with text was found in files"):
        gather(tmp_path, [{"source": "files", "paths": "a.txt"}])


def test_lone_surrogates_are_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud800 b", "url": "\\udfff"}\n', encoding="utf-8")
    rows, _ = gather(tmp_path, [{"source": "files", "paths": "a.jsonl"}])
    assert rows[0]["text"] == "a ? b"


RECORDS = {
    "files": lambda n, text: {"id": n, "text": text},
    "tables": lambda n, text: {"id": n, "text": text},
    "chats": lambda n, text: {"id": n, "messages": [text]},
    "discourse": lambda n, text: {"id": n, "posts": [{"raw": text}]},
}


@pytest.mark.parametrize("source", RECORDS)
def test_records_of_two_shards_that_are_both_numbered_from_0_are_all_kept(tmp_path, source):
    for shard in range(2):
        lines = [json.dumps(RECORDS[source](n, f"record {n} of shard {shard}")) + "\n" for n in range(100)]
        (tmp_path / f"shard-{shard}.jsonl").write_text("".join(lines), encoding="utf-8")
    rows, metrics = gather(tmp_path, [{"source": source, "paths": "*.jsonl"}])
    assert len({row["id"] for row in rows}) == len({row["text"] for row in rows}) == 200
    assert metrics["repeated_ids"] == 0


def test_different_records_with_one_id_are_all_kept_and_on_one_side_of_the_split(tmp_path):
    lines = [json.dumps({"id": n // 4, "text": f"chunk {n}"}) + "\n" for n in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    rows, _ = gather(tmp_path, [{"source": "files", "paths": "a.jsonl"}], share=0.3)
    splits = {}
    for row in rows:
        splits.setdefault(int(row["text"].split()[1]) // 4, set()).add(row["split"])
    assert len(rows) == 200
    assert [len(found) for found in splits.values()] == [1] * 50
    assert set().union(*splits.values()) == {"train", "validation"}


def test_repeated_ids_are_counted_and_said(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"id": 1, "text": "a"}\n{"id": 1, "text": "a"}\n{"text": "c"}\n{"text": "c"}\n', encoding="utf-8"
    )
    heard = Heard()
    rows, metrics = gather(tmp_path, [{"source": "files", "paths": "a.jsonl"}], progress=heard)
    assert (len(rows), metrics["repeated_ids"], metrics["documents_read"]) == (2, 2, 4)
    assert any("2 documents had the id of another" in line for line in heard.lines)


def test_a_package_lies_in_one_split_wherever_its_documents_stand():
    splitter = Splitter(0.3)
    splits = {package: {splitter.split(package, f"{n}") for n in range(5)} for package in map(str, range(200))}
    assert all(len(found) == 1 for found in splits.values())
    held_out = sum(found == {VALIDATION} for found in splits.values())
    assert 40 < held_out < 80


def test_a_larger_share_only_adds_packages():
    few, many = Splitter(0.1), Splitter(0.3)
    held_out = [{name for name in map(str, range(300)) if splitter.split(name, "") == VALIDATION} for splitter in (few, many)]
    assert held_out[0] < held_out[1]


@pytest.mark.parametrize("groups", [2, 3, 12])
def test_neither_side_is_empty_when_there_are_two_groups(tmp_path, groups):
    lines = [json.dumps({"id": n, "text": f"text {n}", "package": f"p{n % groups}"}) + "\n" for n in range(24)]
    (tmp_path / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    for share in (1e-9, 0.5):
        rows, _ = gather(tmp_path, [{"source": "files", "paths": "a.jsonl"}], name=f"out{share}", share=share)
        split_of = {}
        for row in rows:
            split_of.setdefault(dict(row["metadata"])["package"], set()).add(row["split"])
        assert all(len(splits) == 1 for splits in split_of.values())
        assert set().union(*split_of.values()) == {"train", "validation"}


def test_a_single_long_file_is_split_by_its_pieces(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"paragraph {n}\n\n" for n in range(200)), encoding="utf-8")
    rows, _ = gather(tmp_path, [{"source": "files", "paths": "book.txt", "max_document_bytes": 40}])
    assert {row["split"] for row in rows} == {"train", "validation"}


def test_of_a_few_files_pieces_are_held_out_where_documents_are(tmp_path):
    for name in "abc":
        paragraphs = (f"{name} paragraph {n} of some length\n\n" for n in range(300))
        (tmp_path / f"{name}.txt").write_text("".join(paragraphs), encoding="utf-8")
    source = {"source": "files", "paths": ["a.txt", "b.txt", "c.txt"], "max_document_bytes": 200}
    whole, _ = gather(tmp_path, [source])
    pieces, _ = gather(tmp_path, [source], name="pieces", hold_out="documents")
    held_out = [[row for row in rows if row["split"] == VALIDATION] for rows in (whole, pieces)]
    assert len({dict(row["metadata"])["file"] for row in held_out[0]}) == 1 and len(held_out[0]) > 40
    assert len({dict(row["metadata"])["file"] for row in held_out[1]}) == 3 and 0 < len(held_out[1]) < 20


def test_nothing_is_held_out_when_the_share_is_zero(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(50)), encoding="utf-8")
    rows, _ = gather(tmp_path, [{"source": "files", "paths": "a.jsonl"}], share=0)
    assert {row["split"] for row in rows} == {"train"}
