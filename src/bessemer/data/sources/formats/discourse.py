"""Source `discourse`: topics of a forum from its API's and its exports' JSON, post by post."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bessemer.data.sources.config import DiscourseSource
from bessemer.data.sources.document import Document, Tally, encodable
from bessemer.data.sources.formats.markup import text_of_markup
from bessemer.data.sources.formats.records import json_lines, parse_json, record_locator
from bessemer.data.sources.io.archives import ARCHIVES, Entry
from bessemer.data.sources.io.tree import FileSource, file_source
from bessemer.data.sources.source import PositionedDocument


@dataclass(frozen=True)
class Discourse:
    """One document a topic. A file holds a topic (`/t/ID.json`), a list of topics or of posts, or JSON lines of topics."""

    max_file_bytes: int
    max_document_bytes: int
    base_url: str | None = None
    known: str = ".json/.jsonl, plain, compressed or in archives"
    small: bool = True
    archives: tuple[str, ...] = field(default=ARCHIVES)

    def reads(self, name: str) -> bool:
        return name.lower().endswith((".json", ".jsonl"))

    def read(self, entry: Entry, start: int, tally: Tally) -> Iterator[PositionedDocument]:
        if entry.name.lower().endswith(".jsonl"):
            for position, record, place in json_lines(entry, start, tally, self.max_file_bytes):
                if (document := self._document(record, place, entry, tally)) is not None:
                    yield position, document
            return
        data = entry.content(self.max_file_bytes, tally)
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
            if size > self.max_document_bytes:
                tally.counts["posts_beyond_the_limit"] += 1
                break
            if text:
                texts.append(text)
        title = encodable(str(topic.get("title") or posts[0].get("topic_title") or ""))
        url = f"{self.base_url.rstrip('/')}/t/{identity}" if self.base_url else None
        metadata = {"posts": str(len(texts))}
        if isinstance(topic.get("tags"), list):
            names = [tag.get("name") if isinstance(tag, dict) else tag for tag in topic["tags"]]
            metadata["tags"] = encodable(" ".join(map(str, names)))
        if created := topic.get("created_at") or posts[0].get("created_at"):
            metadata["date"] = encodable(str(created))
        text = "\n\n---\n\n".join(texts)
        # files may be of several forums, and of several pages of one topic
        name = encodable(f"topic:{identity}")
        return Document(
            record_locator(name, text), text, heading=title, url=url, license=entry.license, group=name, metadata=metadata
        )


def open_discourse(settings: DiscourseSource, folder: Path, cache: Path) -> FileSource:
    """The source `discourse` over the paths of its settings, relative to `folder`."""
    return file_source(settings, folder, Discourse(settings.max_file_bytes, settings.max_document_bytes, settings.base_url))


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
