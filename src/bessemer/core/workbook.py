"""Rows of a sheet of an Excel workbook (.xlsx, .xlsm; ECMA-376), read from its XML with the standard library.

A workbook is a zip: `xl/workbook.xml` names the sheets, `xl/sharedStrings.xml` holds their texts, `xl/styles.xml` says which
numbers are dates, and each sheet is a file of rows and cells. Formulas are read as the values that were saved with them.
"""

from __future__ import annotations

import datetime
import posixpath
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO
from xml.etree import ElementTree

#: A cell's value: text, number, truth value, or None for an empty cell and for an error such as #REF!.
Cell = str | int | float | bool | None

_RELATION = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"
#: Numbers of the built-in formats that are dates or times (ECMA-376 part 1, 18.8.30).
_DATE_FORMATS = frozenset({*range(14, 23), *range(27, 37), *range(45, 48), *range(50, 59)})
#: Those of shares: 0% and 0.00%.
_SHARE_FORMATS = frozenset({9, 10})
#: Parts of a number format that are no placeholders: texts, escaped characters, colours and conditions.
_LITERALS = re.compile(r'"[^"]*"|\\.|_.|\*.|\[(?!h+\]|m+\]|s+\])[^\]]*\]')
#: Characters by their number, as `_x000D_` for a carriage return (ECMA-376 part 1, 22.9.2.19).
_ESCAPED = re.compile("_x([0-9A-Fa-f]{4})_")


class WorkbookError(Exception):
    """A file that is no workbook, or a damaged one. Its text continues a message behind the file's name."""


@dataclass(frozen=True)
class Sheet:
    """A sheet of a workbook. part: its file in the zip."""

    name: str
    part: str
    is_hidden: bool


class Workbook:
    """An open workbook. Raises WorkbookError for a file that is none."""

    def __init__(self, file: IO[bytes]) -> None:
        try:
            self._zip = zipfile.ZipFile(file)
            self._parts = {name.lower(): name for name in self._zip.namelist()}
            book = self._tree("xl/workbook.xml")
            targets = {one.get("Id"): one.get("Target", "") for one in self._tree("xl/_rels/workbook.xml.rels")}
        except (zipfile.BadZipFile, KeyError) as error:
            raise WorkbookError(f"is not an Excel workbook, or damaged ({error})") from None
        self.sheets = [
            Sheet(
                one.get("name", ""),
                posixpath.normpath(posixpath.join("/xl", targets.get(one.get(_RELATION), ""))).lstrip("/"),
                one.get("state", "visible") != "visible",
            )
            for one in book.iter()
            if _tag(one) == "sheet"
        ]
        properties = next((one for one in book.iter() if _tag(one) == "workbookPr"), None)
        is_1904 = properties is not None and properties.get("date1904") in ("1", "true")
        # day 60 of the other system is 29 February 1900, which never was
        self._epoch = datetime.datetime(1904, 1, 1) if is_1904 else datetime.datetime(1899, 12, 30)
        self._texts = self._shared_texts()
        formats = self._number_formats().items()
        self._is_date = {style: _is_date_format(number, code) for style, (number, code) in formats}
        self._is_share = {style: _is_share_format(number, code) for style, (number, code) in formats}

    def rows(self, sheet: Sheet, *, as_shown: bool = False) -> Iterator[tuple[int, list[Cell]]]:
        """The rows of a sheet that have cells: the number that Excel shows, and the values from column A on.

        as_shown: shares are texts such as `25%`, errors are their names, and a formula without a saved value is its text.
        """
        number = 0
        try:
            with self._zip.open(self._named(sheet.part)) as stream:
                for _, element in ElementTree.iterparse(_WithoutTypes(stream)):
                    if _tag(element) != "row":
                        continue
                    number = int(element.get("r") or number + 1)
                    cells: list[Cell] = []
                    for cell in element:
                        column = _column(cell.get("r") or "")
                        place = len(cells) if column is None else column
                        cells += [None] * (place - len(cells))
                        cells.append(self._value(cell, as_shown))
                    yield number, cells
                    # a row that was read holds memory otherwise
                    element.clear()
        except KeyError:
            raise WorkbookError(f"lacks the file of its sheet {sheet.name!r}") from None
        except (ElementTree.ParseError, zipfile.BadZipFile, zlib.error, EOFError, ValueError, IndexError) as error:
            raise WorkbookError(f"is damaged in its sheet {sheet.name!r} behind row {number:,} ({error})") from None

    def _value(self, cell: ElementTree.Element, as_shown: bool) -> Cell:
        kind = cell.get("t", "n")
        if kind == "inlineStr":
            return "".join(map(_text_of, (one for one in cell if _tag(one) == "is")))
        value = next((one.text for one in cell if _tag(one) == "v"), None)
        if value is None:
            formula = next((one.text for one in cell if _tag(one) == "f"), None) if as_shown else None
            return f"={formula}" if formula else None
        if kind == "e":
            return value if as_shown else None
        if kind == "s":
            return self._texts[int(value)]
        if kind == "b":
            return value.strip() == "1"
        if kind in ("str", "d"):
            return _unescaped(value)
        number = float(value)
        style = int(cell.get("s") or 0)
        if self._is_date.get(style):
            return self._date(number)
        if as_shown and self._is_share.get(style):
            return f"{100 * number:.12g}%"
        return int(number) if number.is_integer() and abs(number) < 2**53 else number

    def _date(self, days: float) -> str:
        """A date, a time, or both, in the form of ISO 8601."""
        moment = self._epoch + datetime.timedelta(seconds=round(days * 86_400))
        if 0 <= days < 1:
            return moment.time().isoformat()
        return moment.date().isoformat() if moment.time() == datetime.time() else moment.isoformat(sep=" ")

    def _shared_texts(self) -> list[str]:
        if "xl/sharedstrings.xml" not in self._parts:
            return []
        return [_text_of(one) for one in self._tree("xl/sharedStrings.xml") if _tag(one) == "si"]

    def _number_formats(self) -> dict[int, tuple[int, str | None]]:
        """Number of a cell's style → the number of its format, and the code of one that is not built in."""
        if "xl/styles.xml" not in self._parts:
            return {}
        styles = self._tree("xl/styles.xml")
        own = {int(one.get("numFmtId", 0)): one.get("formatCode", "") for one in styles.iter() if _tag(one) == "numFmt"}
        formats = next((one for one in styles if _tag(one) == "cellXfs"), ())
        numbers = [int(one.get("numFmtId", 0)) for one in formats]
        return {style: (number, own.get(number)) for style, number in enumerate(numbers)}

    def _named(self, part: str) -> str:
        return self._parts[part.lower()]

    def _tree(self, part: str) -> ElementTree.Element:
        with self._zip.open(self._named(part)) as stream:
            try:
                return ElementTree.parse(_WithoutTypes(stream)).getroot()
            except (ElementTree.ParseError, zlib.error, EOFError, zipfile.BadZipFile) as error:
                raise WorkbookError(f"is damaged in {part} ({error})") from None


