import bz2
import gzip
import json
import lzma

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from bessemer.core.errors import ArtefactError
from bessemer.core.records import read_records, read_table


def test_jsonl_csv_and_parquet_hold_the_same_rows(tmp_path):
    rows = [{"question": "two\nlines", "answer": "1"}, {"question": "ß, é", "answer": "2"}]
    (tmp_path / "a.jsonl").write_text(
        '{"question": "two\\nlines", "answer": "1"}\n\n{"question": "ß, é", "answer": "2"}\n', encoding="utf-8"
    )
    (tmp_path / "a.csv").write_text('question,answer\n"two\nlines",1\n"ß, é",2\n', encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    places = {}
    for suffix in ("jsonl", "csv", "parquet"):
        records = read_records(tmp_path / f"a.{suffix}")
        assert [record.values for record in records] == rows
        places[suffix] = [record.place.removeprefix(str(tmp_path)) for record in records]
    assert places == {
        "jsonl": ["/a.jsonl:1", "/a.jsonl:3"],
        "csv": ["/a.csv:2", "/a.csv:4"],
        "parquet": ["/a.parquet, row 0", "/a.parquet, row 1"],
    }


def test_a_struct_of_parquet_has_the_keys_of_its_own_row(tmp_path):
    rows = [{"call": {"city": "Paris"}, "note": None}, {"call": {"sum": 4}, "note": "a"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [record.values for record in read_records(tmp_path / "a.parquet")] == rows


def test_a_damaged_page_of_parquet_is_told_with_its_file(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [f"row {number}" for number in range(1000)]}), path)
    content = bytearray(path.read_bytes())
    content[40:400] = b"\xff" * 360
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"a\.parquet: is not Parquet, or damaged"):
        read_records(path)


def test_a_cell_may_be_long(tmp_path):
    (tmp_path / "a.csv").write_text(f"a\n{'long ' * 100_000}\n", encoding="utf-8")
    assert len(read_records(tmp_path / "a.csv")[0].text("a")) == 500_000


#: A German table as Excel saves it: semicolons, decimal commas, a cell of two lines, a row and a column left empty.
GERMAN = (
    "Frage;Antwort;Preis;\r\n"
    '"Größe, bitte?";"Übergröße ""XL"".\nAuch kürzer.";12,50 €;\r\n'
    ";;;\r\n"
    "Wann öffnet ihr?;Um 8,\xa0täglich.;0,00 €;\r\n"
)
GERMAN_ROWS = [
    {"Frage": "Größe, bitte?", "Antwort": 'Übergröße "XL".\nAuch kürzer.', "Preis": "12,50 €"},
    {"Frage": "Wann öffnet ihr?", "Antwort": "Um 8,\xa0täglich.", "Preis": "0,00 €"},
]


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("cp1252", "read as cp1252; columns"),
        ("utf-8-sig", "columns"),
        ("utf-16", "read as utf-16; columns"),
        ("utf-16-le", "read as utf-16-le; columns"),
    ],
)
def test_a_table_of_a_spreadsheet_is_read_whatever_dialect_it_was_saved_in(tmp_path, caplog, encoding, said):
    path = tmp_path / "preise.CSV"
    path.write_bytes(GERMAN.encode(encoding))
    for _ in range(2):
        records = read_records(path)
    assert [record.values for record in records] == GERMAN_ROWS
    assert [record.place for record in records] == [f"{path}:2", f"{path}:5"]
    # once, however often it is read
    assert caplog.messages == [f"note: {path}: {said} separated by semicolons; 1 blank row left out"]


@pytest.mark.parametrize(
    ("name", "text", "delimiter"),
    [
        ("a.csv", "a\tb\n1,5\t2\n", "\t"),
        ("a.csv", "a|b\n1;x|2\n", "|"),
        ("a.tsv", "a\tb\n1, 2\tx\n", "\t"),
        ("a.csv", "sep=;\na;b\n1;2\n", ";"),
        ("a.csv", "sep=\t\na\tb\n1\t2\n", "\t"),
        # sentences with more semicolons than the commas between them
        ("a.csv", 'a,b\n"x; y; z",1; 2; 3\n', ","),
        ("a.csv", "text\nOne; two; three.\n", ","),
    ],
)
def test_the_delimiter_is_the_one_that_makes_rows_as_wide_as_the_header(tmp_path, name, text, delimiter):
    (tmp_path / name).write_text(text, encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("sep=")]
    (record,) = read_records(tmp_path / name)
    assert list(record.values) == lines[0].split(delimiter)
    assert record.number == text.splitlines().index(lines[1]) + 1


