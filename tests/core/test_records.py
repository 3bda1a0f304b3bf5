import pyarrow
import pyarrow.parquet
import pytest

from bessemer.core.errors import ArtefactError
from bessemer.core.records import read_records


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
        ("a.jsonl", b'{"a": "\xff"}\n', "is not UTF-8 text"),
        ("a.csv", b"a,b,a\n1,2,3\n", "a.csv:1: has two columns 'a'"),
        ("a.jsonl", b'{"a": %s}' % (b"1" * 5000), "a.jsonl:1: is not JSON"),
        ("a.json", b"[" * 100_000, "a.json: is nested too deeply"),
        ("a.parquet", b"PAR", "a.parquet: is not Parquet"),
        ("a.txt", b"a", r"a table is .jsonl, .json, .csv, .parquet, not .txt"),
    ],
)
def test_data_that_cannot_be_read_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtefactError, match=message):
        read_records(tmp_path / name)
    with pytest.raises(ArtefactError, match="no such file"):
        read_records(tmp_path / "other.jsonl")
