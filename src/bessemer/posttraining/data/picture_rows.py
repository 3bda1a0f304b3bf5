"""Pictures in rows of data sets: as parts of messages, under columns of their own, and as a folder of files.

| written as | becomes |
|---|---|
| parts `image_url` (OpenAI), `image` with `source` (Anthropic), `image` | parts `{"type": "image", "image": …}` |
| a column `image` or `images` beside a conversation (LLaVA) | parts in the places of `<image>`, else before the question |
| a column of files in a table of questions and answers | a part before each question |
| a column of files with one of labels or captions, a folder of pictures | the question `QUESTION`, the label as its answer |
| a tar in WebDataset's form (`tar_rows`) | the same, or what its JSON holds |

A picture is a path from the folder that holds the data, or its own data: a `data:` URI, into which bytes are made. An address
is refused: nothing is fetched for a row.
"""

from __future__ import annotations

import base64
import json
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bessemer.core.errors import ArtefactError
from bessemer.core.records import BadRow, Record

Message = dict[str, Any]

#: Endings of the files that are pictures.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
#: Columns that hold pictures, in lower case; and those that do where their values end as pictures' files do.
COLUMNS = ("image", "images", "picture", "pictures", "photo", "img", "image_path")
_FILES = ("file", "file_name", "filename", "path")
#: Columns of what a picture is, in tables without questions.
LABELS = ("label", "caption", "class", "category", "text", "alt", "answer")
#: What is asked of a picture that comes with a label alone.
QUESTION = "What is in this picture?"
#: The place of a picture in a text, as LLaVA's data write it.
MARK = "<image>"
_PARTS = ("image", "image_url", "input_image")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_picture_part(part: Any) -> bool:
    """Whether a part of a content is a picture, in any of the forms."""
    return isinstance(part, Mapping) and part.get("type") in _PARTS


def picture_part(part: Mapping[str, Any], where: str) -> Message:
    """A part of any of the forms as `{"type": "image", "image": …}`; without `image` where another column holds it. Raises
    ValueError."""
    given = part.get("image_url", part.get("image", part.get("source", part.get("url", part.get("path")))))
    if given is None:
        return {"type": "image"}
    return {"type": "image", "image": picture_source(given, where)}


def picture_source(given: Any, where: str) -> str:
    """A picture as a path or a `data:` URI. Raises ValueError for an address, and for what is neither."""
    if isinstance(given, Mapping):
        if given.get("bytes") is not None:
            given = given["bytes"]
        elif given.get("type") == "base64" and isinstance(given.get("data"), str):
            given = f"data:{given.get('media_type', 'image/png')};base64,{given['data']}"
        else:
            given = given.get("url", given.get("path"))
    if isinstance(given, bytes | bytearray | memoryview):
        return "data:image/png;base64," + base64.b64encode(bytes(given)).decode("ascii")
    if not isinstance(given, str) or not given.strip():
        raise ValueError(f"{where}: a picture is a path, bytes or a data: URI, got {type(given).__name__}")
    if given.startswith("file://"):
        return given.removeprefix("file://")
    if _ADDRESS.match(given):
        raise ValueError(
            f"{where}: {given[:80]} is an address; nothing is fetched for a row: save the picture, and give its path"
        )
    return given


def pictures_of(row: Mapping[str, Any]) -> list[str]:
    """The pictures in a row's own columns, in order. Raises ValueError."""
    found: list[str] = []
    for name, value in row.items():
        key = str(name).strip().lower()
        if value is None or value == "" or not (key in COLUMNS or (key in _FILES and _is_file(value))):
            continue
        values = value if isinstance(value, list | tuple) else [value]
        found += [picture_source(one, str(name)) for one in values]
    return found


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and value.lower().endswith(SUFFIXES)


def with_pictures(messages: Sequence[Message], pictures: Sequence[str], where: str = "images") -> tuple[Message, ...]:
    """The messages with pictures of a row's own columns: in the parts that are empty, in the places of `<image>`, else before
    the first of the user's. Raises ValueError where there are more or fewer places than pictures."""
    if not pictures:
        return tuple(messages)
    waiting = iter(pictures)
    placed = [_filled(message, waiting) for message in messages]
    left = list(waiting)
    if left == list(pictures) and placed:
        first = next((place for place, one in enumerate(placed) if one["role"] == "user"), None)
        if first is None:
            raise ValueError(f"{where}: there is no message of the user's that the pictures could be of")
        placed[first] = {**placed[first], "content": [*map(_part, left), *_parts_of(placed[first].get("content"))]}
    elif left:
        raise ValueError(
            f"{where}: {len(pictures)} pictures are given, and the messages have {len(pictures) - len(left)} places"
        )
    return tuple(placed)


def _filled(message: Message, waiting: Iterator[str]) -> Message:
    """A message with pictures from `waiting` in its empty parts and its marks; of marks without pictures the text stays."""
    content = message.get("content")
    if isinstance(content, list):
        return {
            **message,
            "content": [
                _part(picture) if is_picture_part(part) and "image" not in part and (picture := next(waiting, "")) else part
                for part in content
            ],
        }
    if message["role"] != "user" or not isinstance(content, str) or MARK not in content:
        return message
    parts: list[Message] = []
    for number, text in enumerate(content.split(MARK)):
        if number:
            picture = next(waiting, "")
            parts.append(_part(picture) if picture else {"type": "text", "text": MARK})
        text = text.strip("\n")
        if text.strip():
            parts.append({"type": "text", "text": text})
    return {**message, "content": parts}


