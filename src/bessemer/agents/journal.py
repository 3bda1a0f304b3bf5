"""The journal of a task: JSON lines, each on the disk before the agent goes on, from which a killed task resumes.

    {"event": "task", …}      the task, the model, the tools, the first messages
    {"event": "message", …}   a message of the assistant, whole, before any of its calls is made; or one that the user added
    {"event": "begin", …}     a call is about to be made, with what its tool wants to know about the state before it
    {"event": "done", …}      its result
    {"event": "end", …}       why the agent stopped

A call that has `begin` and no `done` was under way when the process ended: it may have happened or not. Who can tell is its
tool (`loop.AgentTool`). A last line that is cut off was never finished and is left out.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from bessemer.assistant.messages import Message, MessagePart, ToolCall
from bessemer.assistant.tools import ToolResult
from bessemer.core.errors import ArtefactError, writing_to
from bessemer.core.store import locked_folder

JOURNAL = "journal.jsonl"
#: Raised when the form of the lines changes.
_FORMAT = 1

Record = Mapping[str, Any]


def message_as_json(message: Message) -> dict[str, Any]:
    """A message with its parts' origins."""
    values: dict[str, Any] = {
        "role": message.role,
        "parts": [{"text": part.text, "origin": part.origin, "source": part.source} for part in message.parts],
    }
    if message.thinking:
        values["thinking"] = message.thinking
    if message.calls:
        values["calls"] = [{"id": call.id, "name": call.name, "arguments": dict(call.arguments)} for call in message.calls]
    if message.role == "tool":
        values |= {"call_id": message.call_id, "name": message.name}
    if message.is_derived:
        values["is_derived"] = True
    return values


def message_of_json(values: Mapping[str, Any]) -> Message:
    """The inverse of `message_as_json`."""
    return Message(
        values["role"],
        tuple(MessagePart(part["text"], part["origin"], part["source"]) for part in values["parts"]),
        values.get("thinking", ""),
        tuple(ToolCall(call["id"], call["name"], call["arguments"]) for call in values.get("calls", ())),
        values.get("call_id", ""),
        values.get("name", ""),
        bool(values.get("is_derived")),
    )


@dataclass(frozen=True)
class BegunCall:
    """A call that was begun. state: what its tool noted before it."""

    call: ToolCall
    state: Any = None


@dataclass
class TaskState:
    """What a journal says about a task.

    messages: as the assistant has them; those that answer calls come with the calls' results. pending: calls of the last
    message without a result. begun: those of them that were under way. tokens: of prompts and completions. seconds: of messages
    and calls.
    """

    task: Record
    messages: list[Message] = field(default_factory=list)
    pending: list[ToolCall] = field(default_factory=list)
    begun: dict[str, BegunCall] = field(default_factory=dict)
    finish: str = ""
    results: list[tuple[ToolCall, ToolResult, str]] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    end: Record | None = None

    def take(self, record: Record) -> None:
        """Apply the next record. Raises KeyError, TypeError or ValueError for one that is none."""
        match record["event"]:
            case "message":
                message = message_of_json(record["message"])
                self.messages.append(message)
                self.end = None
                if message.role == "assistant":
                    self.steps += 1
                    self.tokens += record["prompt_tokens"] + record["completion_tokens"]
                    self.seconds += record["seconds"]
                    self.finish = record["finish"]
                    self.pending = list(message.calls)
                    for reason in record.get("bad_calls", ()):
                        self.messages.append(Message.tool("", "", reason))
            case "begin":
                self.begun[record["call"]] = BegunCall(self._pending(record["call"], record["arguments"]), record["state"])
            case "done":
                call = self._pending(record["call"])
                result = ToolResult(record["text"], record["is_error"])
                self.seconds += record["seconds"]
                self.pending = [other for other in self.pending if other.id != call.id]
                self.begun.pop(call.id, None)
                self.results.append((call, result, record["how"]))
                self.messages.append(Message.tool(call.id, call.name, result.text))
            case "end":
                self.end = record
                self.seconds += record["seconds"]
            case event:
                raise ValueError(f"an unknown event {event!r}")

    def _pending(self, id: str, arguments: Mapping[str, Any] | None = None) -> ToolCall:
        call = next((call for call in self.pending if call.id == id), None)
        if call is None:
            raise ValueError(f"the call {id!r} is none of the last message")
        return call if arguments is None else ToolCall(call.id, call.name, arguments)


