import json

import pyarrow
import pyarrow.parquet
import pytest

from bessemer.core.errors import ArtefactError
from bessemer.core.records import read_records, read_table


def test_jsonl_csv_and_parquet_hold_the_same_rows(tmp_path):
    rows = [{"question": "two\nlines", "answer": "1"}, {"question": "ß, é", "answer": "2"}]
    (tmp_path / "a.jsonl").write_text('{"question": "two\\nlines", "answer": "1"}\n\n{"question": "ß, é", "answer": "2"}\n')
    (tmp_path / "a.csv").write_text('question,answer\n"two\nlines",1\n"ß, é",2\n')
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
    (tmp_path / "a.csv").write_text(f"a\n{'long ' * 100_000}\n")
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
    (tmp_path / name).write_text(text)
    lines = [line for line in text.splitlines() if not line.startswith("sep=")]
    (record,) = read_records(tmp_path / name)
    assert list(record.values) == lines[0].split(delimiter)
    assert record.number == text.splitlines().index(lines[1]) + 1


def test_the_same_rows_come_from_every_form_without_those_that_hold_nothing(tmp_path):
    rows = [{"a": "1", "b": None}, {"a": None, "b": ""}, {"a": " ", "b": None}, {"a": None, "b": "2"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
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
        ("a.json", b'{"rows": [], "n": 1}', "it is a dict; keep the list under 'rows' alone"),
        ("a.csv", b",,\n\n;;\n", "a.csv: holds no rows"),
        ("a.xlsx", b"PK", "not .xlsx; save the sheet as CSV"),
        ("a.csv", b"a,b,a\n1,2,3\n", "a.csv:1: has two columns 'a'"),
        ("a.jsonl", b'{"a": %s}' % (b"1" * 5000), "a.jsonl:1: is not JSON"),
        ("a.json", b"[" * 100_000, "a.json: is nested too deeply"),
        ("a.parquet", b"PAR", "a.parquet: is not Parquet"),
        ("a.txt", b"a", r"a table is .jsonl, .ndjson, .json, .csv, .tsv, .parquet, not .txt"),
    ],
)
def test_data_that_cannot_be_read_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtefactError, match=message):
        read_records(tmp_path / name)
    with pytest.raises(ArtefactError, match="no such file"):
        read_records(tmp_path / "other.jsonl")