def _part(picture: str) -> Message:
    return {"type": "image", "image": picture}


def _parts_of(content: Any) -> list[Message]:
    return list(content) if isinstance(content, list) else [{"type": "text", "text": content or ""}]


def sources_in(messages: Iterable[Mapping[str, Any]]) -> list[str]:
    """The pictures of messages in their order. Raises ValueError for a part without one."""
    found: list[str] = []
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            if is_picture_part(part):
                if "image" not in part:
                    raise ValueError("a message has a place for a picture, and the row holds none for it")
                found.append(part["image"])
    return found


def has_pictures(messages: Any) -> bool:
    """Whether any message has a picture; of a text, False."""
    return not isinstance(messages, str) and any(
        is_picture_part(part)
        for message in messages
        if isinstance(message.get("content"), list | tuple)
        for part in message["content"]
    )


def text_of(content: Any) -> str:
    """The text of a content, without its pictures."""
    if not isinstance(content, list | tuple):
        return content or ""
    return "".join(part.get("text", "") for part in content if part.get("type") == "text")


def asked_about(records: Sequence[Record], known: Iterable[str]) -> Sequence[Record]:
    """Rows of pictures with labels alone as rows of questions and answers; others as they are. known: columns of questions."""
    if not records:
        return records
    values = records[0].values
    names = {str(name).strip().lower(): name for name in values}
    label = next((names[name] for name in LABELS if name in names), None)
    if label is None or set(names) & {*known} or not _has_pictures(records):
        return records
    columns = [name for name in values if str(name).strip().lower() in (*COLUMNS, *_FILES)]
    return [
        Record(
            {
                **{name: one.values.get(name) for name in columns},
                "question": QUESTION,
                "answer": one.values.get(label),
            },
            one.number,
            one.place,
        )
        for one in records
    ]


def _has_pictures(records: Sequence[Record]) -> bool:
    try:
        return any(pictures_of(one.values) for one in records[:8])
    except ValueError:
        # an address: the words alone are read
        return False


def folder_rows(folder: Path) -> list[Record]:
    """The pictures of a folder, each with the name of the folder that it lies in, or the text of the file beside it, as
    `label`; none where neither says what a picture is."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix.lower() in SUFFIXES]
    records: list[Record] = []
    for number, path in enumerate(files, start=1):
        inside = path.relative_to(folder)
        beside = path.with_suffix(".txt")
        if any(part.startswith(".") for part in inside.parts):
            continue
        if beside.is_file():
            label = beside.read_text(encoding="utf-8", errors="replace").strip()
        elif len(inside.parts) > 1:
            label = inside.parts[-2].replace("_", " ")
        else:
            continue
        records.append(Record({"image": inside.as_posix(), "label": label}, number, str(path)))
    return records


#: Ending of archives that are read as rows.
TAR = ".tar"
#: Most bytes of a file in a tar that is read.
MOST_BYTES = 64 << 20
#: Endings of the files in a tar that say what a picture is, besides `.json`.
_SAYING = (".txt", ".caption", ".cls")


def tar_rows(path: Path) -> tuple[list[Record], list[BadRow]]:
    """The rows of a tar in WebDataset's form: neighbouring files of one name without endings are a row, `7.jpg` with `7.txt`,
    `7.cls` or `7.json`. Nothing is unpacked, and what is no file is passed over. Rows of names that lead out of the archive, of
    files above `MOST_BYTES` and of damaged JSON are bad ones. Raises ArtefactError for what is no tar."""
    records: list[Record] = []
    bad: list[BadRow] = []
    key, values, why = "", dict[str, Any](), ""

    def end() -> None:
        place = f"{path}: {key}"
        if why:
            bad.append(BadRow(len(records) + len(bad) + 1, place, why))
        elif values:
            records.append(Record(dict(values), len(records) + len(bad) + 1, place))

    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                own = f"{folder}/{stem}" if folder else stem
                if own != key:
                    end()
                    key, values, why = own, {}, ""
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    why = "its name leads out of the archive"
                elif member.size > MOST_BYTES:
                    why = f"a file of {member.size:,} bytes; at most {MOST_BYTES:,} are read"
                elif (stream := archive.extractfile(member)) is not None:
                    why = _take(stream.read(), f".{ending.lower()}", values) or why
            end()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ArtefactError(f"{path}: no tar that can be read ({str(error) or type(error).__name__})") from None
    return records, bad


def _take(data: bytes, ending: str, values: dict[str, Any]) -> str:
    """Add a file of a row to its values; why it cannot be, or "" where it can."""
    if ending in SUFFIXES:
        values.setdefault("images", []).append(picture_source(data, "images"))
    elif ending == ".json":
        try:
            given = json.loads(data)
        except ValueError as error:
            return f"its JSON is damaged ({error})"
        if not isinstance(given, dict):
            return "its JSON is no object"
        values |= {name: value for name, value in given.items() if name not in COLUMNS}
    elif ending in _SAYING:
        values["label"] = data.decode("utf-8", errors="replace").strip()
    return ""
