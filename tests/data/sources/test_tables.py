from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import re
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bessemer.core.environment import install_extra
from bessemer.core.errors import SourceError
from bessemer.data.sources.io.fetch import Clock, may_pass
from bessemer.data.sources.registry import open_source, source_plugin
from bessemer.data.sources.source import Tally
from tests.data.sources.makers import assert_resumes, documents, json_lines, opened, parquet, tar, zipped

ROWS = [{"id": n, "body": f"Text {n}, about\nsteel", "link": f"http://e.org/{n}", "stars": n} for n in range(25)]
COLUMNS = {"text": "body", "url": "link"}


def csv_of(rows):
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


FORMS = {
    "a.parquet": parquet({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    "a.csv": csv_of(ROWS),
    "a.csv.gz": gzip.compress(csv_of(ROWS)),
    "a.jsonl": json_lines(ROWS),
    "a.zip": zipped({"x.parquet": parquet({name: [row[name] for row in ROWS] for name in ROWS[0]})}),
}


@pytest.mark.parametrize("name", FORMS)
def test_rows_are_documents_whose_columns_the_settings_name(tmp_path, name):
    (tmp_path / name).write_bytes(FORMS[name])
    read = [document for _, _, document in assert_resumes(opened("tables", tmp_path, columns=COLUMNS))]
    assert [document.text for document in read] == [row["body"] for row in ROWS]
    assert read[7].locator.startswith("id:7:")
    assert (read[7].group, read[7].url, read[7].metadata) == ("id:7", "http://e.org/7", {"stars": "7"})


def test_the_form_of_a_table_does_not_show(tmp_path):
    read = []
    for name, content in FORMS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(content)
        read.append(documents("tables", folder, columns=COLUMNS))
    assert all(other == read[0] for other in read)


def test_metadata_may_be_chosen_and_rows_without_text_are_counted(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet({"text": ["a", None, " ", "b"], "x": [1, 2, 3, 4], "y": [1, 2, 3, 4]}))
    tally = Tally()
    read = documents("tables", tmp_path, tally, columns={"metadata": ["y"]})
    assert [document.metadata for document in read] == [{"y": "1"}, {"y": "4"}]
    assert tally.counts == {"rows_without_text": 2}


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path, name):
    (tmp_path / name).write_bytes(FORMS[name])
    tally = Tally()
    assert documents("tables", tmp_path, tally) == []
    assert tally.notes == [f"{name}: no column 'text'; it has id, body, link, stars"]


def test_a_row_of_another_width_and_a_quotation_without_end_cost_themselves(tmp_path):
    (tmp_path / "a.csv").write_text("text,n\na,1\nb\nc,3\n", encoding="utf-8")
    tally = Tally()
    assert [document.text for document in documents("tables", tmp_path, tally)] == ["a", "c"]
    assert tally.notes == ["a.csv: byte 11: 1 fields instead of 2"]


@pytest.mark.parametrize("name", ["a.csv", "a.zip", "a.tar.gz"])
def test_a_table_with_semicolons_in_another_encoding_is_read_with_notes(tmp_path, name):
    rows = "text;Größe;\r\nFür Öl;1,5;\r\n;;\r\n\r\nÜber Stahl;2,5\r\n".encode("cp1252")
    whole = {"a.zip": zipped({"a.csv": rows}), "a.tar.gz": gzip.compress(tar({"a.csv": rows})), "a.csv": rows}[name]
    (tmp_path / name).write_bytes(whole)
    tally = Tally()
    read = documents("tables", tmp_path, tally, columns={"metadata": ["Größe"]})
    assert [(document.text, document.metadata) for document in read] == [("Für Öl", {"Größe": "1,5"})]
    assert tally.counts == {"files_in_other_encodings": 1, "tables_with_other_delimiters": 1, "blank_rows": 1, "bad_records": 1}
    place = name if name == "a.csv" else f"{name.removesuffix('.gz')}/a.csv"
    assert tally.notes[:2] == [f"{place}: read as cp1252", f"{place}: its columns are separated by semicolons"]
    assert [loss.partition(": ")[0] for loss in tally.losses] == [place]


def test_what_precedes_the_damage_in_a_parquet_file_is_kept(tmp_path):
    buffer = io.BytesIO()
    table = pa.table({"text": [f"text {n} " * 50 for n in range(40)]})
    pq.write_table(table, buffer, row_group_size=10, compression="none", write_page_checksum=True)
    whole = bytearray(buffer.getvalue())
    whole[whole.index(b"text 25 ") + 100] ^= 0xFF
    (tmp_path / "a.parquet").write_bytes(whole)
    tally = Tally()
    read = documents("tables", tmp_path, tally)
    assert [document.text for document in read] == [f"text {n} " * 50 for n in range(20)]
    assert tally.counts["damaged_files"] == 1


def test_a_text_that_stands_in_every_row_is_held_once(tmp_path):
    """A dictionary of one text of 30 MB and a thousand rows that point to it: 30 GB if it were spelt out."""
    table = pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * 1000), pa.array(["x" * 30_000_000]))})
    pq.write_table(table, tmp_path / "a.parquet")
    tally = Tally()
    assert documents("tables", tmp_path, tally, max_document_bytes=1_000_000) == []
    assert tally.counts == {"too_large": 1000}


