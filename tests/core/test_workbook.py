"""Excel workbooks: by hand as small as they can be, and as openpyxl writes them."""

import datetime
import zipfile

import pytest

from bessemer.core.errors import ArtefactError
from bessemer.core.records import read_records, read_table

_MAIN = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
_RELATIONS = 'xmlns:r="http://schemas.openxmlformats.org/officeDocument/2006/relationships"'


def write_workbook(path, sheets, texts=(), hidden=(), book=""):
    """A workbook of sheets by name, each the XML of its rows."""
    with zipfile.ZipFile(path, "w") as file:
        rows = ""
        for number, name in enumerate(sheets, start=1):
            state = "hidden" if name in hidden else "visible"
            rows += f'<sheet name="{name}" sheetId="{number}" r:id="r{number}" state="{state}"/>'
        file.writestr("xl/workbook.xml", f"{book}<workbook {_MAIN} {_RELATIONS}><sheets>{rows}</sheets></workbook>")
        relations = "".join(f'<Relationship Id="r{n}" Target="worksheets/sheet{n}.xml"/>' for n in range(1, len(sheets) + 1))
        file.writestr("xl/_rels/workbook.xml.rels", f"<Relationships>{relations}</Relationships>")
        shared = "".join(f"<si>{text}</si>" for text in texts)
        file.writestr("xl/sharedStrings.xml", f"<sst {_MAIN}>{shared}</sst>")
        for number, of_sheet in enumerate(sheets.values(), start=1):
            file.writestr(
                f"xl/worksheets/sheet{number}.xml", f"<worksheet {_MAIN}><sheetData>{of_sheet}</sheetData></worksheet>"
            )
    return path


def cells(*values):
    return "<row>" + "".join(f'<c t="inlineStr"><is><t>{value}</t></is></c>' for value in values) + "</row>"


def test_cells_are_texts_numbers_and_truth_values_in_their_columns(tmp_path):
    texts = ("<t>Frage</t>", "<r><t>Wie </t></r><r><t>groß?</t></r><rPh><t>ignored</t></rPh>", "<t>a_x000D_\nb</t>")
    sheet = (
        '<row r="1"><c r="A1" t="s"><v>0</v></c><c r="C1" t="inlineStr"><is><t>n</t></is></c></row>'
        '<row r="4"><c r="A4" t="s"><v>1</v></c><c r="C4"><v>12</v></c></row>'
        '<row r="5"><c r="A5" t="s"><v>2</v></c><c r="C5"><v>0.5</v></c></row>'
        '<row r="6"><c r="A6" t="b"><v>1</v></c><c r="C6" t="e"><v>#REF!</v></c></row>'
    )
    records = read_records(write_workbook(tmp_path / "a.xlsx", {"Tabelle1": sheet}, texts))
    assert [(one.values["Frage"], one.values["n"]) for one in records] == [("Wie groß?", 12), ("a\nb", 0.5), (True, None)]
    assert [one.place.removeprefix(str(tmp_path)) for one in records] == [f"/a.xlsx, row {number}" for number in (4, 5, 6)]


def test_the_first_visible_sheet_with_rows_is_read_or_the_one_that_is_named(tmp_path):
    sheets = {
        "Old": cells("q", "a") + cells("1", "2"),
        "Cover": "",
        "Data": cells("q", "a") + cells("3", "4"),
        "More": cells("q"),
    }
    path = write_workbook(tmp_path / "a.xlsx", sheets, hidden=("Old",))
    table = read_table(path)
    assert [record.values for record in table.records] == [{"q": "3", "a": "4"}]
    assert table.notes == ["the sheet 'Data', not 'Old', 'Cover', 'More' (#SHEET behind the file names one)"]
    assert read_records(tmp_path / "a.xlsx#Old")[0].values == {"q": "1", "a": "2"}
    with pytest.raises(ArtefactError, match=r"a.xlsx: has no sheet 'Dat'; did you mean 'Data'"):
        read_records(tmp_path / "a.xlsx#Dat")


def test_a_title_above_the_header_is_read_over(tmp_path):
    table = read_table(
        write_workbook(tmp_path / "a.xlsx", {"S": cells("Our questions, 2026") + cells("q", "a") + cells("1", "2")})
    )
    assert [record.values for record in table.records] == [{"q": "1", "a": "2"}]
    assert table.notes == ["the header is in row 2, below a title"]


def test_a_workbook_with_a_document_type_is_refused(tmp_path):
    path = write_workbook(tmp_path / "a.xlsx", {"S": cells("q")}, book='<!DOCTYPE x [<!ENTITY a "aa">]>')
    with pytest.raises(ArtefactError, match="declares a document type"):
        read_records(path)


def test_what_openpyxl_writes_is_read_as_it_was(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    rows = [
        ["Frage", "Antwort", "am", "um", "n", "x", "gut"],
        ["Größe?", 'Mit ""\nzwei Zeilen & <mehr>', datetime.date(2026, 11, 30), datetime.time(8, 30), 7, 2.25, True],
        ["=1+1", None, datetime.datetime(2026, 1, 2, 3, 4, 5), None, -3, 1e-9, False],
    ]
    for row in rows:
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    first, second = (record.values for record in read_records(tmp_path / "a.xlsx"))
    assert [*first.values()] == ["Größe?", 'Mit ""\nzwei Zeilen & <mehr>', "2026-11-30", "08:30:00", 7, 2.25, True]
    # a formula that no program has computed has no value
    assert [*second.values()] == [None, None, "2026-01-02 03:04:05", None, -3, 1e-9, False]
