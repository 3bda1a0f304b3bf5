"""Sources of forums: `discourse` (topics from its API's and exports' JSON) and `stack_exchange` (the dumps' `Posts.xml`).

Stack Exchange: each question with its answers, the best first. Answers stand far behind their question, so the file is read
twice: once for the place and the score of each answer (20 bytes each are held), then question by question, fetching answers
from their places.
"""

from __future__ import annotations

import mmap
import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from bessemer.core.object_storage import local_copy
from bessemer.data.sources.io.archives import Entry
from bessemer.data.sources.io.file_source import SettingsFormat, json_lines, parse_json, record_locator
from bessemer.data.sources.markup import parse_xml, text_of_markup
from bessemer.data.sources.registry import DiscourseSource, StackExchangeSource
from bessemer.data.sources.source import Document, PositionedDocument, Tally, encodable


@dataclass(frozen=True)
class Discourse(SettingsFormat):
    """One document a topic. A file holds a topic (`/t/ID.json`), a list of topics or of posts, or JSON lines of topics."""

    settings: DiscourseSource
    known: ClassVar[str] = ".json/.jsonl, plain, compressed or in archives"
    small: ClassVar[bool] = True

    def reads(self, name: str) -> bool:
        return name.lower().endswith((".json", ".jsonl"))

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        if entry.name.lower().endswith(".jsonl"):
            for position, record, place in json_lines(entry, start, tally, self.settings.max_file_bytes):
                if (document := self._document(record, place, entry, tally)) is not None:
                    yield position, document
            return
        data = entry.content(self.settings.max_file_bytes, tally)
        if data is None:
            return
        try:
            content = parse_json(data.decode("utf-8-sig", errors="replace"))
        except ValueError as error:
            tally.set_aside("bad_records", entry.place, f"not JSON ({error})")
            return
        for number, topic in enumerate(_topics(content), start=1):
            if (
                number > start
                and (document := self._document(topic, f"{entry.place}: topic {number}", entry, tally)) is not None
            ):
                yield number, document

    def _document(self, topic: Any, place: str, entry: Entry, tally: Tally) -> Document | None:
        posts = _posts(topic)
        if not posts or not isinstance(topic, dict):
            tally.set_aside("bad_records", place, "no topic with posts")
            return None
        identity = topic["id"] if topic.get("id") is not None else posts[0].get("topic_id")
        if identity is None:
            tally.set_aside("bad_records", place, "a topic without an id")
            return None
        texts: list[str] = []
        size = 0
        for post in sorted(posts, key=lambda post: _number(post.get("post_number"))):
            if post.get("hidden") or post.get("deleted_at") or post.get("action_code"):
                continue
            text = _post_text(post)
            size += len(text.encode())
            if size > self.settings.max_document_bytes:
                tally.counts["posts_beyond_the_limit"] += 1
                break
            if text:
                texts.append(text)
        title = encodable(str(topic.get("title") or posts[0].get("topic_title") or ""))
        url = f"{self.settings.base_url.rstrip('/')}/t/{identity}" if self.settings.base_url else None
        metadata = {"posts": str(len(texts))}
        if isinstance(topic.get("tags"), list):
            names = [tag.get("name") if isinstance(tag, dict) else tag for tag in topic["tags"]]
            metadata["tags"] = encodable(" ".join(map(str, names)))
        if created := topic.get("created_at") or posts[0].get("created_at"):
            metadata["date"] = encodable(str(created))
        text = "\n\n---\n\n".join(texts)
        # ids repeat: files may be of several forums, or pages of one topic
        name = encodable(f"topic:{identity}")
        return Document(
            record_locator(name, text), text, heading=title, url=url, license=entry.license, group=name, metadata=metadata
        )


open_discourse = Discourse.open


def _topics(content: Any) -> list[Any]:
    """The topics in a file's content; loose posts are gathered by their topic."""
    if isinstance(content, dict):
        for key in ("topics", "posts"):
            if isinstance(content.get(key), list) and "post_stream" not in content:
                return _topics_of_list(content[key]) if key == "posts" or not _posts(content) else [content]
        listed = content.get("topic_list")
        return listed["topics"] if isinstance(listed, dict) and isinstance(listed.get("topics"), list) else [content]
    return _topics_of_list(content) if isinstance(content, list) else [content]