def test_the_same_rows_come_from_every_form_without_those_that_hold_nothing(tmp_path):
    rows = [{"a": "1", "b": None}, {"a": None, "b": ""}, {"a": " ", "b": None}, {"a": None, "b": "2"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for suffix in ("jsonl", "json", "parquet"):
        table = read_table(tmp_path / f"a.{suffix}")
        assert [record.values for record in table.records] == [rows[0], rows[3]]
        assert (table.blank_rows, table.notes) == (2, ["2 blank rows left out"])


def test_damaged_utf8_stays_utf8_and_its_first_line_is_noted(tmp_path):
    (tmp_path / "a.csv").write_bytes("a\nGrüße\n".encode() + b"caf\xe9\n" + "Öl\n".encode())
    table = read_table(tmp_path / "a.csv")
    assert [record.values["a"] for record in table.records] == ["Grüße", "caf\ufffd", "Öl"]
    assert table.notes == ["bytes that utf-8 does not know were replaced, the first in line 3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "a.jsonl:2: is not JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: must be an object, it is a list"),
        ("a.jsonl", b"\n\n", "a.jsonl: holds no rows"),
        ("a.json", b"{}", "must be a list of objects, it is a dict"),
        ("a.json", b"[1]", "a.json, row 0: must be an object"),
        ("a.json", b'[{"a": 1},\n{', "a.json:2: is not JSON"),
        ("a.csv", b"a,b\n", "a.csv: holds no rows"),
        ("a.csv", b"a,b\n1,2,3\n", "a.csv:2: has more cells than the header"),
        ("a.json", b'{"rows": [], "n": 1}', "must be a list of objects, it is a dict"),
        ("a.json", b'{"x": [{"a": 1}], "y": {"z": [{"a": 1}]}}', "several lists of rows; .* as a.json#x or a.json#y.z"),
        ("a.json#v", b'{"x": [{"a": 1}]}', "has no key 'v'; known: x"),
        ("a.csv#v", b"a\n1\n", "names a sheet of a workbook or a key of JSON, and .csv has neither"),
        ("a.csv.gz", b"a,b\n1,2\n", "is damaged, cut off, or no .gz"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-9], "is damaged, cut off, or no .gz .*fetch it again"),
        ("a.jsonl.zst", b"(\xb5/\xfd", "is damaged, cut off, or no .zst"),
        ("a.csv", b",,\n\n;;\n", "a.csv: holds no rows"),
        ("a.xlsx", b"PK", "is not an Excel workbook, or damaged"),
        ("a.xls", b"\xd0\xcf", "not .xls; save the sheet as .xlsx, or as CSV"),
        ("a.csv", b"a,b,a\n1,2,3\n", "a.csv:1: has two columns 'a'"),
        ("a.jsonl", b'{"a": %s}' % (b"1" * 5000), "a.jsonl:1: is not JSON"),
        ("a.json", b"[" * 100_000, "a.json: is nested too deeply"),
        ("a.parquet", b"PAR", "a.parquet: is not Parquet"),
        ("a.txt", b"a", r"a table is .jsonl, .ndjson, .json, .csv, .* not .txt"),
    ],
)
def test_data_that_cannot_be_read_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name.partition("#")[0]).write_bytes(content)
    with pytest.raises(ArtefactError, match=message):
        read_records(tmp_path / name)
    with pytest.raises(ArtefactError, match="no such file"):
        read_records(tmp_path / "other.jsonl")


PAIRS = [{"q": "Wo?", "a": "Überall."}, {"q": "Wann?", "a": "Nie."}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in PAIRS)


