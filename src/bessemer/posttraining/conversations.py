"""Examples of supervised tuning in files: conversations, and prompts with their answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

from bessemer.core.hashing import hash_value
from bessemer.core.records import is_table
from bessemer.core.store import write_text
from bessemer.posttraining.config import SFTConfig
from bessemer.posttraining.dataset import examples_of_function, files_fingerprint, placed_examples
from bessemer.posttraining.formats import Answered, Message, answer_in_columns, as_answered, plain_turns


@dataclass(frozen=True)
class Conversation:
    """What is learnt, and its source: a file or the name of made data. place: its row, for messages."""

    answered: Answered
    source: str
    place: str = field(default="", compare=False)

    @classmethod
    def of(cls, messages: Sequence[Message], source: str, tools: Sequence[Message] = ()) -> Self:
        """A conversation of which every turn of the assistant's is learnt."""
        return cls(Answered((), tuple(messages), tuple(tools)), source)

    @property
    def messages(self) -> tuple[Message, ...]:
        """All messages in order; none of a text without roles."""
        prompt, answer = self.answered.prompt, self.answered.answer
        return () if isinstance(prompt, str) or isinstance(answer, str) else (*prompt, *answer)

    @property
    def tools(self) -> tuple[Message, ...]:
        """The tools that the assistant could call."""
        return self.answered.tools

    @property
    def id(self) -> str:
        """Hash of what is said, and of the tools."""
        said = self._said
        parts = list(said.values())
        if self.tools or len(said) > 1:
            return hash_value([*parts, *([list(self.tools)] if self.tools else [])])
        return hash_value(parts[0])

    @property
    def record(self) -> dict[str, Any]:
        """The conversation as a line of a file, in the format of TRL and `datasets`."""
        tools = {"tools": list(self.tools)} if self.tools else {}
        return {"id": self.id, "source": self.source, **self._said, **tools}

    @property
    def _said(self) -> dict[str, Any]:
        if self.answered.prompt == ():
            return {"messages": plain_turns(self.answered.answer)}
        return {"prompt": plain_turns(self.answered.prompt), "completion": plain_turns(self.answered.answer)}


def read_conversations(path: Path, columns: tuple[str, str] | None = None) -> list[Conversation]:
    """All examples of a file, in any of the formats of `formats.py`.

    columns: those of questions and of answers, for a table of other names. Raises SourceError or ArtefactError with file and
    line of the first that is malformed, or when there is none.
    """
    return [Conversation(answered, path.name, place) for place, answered in placed_examples(path, _parser(columns))]


def made_conversations(name: str, folder: Path, columns: tuple[str, str] | None = None) -> list[Conversation]:
    """All examples that a user's `file.py:function` gives, in the formats of `read_conversations`. Raises ConfigError where
    there is no such function, SourceError as `read_conversations`."""
    return [Conversation(answered, name, place) for place, answered in examples_of_function(name, folder, _parser(columns))]


def _parser(columns: tuple[str, str] | None) -> Callable[[Mapping[str, Any]], Answered]:
    return as_answered if columns is None else partial(answer_in_columns, columns=columns)


def write_conversations(path: Path, conversations: Iterable[Conversation]) -> None:
    """Write a file of conversations atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(one.record, ensure_ascii=False) + "\n" for one in conversations))


def data_fingerprint(config: SFTConfig, folder: Path) -> dict[str, str]:
    """Hashes of the files of conversations, for the stage's key. Raises SourceError for a missing one."""
    return files_fingerprint([name for name in config.data if is_table(name)], folder)