def _topics_of_list(items: list[Any]) -> list[Any]:
    if not any(isinstance(item, dict) and "topic_id" in item for item in items):
        return items
    by_topic: dict[Any, dict[str, Any]] = {}
    for post in items:
        if isinstance(post, dict) and isinstance(post.get("topic_id"), (int, str)):
            topic = by_topic.setdefault(post["topic_id"], {"id": post["topic_id"], "posts": []})
            topic["posts"].append(post)
    return list(by_topic.values())


def _posts(topic: Any) -> list[dict[str, Any]]:
    if not isinstance(topic, dict):
        return []
    stream = topic.get("post_stream")
    posts = stream.get("posts") if isinstance(stream, dict) else topic.get("posts")
    if posts is None and ("cooked" in topic or "raw" in topic):
        posts = [topic]
    return [post for post in posts if isinstance(post, dict)] if isinstance(posts, list) else []


def _post_text(post: dict[str, Any]) -> str:
    raw, cooked = post.get("raw"), post.get("cooked")
    if isinstance(raw, str) and raw.strip():
        return encodable(raw).strip()
    try:
        return text_of_markup(encodable(cooked)) if isinstance(cooked, str) else ""
    except ValueError:
        return ""


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


_ROW = re.compile(rb"<row\s")
_KIND = re.compile(rb'\sPostTypeId="(\d+)"')
_PARENT = re.compile(rb'\sParentId="(\d{1,18})"')
_SCORE = re.compile(rb'\sScore="(-?\d{1,9})"')
_QUESTION, _ANSWER = b"1", b"2"
#: Most bytes of a compressed dump, which is expanded in memory, since answers are read from their offsets.
_MOST_COMPRESSED_BYTES = 1 << 30


@dataclass(frozen=True)
class StackExchange(SettingsFormat):
    """One document a question."""

    settings: StackExchangeSource
    known: ClassVar[str] = "Posts.xml"
    archives: ClassVar[tuple[str, ...]] = ()

    def reads(self, name: str) -> bool:
        return name.rpartition("/")[2].lower() == "posts.xml" or name.lower().endswith(".posts.xml")

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        with _content(entry, tally) as posts:
            if posts is None:
                return
            answers = _Answers(posts)
            for begin, end in _rows(posts, start):
                if end - begin > self.settings.max_document_bytes:
                    tally.set_aside("too_large", f"{entry.place}: byte {begin:,}", f"a post of {end - begin:,} bytes")
                    continue
                kind = _KIND.search(posts, begin, end)
                if kind is None or kind[1] != _QUESTION:
                    continue
                try:
                    document = self._document(posts[begin:end], answers, posts, entry, tally)
                except ValueError as error:
                    tally.set_aside("damaged_records", f"{entry.place}: byte {begin:,}", str(error))
                    continue
                if document is not None:
                    yield end, document

    def _document(self, row: bytes, answers: _Answers, posts: Any, entry: Entry, tally: Tally) -> Document | None:
        question = parse_xml(row, forgiving=False).attrib
        identity = question.get("Id")
        if not identity:
            raise ValueError("a question without an Id")
        texts, size = [text_of_markup(question.get("Body", ""))], 0
        for begin in answers.of(int(identity)):
            text = self._answer(posts, begin, entry, tally)
            size += len(text.encode())
            if size > self.settings.max_document_bytes:
                tally.counts["answers_beyond_the_limit"] += 1
                break
            if text:
                texts.append(text)
        if self.settings.min_score is not None and _score(question) < self.settings.min_score:
            tally.counts["questions_below_the_score"] += 1
            return None
        site = _site(entry.name)
        metadata = {"site": site, "score": str(_score(question)), "answers": str(len(texts) - 1)}
        if tags := " ".join(re.findall(r"[^<>|\s]+", question.get("Tags", ""))):
            metadata["tags"] = encodable(tags)
        return Document(
            f"{site}/{identity}",
            "\n\n---\n\n".join(text for text in texts if text),
            heading=encodable(question.get("Title", "")),
            url=f"https://{site}/q/{identity}" if "." in site else None,
            license=_license(question.get("ContentLicense")) or entry.license,
            metadata=metadata,
        )

    def _answer(self, posts: Any, begin: int, entry: Entry, tally: Tally) -> str:
        end = posts.find(b"/>", begin, begin + self.settings.max_document_bytes)
        try:
            if end < 0:
                raise ValueError("its end is missing or too far away")
            return text_of_markup(parse_xml(posts[begin : end + 2], forgiving=False).get("Body", ""))
        except ValueError as error:
            tally.set_aside("damaged_records", f"{entry.place}: byte {begin:,}", str(error))
            return ""