def read_records(folder: Path) -> tuple[list[Record], int]:
    """The records of a journal, and how many bytes of the file they take: a last line that was cut off is not among them.

    Raises ArtefactError, with the line, for a journal that is missing or damaged elsewhere.
    """
    path = folder / JOURNAL
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ArtefactError(f"{folder}: this is no folder of an agent's task; it has no {JOURNAL}") from None
    records: list[Record] = []
    size = 0
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
            record["event"]
        except (ValueError, TypeError, LookupError) as error:
            raise ArtefactError(f"{path}, line {number}: this journal is damaged ({error})") from None
        records.append(record)
        size += len(line)
    if not records or records[0]["event"] != "task" or records[0].get("format") != _FORMAT:
        raise ArtefactError(f"{path}: it does not begin with a task of format {_FORMAT}")
    return records, size


def state_of(records: Sequence[Record], place: Path | str = JOURNAL) -> TaskState:
    """The state after the records. Raises ArtefactError, with the line, for records that do not follow from each other."""
    number = 1
    try:
        state = TaskState(records[0], [message_of_json(message) for message in records[0]["messages"]])
        for record in records[1:]:
            number += 1
            state.take(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{place}, line {number}: this journal is damaged ({error})") from None
    return state


@dataclass
class Journal:
    """A journal that is being written, and the state that it says. One process at a time writes it."""

    folder: Path
    state: TaskState
    _file: IO[bytes]
    clock: Callable[[], float] = time.time

    def write(self, event: str, **values: Any) -> None:
        """Add a record, and return when it is on the disk. Raises StorageError where it cannot be."""
        record = {"event": event, "time": self.clock(), **values}
        with writing_to(self.folder / JOURNAL):
            self._file.write(json.dumps(record, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self.state.take(json.loads(json.dumps(record, default=str)))

    @classmethod
    @contextmanager
    def begin(cls, folder: Path, messages: Sequence[Message], **about: Any) -> Iterator[Self]:
        """While entered, the journal of a new task. about: the model, the tools and the like, as plain values. Raises
        ArtefactError where the folder has a journal."""
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with locked_folder(folder):
            if (folder / JOURNAL).exists():
                raise ArtefactError(f"{folder}: there is a task in it already; go on with --resume {folder}, or name another")
            task = {
                "event": "task",
                "format": _FORMAT,
                "time": time.time(),
                "id": os.urandom(16).hex(),
                "messages": [message_as_json(message) for message in messages],
                **about,
            }
            with writing_to(folder / JOURNAL), (folder / JOURNAL).open("xb") as file:
                file.write(json.dumps(task, ensure_ascii=False, default=str).encode("utf-8", "replace") + b"\n")
                file.flush()
                os.fsync(file.fileno())
                _synchronise(folder)
                yield cls(folder, state_of([task]), file)

    @classmethod
    @contextmanager
    def resume(cls, folder: Path) -> Iterator[Self]:
        """While entered, the journal of a task that goes on. Raises ArtefactError as `read_records` and `state_of`."""
        read_records(folder)
        with locked_folder(folder):
            records, size = read_records(folder)
            state = state_of(records, folder / JOURNAL)
            with (folder / JOURNAL).open("r+b") as file:
                file.truncate(size)
                file.seek(size)
                yield cls(folder, state, file)


def _synchronise(folder: Path) -> None:
    """Let the folder's entry of a new file reach the disk, where folders can be synchronised."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