@pytest.mark.parametrize("content", [b"PAR1", b"PAR1" + b"x" * 100 + b"PAR1", b"no table"])
def test_what_is_no_parquet_is_counted(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    tally = Tally()
    assert documents("tables", tmp_path, tally) == []
    assert tally.counts == {"damaged_files": 1}


class FakeRows:
    """The part of an iterable data set of the library `datasets` that is used."""

    def __init__(self, rows, num_shards=1):
        self.rows, self.num_shards = rows, num_shards

    def shard(self, num_shards, index):
        return FakeRows(self.rows[index::num_shards])

    def skip(self, count):
        return FakeRows(self.rows[count:])

    def __iter__(self):
        return iter(self.rows)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    def load_dataset(path, name, *, split, revision, streaming):
        assert (path, name, split, streaming) == ("me/steel", "large", "train", True)
        return FakeRows([{"text": f"text {n}", "n": n} for n in range(20)] + [{"text": None}], num_shards=3)

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    config = source_plugin("hugging_face").settings.parse({"dataset": "me/steel", "configuration": "large", "license": "MIT"})
    return open_source(config, tmp_path, tmp_path)


def test_a_data_set_of_the_hub_is_streamed_shard_by_shard(hub):
    everything = assert_resumes(hub)
    assert sorted(document.metadata["n"] for _, _, document in everything) == sorted(map(str, range(20)))
    assert len({unit.name for unit, _, _ in everything}) == 3
    assert {document.license for _, _, document in everything} == {"MIT"}
    assert len({document.locator for _, _, document in everything}) == 20


def write_data_sets(folder):
    """The same rows as the Hub keeps them, and as `save_to_disk` writes them, alone and in a dictionary of splits."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [f"text {n}" for n in range(5)] + [""], "n": list(range(6))})
    (folder / "hub").mkdir()
    for number, some in enumerate((range(3), range(3, 6))):
        rows.select(some).to_parquet(str(folder / "hub" / f"train-0000{number}-of-00002.parquet"))
    rows.save_to_disk(str(folder / "saved"), num_shards=3)
    datasets.DatasetDict({"train": rows, "test": rows.select(range(2))}).save_to_disk(str(folder / "splits"))


def test_data_sets_in_folders_are_read_by_the_library_itself(tmp_path):
    write_data_sets(tmp_path)
    source = open_source(
        source_plugin("hugging_face").settings.parse({"dataset": "splits", "split": "test"}), tmp_path, tmp_path
    )
    assert [document.text for unit in source.units() for _, document in source.read(unit, 0, Tally())] == ["text 0", "text 1"]
    for name, units in (("hub", 2), ("saved", 3), ("splits", 1)):
        source = open_source(source_plugin("hugging_face").settings.parse({"dataset": name}), tmp_path, tmp_path)
        everything = assert_resumes(source)
        assert sorted(document.text for _, _, document in everything) == sorted(f"text {n}" for n in range(5))
        assert len({document.locator for _, _, document in everything}) == 5
        assert len(source.units()) == units
        before = source.fingerprint()
        next(path for path in (tmp_path / name).rglob("*") if path.suffix in (".arrow", ".parquet")).write_bytes(b"other")
        assert source.fingerprint() != before


class BrokenRows(FakeRows):
    """Breaks before row `at` of the whole as often as `breaks` says, which its streams have in common."""

    def __init__(self, rows, breaks, at, num_shards=1, start=0):
        super().__init__(rows, num_shards)
        self.breaks, self.at, self.start = breaks, at, start

    def shard(self, num_shards, index):
        return BrokenRows(self.rows[index::num_shards], self.breaks if index == 1 else [], self.at)

    def skip(self, count):
        return BrokenRows(self.rows[count:], self.breaks, self.at, start=self.start + count)

    def __iter__(self):
        for number, row in enumerate(self.rows, start=self.start):
            if number == self.at and self.breaks:
                raise self.breaks.pop()
            yield row


@pytest.fixture
def breaking_hub(monkeypatch, tmp_path):
    """A data set of three shards, whose second breaks before its row `at` with these errors; the Hub fails with `refusals`."""

    def opened_with(breaks, at=2, refusals=()):
        refused, waits = list(refusals), []
        module = types.ModuleType("datasets")

        def load_dataset(*_, **__):
            if refused and (error := refused.pop()) is not None:
                raise error
            return BrokenRows([{"text": f"text {n}"} for n in range(15)], breaks, at, num_shards=3)

        module.load_dataset = load_dataset
        monkeypatch.setitem(sys.modules, "datasets", module)
        source = open_source(source_plugin("hugging_face").settings.parse({"dataset": "me/steel"}), tmp_path, tmp_path)
        return dataclasses.replace(source, clock=Clock(sleep=waits.append)), waits

    return opened_with


def read_all(source, tally):
    return [document.text for unit in source.units() for _, document in source.read(unit, 0, tally)]


def test_a_stream_that_breaks_is_opened_again_where_it_broke_after_growing_waits(breaking_hub):
    # of a client that has no class of the standard library, of a file that was cut off, of the system
    source, waits = breaking_hub([RuntimeError("closed"), ValueError("cut off"), ConnectionError("no route")])
    tally = Tally()
    assert sorted(read_all(source, tally)) == sorted(f"text {n}" for n in range(15))
    assert (waits, tally.counts) == ([1.0, 2.0, 4.0], {})


def test_a_stream_that_breaks_at_one_row_for_ever_is_set_aside_with_its_reason_and_the_others_are_read(breaking_hub):
    source, waits = breaking_hub([ConnectionError("no route")] * 99)
    tally = Tally()
    read = read_all(source, tally)
    assert sorted(read) == sorted(f"text {n}" for n in range(15) if n % 3 != 1 or n < 6)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert tally.counts == {"broken_streams": 1}
    assert tally.notes == ["me/steel/train/00001-of-00003: it broke behind row 2, 7 times: ConnectionError: no route"]


def test_a_hub_that_does_not_answer_for_a_moment_is_asked_again(breaking_hub):
    source, waits = breaking_hub([], refusals=[ConnectionError("no route")] * 2)
    assert len(read_all(source, Tally())) == 15
    assert waits == [1.0, 2.0]


def test_a_hub_that_cannot_be_reached_any_more_ends_the_run_and_says_how_far_it_came(breaking_hub):
    source, waits = breaking_hub([ConnectionError("no route")], refusals=[ConnectionError("no route")] * 99 + [None] * 3)
    units = source.units()
    assert len(list(source.read(units[0], 0, Tally()))) == 5
    message = r"^me/steel/train/00001-of-00003: read to row 2; me/steel: it cannot be opened: no route; run again$"
    with pytest.raises(SourceError, match=message):
        list(source.read(units[1], 0, Tally()))
    assert len(waits) == 7


def test_what_waiting_does_not_mend_is_not_waited_for(breaking_hub):
    source, waits = breaking_hub([], refusals=[FileNotFoundError("no such data set"), ValueError("no such split")])
    for message in ("no such split", "no such data set"):
        with pytest.raises(SourceError, match=message):
            source.units()
    assert waits == []


@pytest.mark.parametrize(
    ("module", "base", "passes"),
    [
        ("httpx._exceptions", Exception, True),
        ("aiohttp.client_exceptions", Exception, True),
        ("builtins", ConnectionResetError, True),
        ("builtins", TimeoutError, True),
        ("builtins", PermissionError, False),
        ("datasets.exceptions", FileNotFoundError, False),
        ("builtins", KeyError, False),
    ],
)
def test_a_networks_errors_are_known_by_their_class_or_their_package(module, base, passes):
    error = type("ReadError", (base,), {"__module__": module})
    # and so are those that another package derives from them
    assert may_pass(error()) == may_pass(type("Own", (error,), {"__module__": "somewhere"})()) == passes


def test_without_the_library_what_is_missing_is_said_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    source = open_source(source_plugin("hugging_face").settings.parse({"dataset": "me/steel"}), tmp_path, tmp_path)
    said = f"me/steel: data sets of the Hub need the package `datasets`: {install_extra('hub')}"
    with pytest.raises(SourceError, match=f"^{re.escape(said)}$"):
        source.units()


def test_without_a_network_the_reason_is_one_line(monkeypatch, tmp_path):
    module = types.ModuleType("datasets")

    def load_dataset(*_, **__):
        raise ConnectionError("no route\nand a long story")

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    source = open_source(source_plugin("hugging_face").settings.parse({"dataset": "me/steel"}), tmp_path, tmp_path)
    source = dataclasses.replace(source, clock=Clock(sleep=lambda seconds: None))
    with pytest.raises(SourceError, match=r"^me/steel: it cannot be opened: no route$"):
        source.units()
