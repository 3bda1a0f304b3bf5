"""Memory of conversations: what was said before, found again by what is asked now.

A memory is the folder of one user. It holds turns as they were said, with their time, and an index of them, in which the search
of documents finds those that fit a question (`search.py`); nothing is summarised. What is found stands in the user's message as
parts of origin `memory`, which are tainted: what was once pasted into a conversation is no instruction in the next.

`memory.json` holds the turns and names the index. To forget, it is first replaced by one without these turns that names another
index; then the index that has them is deleted, all its versions with it, and the next search builds the new one. So nothing of
them is in a file any more; where a process is killed in between, the next one that works in the folder deletes the rest.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

from bessemer.assistant.messages import Message, MessagePart
from bessemer.core.errors import ArtefactError
from bessemer.core.store import check_format, locked_folder, read_json, write_json
from bessemer.retrieval.config import IndexConfig
from bessemer.retrieval.embed import Embedder, open_embedder, packaged_minilm
from bessemer.retrieval.index import IndexedDocument, OpenIndex, build_index, open_index, passages_of
from bessemer.retrieval.search import Hit, search

_RECORD, _FORMAT = "memory.json", 1
#: Seconds to wait for another process that works in the folder.
_PATIENCE = 30.0
#: What precedes remembered turns in a message.
_ABOVE = "From earlier conversations, which may be out of date:"


@dataclass(frozen=True)
class RememberedTurn:
    """A message as it was said. role: user or assistant. said: the time, ISO 8601 in UTC. conversation: its identity."""

    role: str
    text: str
    said: str
    conversation: str

    @property
    def title(self) -> str:
        """Who said it and when, in words that a search finds."""
        moment = datetime.fromisoformat(self.said)
        return f"{self.role}, {moment:%A} {moment.day} {moment:%B %Y}, {moment:%H:%M}"


def turn_now(role: str, text: str, conversation: str) -> RememberedTurn:
    """A message that is said now."""
    return RememberedTurn(role, text, datetime.now(UTC).isoformat(timespec="seconds"), conversation)


class ConversationMemory:
    """The memory in a folder, which need not be there yet."""

    def __init__(self, folder: Path, embedder: str | None = None) -> None:
        """embedder: as of an index; None: that of the memory, of a new one all-MiniLM-L6-v2 where it is installed, else none.
        Raises ArtefactError for a folder that holds something else."""
        self._folder = folder
        others = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.exists() else []
        if others and not (folder / _RECORD).exists():
            raise ArtefactError(f"{folder}: there are files here that are no memory; name another folder")
        self._given = embedder
        self._opened: Embedder | None = None
        #: The index that was read last, and of what.
        self._current: tuple[Any, OpenIndex] | None = None

    def turns(self) -> list[RememberedTurn]:
        """All turns, in the order in which they were remembered."""
        return [RememberedTurn(**values) for values in self._read()["turns"]]

    def remember(self, turns: Iterable[RememberedTurn]) -> None:
        """Add turns; those without text are left out. They are indexed by the next `recall`. Raises ArtefactError where another
        process is at work in the folder for long."""
        added = [asdict(turn) for turn in turns if turn.text.strip()]
        if added:
            with self._locked() as record:
                self._write({**record, "turns": [*record["turns"], *added]})

    def recall(self, query: str, count: int = 4, *, without: str | None = None) -> list[Hit]:
        """Turns that fit a query, or parts of long ones, the best first. without: a conversation whose turns are left out, such
        as the present one. Raises RequestError as `search`, ArtefactError as `remember`."""
        index = self._index(without)
        return [] if index is None else search(index, query, count)

    def _index(self, without: str | None) -> OpenIndex | None:
        """The index of all conversations but one, brought up to date; None where there is nothing to find."""
        with self._locked() as record:
            turns = [RememberedTurn(**values) for values in record["turns"]]
            config = IndexConfig(embedder=record["embedder"])
            documents = [one for one, turn in zip(_documents(turns), turns, strict=True) if turn.conversation != without]
            # a turn that is a heading alone, in Markdown, has no passage
            documents = [document for document in documents if passages_of(document, config)]
            if not documents:
                return None
            key = record["index"], record["embedder"], tuple(document.content for document in documents)
            if self._current is None or self._current[0] != key:
                place, embedder = self._folder / _index_name(record["index"]), self._embedder(record["embedder"])
                build_index(documents, place, config, embedder=embedder)
                self._current = key, open_index(place, embedder)
            return self._current[1]

    def forget(self, is_meant: Callable[[RememberedTurn], bool]) -> int:
        """Delete turns for good; their number. When it returns, nothing of them is in the folder. Raises ArtefactError as
        `remember`."""
        with self._locked() as record:
            kept = [values for values in record["turns"] if not is_meant(RememberedTurn(**values))]
            forgotten = len(record["turns"]) - len(kept)
            if forgotten:
                self._write({**record, "turns": kept, "index": record["index"] + 1})
                self._current = None
                self._remove_indexes_but(record["index"] + 1)
        return forgotten

    @contextmanager
    def _locked(self) -> Iterator[dict[str, Any]]:
        """The record, while no other process writes; what one that was killed left behind is deleted."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked_folder(self._folder, _PATIENCE):
            for path in self._folder.glob(".*.tmp"):
                path.unlink()
            record = self._read()
            self._remove_indexes_but(record["index"])
            yield record

    def _remove_indexes_but(self, number: int) -> None:
        for place in self._folder.glob(_index_name("*")):
            if place.name != _index_name(number):
                shutil.rmtree(place)

    def _read(self) -> dict[str, Any]:
        path = self._folder / _RECORD
        record: Any = {"format": _FORMAT, "index": 0, "embedder": None, "turns": []}
        if path.exists():
            record = read_json(path, "memory")
            if not isinstance(record, dict) or not {"format", "index", "embedder", "turns"} <= record.keys():
                raise ArtefactError(f"{path}: this is no memory of conversations")
            check_format(record["format"], _FORMAT, path, "memory")
        chosen = "none" if packaged_minilm() is None else "minilm"
        return {**record, "embedder": self._given or record["embedder"] or chosen}

    def _write(self, record: dict[str, Any]) -> None:
        write_json(self._folder / _RECORD, record)

    def _embedder(self, name: str) -> Embedder | None:
        if self._opened is None and name != "none":
            self._opened = open_embedder(name)
        return self._opened


def _index_name(number: int | str) -> str:
    return f"index-{number}"


def _documents(turns: Sequence[RememberedTurn]) -> list[IndexedDocument]:
    """A document of each turn."""
    return [
        IndexedDocument(f"{turn.conversation}/{turn.said}/{number}", turn.text, turn.title, turn.role)
        for number, turn in enumerate(turns)
    ]


def with_memories(question: Message, memories: Sequence[Hit], most_characters: int) -> Message:
    """A user's message below what was said before, each turn a part of origin `memory`. most_characters: of these together; the
    first that exceed it end them."""
    lengths = accumulate(len(hit.passage.shown) for hit in memories)
    fitting = [hit for hit, length in zip(memories, lengths, strict=True) if length <= most_characters]
    if not fitting:
        return question
    parts = [MessagePart(_ABOVE, "system")]
    for hit in fitting:
        parts += [MessagePart("\n\n", "system"), MessagePart(hit.passage.shown, "memory", hit.passage.document)]
    return replace(question, parts=(*parts, MessagePart("\n\nNow: ", "system"), *question.parts))
