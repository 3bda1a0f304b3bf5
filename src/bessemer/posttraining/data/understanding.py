"""How the rows of a place are understood: the files behind a name, the roles of their columns, and the parser that makes
examples. This is printed before a training, so that a mistaken column is seen before hours are spent; `bessemer data preview`
prints only this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from bessemer.core.config import nearest
from bessemer.core.errors import ArtefactError, SourceError
from bessemer.core.records import TEXTS, BadRow, Record, RecordTable, is_table, is_text_file, read_bytes, read_table
from bessemer.core.text_encoding import UTF8, decoded_text
from bessemer.posttraining.data.dialects import TURNS
from bessemer.posttraining.data.formats import (
    ANSWERS,
    PROMPTS,
    SYSTEMS,
    Answered,
    answer_in_columns,
    as_answered,
    as_document,
    is_plain_text,
)
from bessemer.posttraining.data.hub import HubDataset
from bessemer.posttraining.data.picture_rows import TAR, asked_about, folder_rows, tar_rows

Example = TypeVar("Example")
#: Makes an example of a row. Raises ValueError or RequestError for a malformed one.
Parse = Callable[[Mapping[str, Any]], Example]
#: Where rows lie: a file, a folder, or a data set of the hub.
DataPlace = Path | HubDataset

#: First rows of a file whose keys are its columns.
_ROWS_LOOKED_AT = 100
#: Most characters of a passage into which a text is cut.
_PASSAGE = 4000
#: Names, without suffix, of files that describe the tables in a folder.
_ABOUT = ("readme", "license", "licence", "changelog", "citation", "notice")


@dataclass(frozen=True)
class RowSet:
    """Rows of a place. name: that of the place, for messages. kind: their form on disk, in words. notes: sentences on how they
    were read."""

    name: str
    kind: str
    records: Sequence[Record]
    bad: Sequence[BadRow] = ()
    notes: Sequence[str] = ()

    @property
    def columns(self) -> list[str]:
        """The names of the columns, in order."""
        return list(dict.fromkeys(str(name) for record in self.records[:_ROWS_LOOKED_AT] for name in record.values))


def open_rows(place: DataPlace) -> RowSet:
    """All rows of a file, of a folder's files, or of a data set of the hub.

    The rows of a text are its passages, each under `text`. Raises ArtefactError for files that cannot be read, SourceError for
    a folder without any, and as `HubDataset.tables`.
    """
    if isinstance(place, HubDataset):
        return _of_hub(place)
    path = place
    if not path.is_dir():
        if is_text_file(path.name):
            return _texts(str(path), [path])
        if path.suffix.lower() == TAR:
            return _tars(str(path), [path])
        return _joined(str(path), [(path, read_table(path))])
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists() or _is_hub_layout(path):
        return _of_hub(HubDataset.of_folder(path))
    tables, texts = files_in(path)
    if not tables and (archives := sorted(path.glob(f"*{TAR}"))):
        return _tars(str(path), archives)
    if not tables and (pictures := folder_rows(path)):
        return RowSet(str(path), "pictures", asked_about(pictures, PROMPTS))
    if tables and texts:
        raise SourceError(
            f"{path}: holds {len(tables):,} tables and {len(texts):,} texts, which are learnt in different ways; name the "
            "files, or put them into two folders"
        )
    if not tables and not texts:
        raise SourceError(f"{path}: holds no table and no text ({', '.join(TEXTS)}) to learn from")
    return _joined(str(path), [(file, read_table(file)) for file in tables]) if tables else _texts(str(path), texts)


def _of_hub(dataset: HubDataset) -> RowSet:
    rows = _joined(str(dataset), [(path, read_table(path)) for path in dataset.tables()])
    return replace(rows, records=rows.records[dataset.wanted(len(rows.records))])


def _is_hub_layout(folder: Path) -> bool:
    """Whether a folder was fetched from the hub, whose card says which files are which split."""
    card = folder / "README.md"
    return card.is_file() and card.read_bytes()[:4096].startswith(b"---") and b"configs:" in card.read_bytes()[: 1 << 16]


def files_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """(tables, texts) in a folder and below it, by name, without hidden files and, where there are tables, without files that
    describe them."""
    shown = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    tables = [path for path in shown if is_table(path.name) and path.name not in ("dataset_info.json", "dataset_infos.json")]
    texts = [path for path in shown if is_text_file(path.name)]
    return tables, [path for path in texts if path.stem.lower() not in _ABOUT] if tables else texts


def _joined(name: str, tables: Sequence[tuple[Path, RecordTable]]) -> RowSet:
    records = asked_about([record for _, table in tables for record in table.records], (*PROMPTS, *TURNS))
    bad = [row for _, table in tables for row in table.bad]
    kinds = list(dict.fromkeys(table.kind for _, table in tables))
    several = f"{len(tables):,} files of " if len(tables) > 1 else ""
    notes = [note if len(tables) == 1 else f"{path.name}: {note}" for path, table in tables for note in table.notes]
    return RowSet(name, f"{several}{' and '.join(kinds)}", records, bad, notes)


def _tars(name: str, paths: Sequence[Path]) -> RowSet:
    """The rows of tars of pictures, which are held in memory."""
    read = [tar_rows(path) for path in paths]
    records = asked_about([record for rows, _ in read for record in rows], (*PROMPTS, *TURNS))
    if not records:
        raise ArtefactError(f"{name}: holds no pictures with what they are")
    return RowSet(name, "tar of pictures", records, [row for _, bad in read for row in bad])


def _texts(name: str, paths: Sequence[Path]) -> RowSet:
    """The passages of files of text as rows."""
    records: list[Record] = []
    notes: list[str] = []
    for path in paths:
        text, encoding = decoded_text(read_bytes(path))
        if encoding != UTF8:
            notes.append(f"{path.name}: read as {encoding}")
        for line, passage in passages(text):
            records.append(Record({"text": passage}, line, f"{path}:{line}"))
    if not records:
        raise ArtefactError(f"{name}: holds no text")
    several = f"{len(paths):,} files of text" if len(paths) > 1 else "text"
    return RowSet(name, several, records, notes=notes)


def passages(text: str) -> Iterator[tuple[int, str]]:
    """(first line, text) of the passages of a text: as many whole paragraphs as fit into `_PASSAGE` characters; longer
    paragraphs are cut."""
    held: list[str] = []
    size = first = 0
    for number, paragraph in (piece for of_one in _paragraphs(text) for piece in _pieces(*of_one)):
        if held and size + len(paragraph) > _PASSAGE:
            yield first, "".join(held).strip("\n")
            held, size = [], 0
        first = first if held else number
        held.append(paragraph)
        size += len(paragraph)
    if held:
        yield first, "".join(held).strip("\n")


def _pieces(number: int, paragraph: str) -> Iterator[tuple[int, str]]:
    """A paragraph in pieces of at most `_PASSAGE` characters, cut after a line, a sentence or a word if possible."""
    while len(paragraph) > _PASSAGE:
        cuts = (paragraph.rfind(end, _PASSAGE // 2, _PASSAGE) + len(end) for end in ("\n", ". ", "。", " "))
        cut = next((cut for cut in cuts if cut > _PASSAGE // 2), _PASSAGE)
        yield number, paragraph[:cut]
        number += paragraph.count("\n", 0, cut)
        paragraph = paragraph[cut:]
    yield number, paragraph


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """(first line, text) of the paragraphs, each with the blank lines after it."""
    held: list[str] = []
    begin = 1
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        if held and line.strip() and not held[-1].strip():
            yield begin, "".join(held)
            held = []
        if not held:
            if not line.strip():
                continue
            begin = number
        held.append(line + "\n")
    if held:
        yield begin, "".join(held)


# ------------------------------------------------------------------------------------------------ columns


def find_columns(
    rows: RowSet,
    prompt: str | None = None,
    answer: str | None = None,
    options: tuple[str, str] = ("prompt_column", "answer_column"),
    *,
    is_chat: bool = False,
) -> tuple[str, str] | None:
    """The columns of questions and of answers: those that the user names, or those recognised by their names; None for rows in
    a form that needs none: conversations, prompts with completions, or texts. options: the options that name the two. is_chat:
    whether texts under `prompt` and `completion` are a question and its answer, rather than a text and its continuation. Raises
    SourceError where no columns are recognised, or a named one is missing.
    """
    names = rows.columns
    for option, name in zip(options, (prompt, answer), strict=True):
        if name is not None and name not in names:
            raise SourceError(f"{rows.name}: {option}: there is no column {name!r}{nearest(name, names)}")
    if prompt is None and answer is None and _is_self_describing(with_known_names(rows), is_chat):
        return None
    columns = prompt or _only(rows.name, names, PROMPTS, options[0]), answer or _only(rows.name, names, ANSWERS, options[1])
    if columns[0] == columns[1]:
        raise SourceError(f"{rows.name}: the column {columns[0]!r} cannot be question and answer both")
    return columns


def _is_self_describing(rows: RowSet, is_chat: bool) -> bool:
    """Whether `as_answered` or `as_document` reads rows with these columns."""
    names = set(rows.columns)
    if names & {*TURNS} or is_plain_text(dict.fromkeys(names)):
        return True
    if "completion" in names and names & {"prompt", "question", "instruction"}:
        is_text = all(isinstance(record.values.get("prompt", ""), str) for record in rows.records[:_ROWS_LOOKED_AT])
        return not (is_chat and is_text)
    return "instruction" in names and bool(names & {"output", "response", *ANSWERS})


def _only(place: str, names: Sequence[str], known: Sequence[str], option: str) -> str:
    """The one column that has one of these names."""
    matching = [name for name in names if name.strip().lower() in known]
    if len(matching) == 1:
        return matching[0]
    columns = ", ".join(map(repr, names))
    what = f"{' and '.join(map(repr, matching))} could both be meant" if matching else f"none of {columns} tells by its name"
    raise SourceError(f"{place}: {what}; name the column with {option}")


def conversation_parser(rows: RowSet, columns: tuple[str, str] | None) -> Parse[Answered]:
    """The parser that makes rows examples for supervised tuning. columns: those of questions and answers; None: they are
    recognised by their names. Raises SourceError as `find_columns`."""
    found = columns or (find_columns(rows) if rows.records else None)
    if found is not None:
        return partial(answer_in_columns, columns=found)
    return as_document if is_plain_text(dict.fromkeys(rows.columns)) else as_answered


#: Sets of columns that together show the form of rows; and columns that only accompany them.
_TELLING = ({"instruction"}, {"prompt", "completion"}, {"chosen", "rejected"}, *({name} for name in TURNS))
_BESIDE = {"input", "output", "response", "context", "history", "label", "tools", *SYSTEMS}


def with_known_names(rows: RowSet) -> RowSet:
    """Rows with their columns' names in lower case, if they are only known so, such as `Instruction` and `Response`."""
    names = rows.columns
    small = [name.strip().lower() for name in names]
    if any(one <= set(names) for one in _TELLING) or not any(one <= set(small) for one in _TELLING):
        return rows
    known = _BESIDE.union(*_TELLING)
    renamed = {name: lower for name, lower in zip(names, small, strict=True) if lower in known and lower not in names}
    records = [
        replace(one, values={renamed.get(str(key), key): value for key, value in one.values.items()}) for one in rows.records
    ]
    return replace(rows, records=records)
