"""Memory of conversations: what was said before, found again by what is asked now.

A memory is the folder of one user. It holds turns as they were said, with their time, and an index of them, in which the search
of documents finds those that fit a question (`search.py`); nothing is summarised. What is found stands in the user's message as
parts of origin `memory`, which are tainted: what was once pasted into a conversation is no instruction in the next.

`memory.json` holds the turns and names the index. Turns that were forgotten are taken out of it first; then an index is
built without them in another folder, and the one that has them is deleted, all its versions with it. So nothing of them is in a
file any more; where a process is killed in between, the next one that opens the memory goes on.
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
from bessemer.retrieval.index import IndexedDocument, OpenIndex, build_index, open_index
from bessemer.retrieval.search import Hit, search

_RECORD, _FORMAT = "memory.json", 1
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
        if not (folder / _RECORD).exists() and folder.exists() and any(folder.iterdir()):
            raise ArtefactError(f"{folder}: there are files here that are no memory; name another folder")
        self._given = embedder
        self._opened: Embedder | None = None
        #: The index that was read last, and of what.
        self._current: tuple[Any, OpenIndex] | None = None

    def turns(self) -> list[RememberedTurn]:
        """All turns, in the order in which they were remembered."""
        return [RememberedTurn(**values) for values in self._read()["turns"]]

    def remember(self, turns: Iterable[RememberedTurn]) -> None:
        """Add turns; those without text are left out. They are indexed by the next `recall`. Raises ArtefactError while another
        process is at work in the folder."""
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
        """The index of all conversations but one, brought up to date; None where there is no turn."""
        with self._locked() as record:
            turns = [RememberedTurn(**values) for values in record["turns"]]
            documents = [one for one, turn in zip(_documents(turns), turns, strict=True) if turn.conversation != without]
            if not documents:
                return None
            key = record["index"], record["embedder"], tuple(document.content for document in documents)
            if self._current is None or self._current[0] != key:
                place, embedder = self._place(record["index"]), self._embedder(record)
                build_index(documents, place, IndexConfig(embedder=record["embedder"]), embedder=embedder)
                self._current = key, open_index(place, embedder)
            return self._current[1]

    def forget(self, is_meant: Callable[[RememberedTurn], bool]) -> int:
        """Delete turns for good; their number. When it returns, nothing of them is in the folder. Raises ArtefactError as
        `remember`."""
        with self._locked() as record:
            kept = [values for values in record["turns"] if not is_meant(RememberedTurn(**values))]
            forgotten = len(record["turns"]) - len(kept)
            if forgotten:
                self._write({**record, "turns": kept, "holds_forgotten": True})
                self._clear(self._read())
        return forgotten

    def _clear(self, record: dict[str, Any]) -> None:
        """Build an index without what was forgotten, and delete the one that has it."""
        number = record["index"] + 1
        shutil.rmtree(self._place(number), ignore_errors=True)
        turns = [RememberedTurn(**values) for values in record["turns"]]
        if turns:
            config = IndexConfig(embedder=record["embedder"])
            build_index(_documents(turns), self._place(number), config, embedder=self._embedder(record))
        self._write({**record, "index": number, "holds_forgotten": False})
        self._remove_others(number)

    @contextmanager
    def _locked(self) -> Iterator[dict[str, Any]]:
        """The record, while no other process writes; what one that was killed left behind is cleared away."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with locked_folder(self._folder):
            for path in self._folder.glob(".*.tmp"):
                path.unlink()
            record = self._read()
            self._remove_others(record["index"])
            if record["holds_forgotten"]:
                self._clear(record)
            yield self._read()

    def _remove_others(self, number: int) -> None:
        for place in self._folder.glob("index-*"):
            if place != self._place(number):
                shutil.rmtree(place)

    def _read(self) -> dict[str, Any]:
        path = self._folder / _RECORD
        if not path.exists():
            return {"format": _FORMAT, "index": 0, "embedder": self._name(None), "holds_forgotten": False, "turns": []}
        record: dict[str, Any] = read_json(path, "memory")
        if not isinstance(record, dict) or not {"format", "index", "embedder", "holds_forgotten", "turns"} <= record.keys():
            raise ArtefactError(f"{path}: this is no memory of conversations")
        check_format(record["format"], _FORMAT, path, "memory")
        return {**record, "embedder": self._name(record["embedder"])}

    def _name(self, before: str | None) -> str:
        return self._given or before or ("none" if packaged_minilm() is None else "minilm")

    def _write(self, record: dict[str, Any]) -> None:
        write_json(self._folder / _RECORD, record)

    def _embedder(self, record: dict[str, Any]) -> Embedder | None:
        if self._opened is None and record["embedder"] != "none":
            self._opened = open_embedder(record["embedder"])
        return self._opened

    def _place(self, number: int) -> Path:
        return self._folder / f"index-{number}"


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
