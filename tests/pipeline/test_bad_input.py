"""A whole run over a folder with every kind of bad input: it goes on, names each, keeps the good, writes nothing elsewhere."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from bessemer.cli.main import main
from bessemer.data.corpus.reader import iterate_documents
from bessemer.pipeline.api import run
from tests.data.sources.makers import page, pdf, tar, warc, zipped

RECIPE = """
format: 1
name: bad
collect:
  - {source: files, paths: bad/texts}
  - {source: warc, paths: bad/crawl}
  - {source: html, paths: bad/pages}
  - {source: tables, paths: bad/tables}
  - {source: pdf, paths: bad/papers}
clean: {score: [gopher_quality]}
deduplicate: [exact]
select: {keep: all, languages: [], thresholds: {gopher_mean_word_length: {max: 50}}}
"""

COMPRESS = {"gz": gzip.compress, "zst": zstandard.ZstdCompressor(write_checksum=True).compress}
LONG_LINE, LONGER_LINE = 20_000_000, 200_000_000

#: What is to be found again: the names of good documents that stand beside, before or behind what is bad.
GOOD = [
    *(
        f"{suffix} {name}"
        for suffix in COMPRESS
        for name in ("before the cut", "before the bit", "page 0 of the cut", "page 0")
    ),
    *(f"{suffix} page 2" for suffix in COMPRESS),  # behind the damaged record
    *("with one byte of another encoding", "with NUL bytes", "before the line", "behind the line", "before the nest"),
    *("behind the nest", "in a zip", "in a tar", "on a page", "deep down", "on a page of another encoding", "in a table"),
    *("in row one", "in row two", "in a paper"),
]


def sentence(name: str) -> str:
    return f"The good document {name} says that steel is an alloy of iron and carbon."


def records(*names: str) -> bytes:
    return "".join(json.dumps({"text": sentence(name)}) + "\n" for name in names).encode()


def web_page(name: str) -> bytes:
    return page(f"<article><h1>Steel</h1><p>{sentence(name)} It was made before anybody knew why it is hard.</p></article>")


def table(*names: str) -> bytes:
    buffer = io.BytesIO()
    rows = pa.table({"text": [sentence(name) for name in names]})
    pq.write_table(rows, buffer, row_group_size=1, write_page_checksum=True, compression="none")
    return buffer.getvalue()


def turned(data: bytes, place: int) -> bytes:
    """The bytes with one bit turned."""
    return data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]


def bad_files(long_line: int) -> dict[str, tuple[bytes, str]]:
    """Contents and what each is counted as; none where it is good, or can be read whole whatever it looks like."""
    nest = b'{"text":' + b"[" * 100_000
    line = b'{"text": "' + b"x" * long_line + b'"}'
    page_of_latin = web_page("on a page of another encoding").replace(b"hard", b"h\xe4rter als Eisen")
    rows, first_rows = table("in row one", "in row two", "in row three"), table("in a table")
    files = {
        "texts/encoding.txt": (
            sentence("with one byte of another encoding").encode() + b"\xe9",
            "files_in_other_encodings",
        ),
        "texts/nul.txt": (sentence("with NUL bytes").replace("iron", "ir\0on").encode(), "files_with_nul_characters"),
        "texts/line.jsonl": (
            b"\n".join([records("before the line").strip(), line, records("behind the line")]),
            "too_large" if long_line == LONGER_LINE else "",
        ),
        "texts/line.txt": (b"y" * long_line, "cut_paragraphs"),
        "texts/empty.jsonl": (b"", "empty_files"),
        "texts/nest.jsonl": (
            b"\n".join([records("before the nest").strip(), nest, records("behind the nest")]),
            "bad_records",
        ),
        "texts/out.zip": (zipped({"../../out.txt": b"x", "in.txt": sentence("in a zip").encode()}), "unsafe_members"),
        "texts/out.tar": (tar({"/tmp/out.txt": b"x", "in.txt": sentence("in a tar").encode()}), "unsafe_members"),
        "pages/good.html": (web_page("on a page"), ""),
        "pages/deep.html": (b"<html><body>" + b"<div>" * 100_000 + web_page("deep down"), ""),
        "pages/encoding.html": (b"<meta charset=utf-8>" + page_of_latin, ""),
        "tables/good.parquet": (first_rows, ""),
        "tables/cut.parquet": (rows[: len(rows) // 2], "damaged_files"),
        "tables/bit.parquet": (turned(rows, rows.index(b"in row three")), "damaged_files"),
        "papers/scanned.pdf": (pdf([""]), "files_without_text"),
        "papers/good.pdf": (pdf([sentence("in a paper")]), ""),
    }
    for suffix, compress in COMPRESS.items():
        before = compress(records(f"{suffix} before the bit"))
        lost = compress(records(*(f"lost {number}" for number in range(50))))
        files[f"texts/cut.jsonl.{suffix}"] = (compress(records(f"{suffix} before the cut")) + lost[:-30], "damaged_files")
        files[f"texts/bit.jsonl.{suffix}"] = (before + turned(lost, len(lost) // 2), "damaged_files")
        files[f"texts/bomb.txt.{suffix}"] = (compress(bytes(90_000_000)), "decompression_bombs")
        crawls = {}
        for number, name in enumerate(("", " of the cut")):
            pages = [(f"http://e.org/{place}", web_page(f"{suffix} page {place}{name}")) for place in range(3)]
            begin = 100 * len(suffix) + 10 * number  # no two archives have records of one id
            crawls[name] = [warc(pages[:end], f".{suffix}", first=begin) for end in (1, 2, 3)]
        first, second, whole = crawls[""]
        files[f"crawl/bit.warc.{suffix}"] = (turned(whole, (len(first) + len(second)) // 2), "damaged_")
        files[f"crawl/cut.warc.{suffix}"] = (crawls[" of the cut"][2][:-300], "damaged_files")
    return files


def everything(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if "runs" not in path.relative_to(folder).parts}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder of a recipe, two levels below what a test may look at."""
    folder = tmp_path / "above" / "here"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