@pytest.mark.parametrize(
    ("name", "text", "note"),
    [
        ("a.json", json.dumps({"version": 1, "data": PAIRS}), "the rows stand under the key 'data'"),
        ("a.json", json.dumps({"splits": {"train": PAIRS}}), "the rows stand under the key 'splits.train'"),
        ("a.json", json.dumps({"rows": [{"row_idx": 7, "row": row} for row in PAIRS]}), "under the key 'rows'"),
        ("a.json", json.dumps({"q": ["Wo?", "Wann?"], "a": ["Überall.", "Nie."]}), "columns as lists"),
        ("a.json", json.dumps({"q": {"0": "Wo?", "1": "Wann?"}, "a": {"0": "Überall.", "1": "Nie."}}), "columns as lists"),
        ("a.json", LINES, "one object a line"),
        ("a.jsonl", json.dumps(PAIRS, indent=1), "a list of objects, not one a line"),
        ("a.jsonl", "\n".join(json.dumps(row, indent=1) for row in PAIRS), "objects over several lines"),
    ],
)
def test_rows_are_found_whatever_shape_the_json_has(tmp_path, name, text, note):
    (tmp_path / name).write_text(text, encoding="utf-8")
    table = read_table(tmp_path / name)
    assert [record.values for record in table.records] == PAIRS
    assert len(table.notes) == 1 and note in table.notes[0]


def test_one_of_several_lists_is_named_and_the_messages_of_one_object_are_no_rows(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": PAIRS, "test": PAIRS[:1]}), encoding="utf-8")
    assert len(read_records(tmp_path / "a.json#test")) == 1
    row = {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]}
    path.write_text(json.dumps(row), encoding="utf-8")
    assert [record.values for record in read_records(path)] == [row]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_table_is_that_table(tmp_path, suffix):
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}[suffix]
    data = LINES.encode()
    # of several members, as tools write that append
    (tmp_path / f"a.jsonl{suffix}").write_bytes(compress(data[:20]) + compress(data[20:]))
    assert [record.values for record in read_records(tmp_path / f"a.jsonl{suffix}")] == PAIRS
    (tmp_path / f"b.tsv{suffix}").write_bytes(compress("q\ta\nWo?\tÜberall.\nWann?\tNie.\n".encode("cp1252")))
    assert [record.values for record in read_records(tmp_path / f"b.tsv{suffix}")] == PAIRS
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), tmp_path / "c.parquet")
    (tmp_path / f"c.parquet{suffix}").write_bytes(compress((tmp_path / "c.parquet").read_bytes()))
    assert [record.values for record in read_records(tmp_path / f"c.parquet{suffix}")] == PAIRS


@pytest.mark.parametrize("new", [pyarrow.ipc.new_stream, pyarrow.ipc.new_file])
def test_the_files_in_which_datasets_keeps_rows_are_read(tmp_path, new):
    table = pyarrow.Table.from_pylist(PAIRS)
    with new(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert [record.values for record in read_records(tmp_path / "a.arrow")] == PAIRS


@pytest.mark.parametrize(
    ("name", "text", "bad"),
    [
        ("a.jsonl", '{"q": 1}\n{"q": \n[2]\n{"q": 4}\n', [(2, "is not JSON"), (3, "must be an object, it is a list")]),
        ("a.json", '{"q": 1}\n{"q": \n\n{"q": 4}\n', [(2, "is not JSON")]),
        ("a.json", '[{"q": 1}, 2, {"q": 4}]', [(1, "must be an object, it is a int")]),
        ("a.csv", 'q,a\n1,x\n2,"x" y\n"3,z\n4,x\n', [(3, "is not CSV"), (4, "is not CSV (unexpected end of data)")]),
        ("a.csv", "q,a\n1,x\n2,x,y\n4,x\n", [(3, "has more cells than the header, the first with 'y'")]),
    ],
)
def test_a_row_that_cannot_be_read_is_kept_apart_and_those_behind_it_are_read(tmp_path, name, text, bad):
    (tmp_path / name).write_text(text, encoding="utf-8")
    table = read_table(tmp_path / name)
    assert [str(record.values["q"]) for record in table.records] == ["1", "4"]
    assert [row.number for row in table.bad] == [number for number, _ in bad]
    assert all(row.why.startswith(why) for row, (_, why) in zip(table.bad, bad, strict=True))