class _WithoutTypes:
    """A stream of XML without a document type: a workbook has none, and entities of one may expand without end."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._is_first = True

    def read(self, size: int = -1) -> bytes:
        """The next bytes. Raises WorkbookError where they declare a document type."""
        data = self._stream.read(size)
        if self._is_first and b"<!DOCTYPE" in data[:4096]:
            raise WorkbookError("declares a document type in its XML, which no workbook does")
        self._is_first = False
        return data


def _tag(element: ElementTree.Element) -> str:
    """The name of an element without its namespace: strict and transitional workbooks have different ones."""
    return element.tag.rpartition("}")[2]


def _text_of(element: ElementTree.Element) -> str:
    """The text of a rich text, without its phonetic runs."""
    parts = []
    for one in element:
        if _tag(one) == "t":
            parts.append(one.text or "")
        elif _tag(one) == "r":
            parts += [inner.text or "" for inner in one if _tag(inner) == "t"]
    return _unescaped("".join(parts))


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), text).replace("\r\n", "\n")


def _column(reference: str) -> int | None:
    """The column of a reference, from 0: `B7` is 1. None where there is no reference."""
    letters = reference.rstrip("0123456789")
    if not letters.isalpha() or not letters.isascii():
        return None
    number = 0
    for letter in letters.upper():
        number = 26 * number + ord(letter) - ord("A") + 1
    return number - 1


def _is_date_format(number: int, code: str | None) -> bool:
    if code is None:
        return number in _DATE_FORMATS
    return bool(re.search("[ymdhs]", _LITERALS.sub("", code).split(";")[0], re.IGNORECASE)) and code.lower() != "general"


def _is_share_format(number: int, code: str | None) -> bool:
    return number in _SHARE_FORMATS if code is None else _LITERALS.sub("", code).split(";")[0].endswith("%")