@pytest.mark.parametrize("long_line", [LONG_LINE, pytest.param(LONGER_LINE, marks=pytest.mark.slow)])
def test_a_run_over_every_kind_of_bad_input_keeps_the_good_and_names_the_bad(place, tmp_path, long_line):
    files = bad_files(long_line)
    for name, (content, _) in files.items():
        (place / "bad" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "bad" / name).write_bytes(content)
    before = everything(tmp_path)

    result = run("recipe.yaml")

    found = "\n".join(
        text for batch in iterate_documents(result.folder / "corpus" / "documents") for text in batch.column("text").to_pylist()
    )
    assert [name for name in GOOD if sentence(name) not in found] == []
    assert "h\xe4rter als Eisen" in found and "\0" not in found
    assert not any(word in found for word in ("xxxx", "yyyy"))  # by a threshold, as any other document

    metrics = next(made.artefact.manifest["metrics"] for made in result.made if made.stage.name == "collect")
    sources = {"texts": "files", "crawl": "warc", "pages": "html", "tables": "tables", "papers": "pdf"}
    counted: Counter[tuple[str, str]] = Counter()
    for path, (_, kind) in files.items():
        folder, _, name = path.partition("/")
        notes = [note for note in metrics["notes"].get(sources[folder], []) if note.startswith(name)]
        assert bool(notes) == bool(kind), (path, notes)
        if kind and kind != "damaged_":
            counted[sources[folder], kind] += 1
    for (source, kind), number in counted.items():
        assert metrics["problems"][source][kind] >= number, (source, kind)
    assert everything(tmp_path) == before


def test_a_corpus_of_nothing_is_one_line_and_leaves_nothing_half_made(place, capsys):
    (place / "empty").mkdir()
    (place / "empty" / "a.jsonl").write_bytes(b"")
    (place / "empty" / "b.txt").write_bytes(b" \n\n")
    recipe = RECIPE.partition("collect:")[0] + "collect: [{source: files, paths: empty}]\nselect: {keep: all, languages: []}\n"
    (place / "recipe.yaml").write_text(recipe, encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        main(["run", "recipe.yaml"])
    said = capsys.readouterr()
    assert "no document with text was found in files" in said.out + said.err and "Traceback" not in said.out + said.err
    assert not list(place.rglob("part-*.parquet")) and not list(place.rglob("manifest.json"))