open_stack_exchange = StackExchange.open


class _Answers:
    """Offsets of the answers to each question, the best first."""

    def __init__(self, posts: Any) -> None:
        parents, scores, offsets = array("q"), array("i"), array("q")
        for begin, end in _rows(posts, 0):
            kind, parent = _KIND.search(posts, begin, end), _PARENT.search(posts, begin, end)
            if kind and parent and kind[1] == _ANSWER:
                score = _SCORE.search(posts, begin, end)
                parents.append(int(parent[1]))
                scores.append(int(score[1]) if score else 0)
                offsets.append(begin)
        parent_of = np.frombuffer(parents, dtype=np.int64) if parents else np.zeros(0, np.int64)
        score_of = np.frombuffer(scores, dtype=np.int32) if scores else np.zeros(0, np.int32)
        offset_of = np.frombuffer(offsets, dtype=np.int64) if offsets else np.zeros(0, np.int64)
        order = np.lexsort((offset_of, -score_of.astype(np.int64), parent_of))
        self._parents = parent_of[order]
        self._offsets = offset_of[order]

    def of(self, question: int) -> list[int]:
        first, last = np.searchsorted(self._parents, [question, question + 1])
        return self._offsets[first:last].tolist()  # type: ignore[no-any-return]


def _rows(posts: Any, start: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each row. A `<` in a value is always escaped, so a row ends before the next `<`."""
    for match in _ROW.finditer(posts, start):
        begin = match.start()
        end = posts.find(b"<", begin + 1)
        end = posts.rfind(b"/>", begin, end if end >= 0 else len(posts))
        if end >= 0:
            yield begin, end + 2


@contextmanager
def _content(entry: Entry, tally: Tally) -> Iterator[Any]:
    """The file's bytes, mapped where they lie on disk as they are."""
    if entry.path is not None and not entry.is_compressed and entry.size_bytes:
        with (
            local_copy(entry.path) as path,
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            yield mapped
    else:
        yield _expanded(entry, tally)


def _expanded(entry: Entry, tally: Tally) -> bytes | None:
    with entry.open() as stream:
        data = stream.read(_MOST_COMPRESSED_BYTES + 1)
        damage = stream.damage
    if damage is not None:
        tally.set_aside(damage.kind, entry.place, damage.why)
    elif len(data) > _MOST_COMPRESSED_BYTES:
        tally.set_aside("too_large", entry.place, "over 1 GB when expanded: unpack it, then it is read from its places")
        return None
    elif not data:
        tally.set_aside("empty_files", entry.place, "it is empty")
    return data


def _site(name: str) -> str:
    """The site that a dump is of: its folder's name, or what stands before `.Posts.xml`."""
    folder, _, file = name.rpartition("/")
    return file[: -len(".posts.xml")] or folder.rpartition("/")[2] or "stackexchange"


def _score(post: Any) -> int:
    try:
        return int(post.get("Score", "0"))
    except ValueError:
        return 0


def _license(stated: str | None) -> str | None:
    """`CC BY-SA 4.0` as SPDX writes it."""
    return encodable(stated).replace(" ", "-") if stated else None
