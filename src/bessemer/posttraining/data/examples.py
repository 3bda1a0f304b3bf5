"""Examples from files, functions and earlier stages: rows read by a parser, conversations, pairs of answers.

`made/mismatched` is made here, from a run's conversations: pairs of an answer and one that belongs to another question.
Every second wrong answer looks like the right one: it answers a question that begins with the same words, so that only the
rest of the question tells them apart. The others answer a question of another kind, which a model learns to tell sooner.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

from bessemer.core.errors import BessemerError, RequestError, SourceError
from bessemer.core.hashing import derive_seed, hash_file, hash_value
from bessemer.core.records import Record, read_records
from bessemer.core.store import write_text
from bessemer.core.usercode import load_user_function
from bessemer.posttraining.data.formats import (
    Answered,
    Message,
    Pair,
    Turns,
    answer_in_columns,
    as_answered,
    as_pair,
    plain_turns,
)
from bessemer.posttraining.data.made import MISMATCHED, TASK, data_path
from bessemer.posttraining.data.splitting import opening, split_examples

Example = TypeVar("Example")

#: Number of unusable rows that are named after the first.
_NAMED_ROWS = 5


def read_examples(path: Path, parse: Callable[[Mapping[str, Any]], Example]) -> list[Example]:
    """The rows of a file as examples. Raises SourceError with the file, the line of the first that is malformed, and the lines
    of others."""
    return [example for _, example in placed_examples(path, parse)]


def placed_examples(path: Path, parse: Callable[[Mapping[str, Any]], Example]) -> list[tuple[str, Example]]:
    """`read_examples`, each behind its file and line."""
    examples, bad = parsed(read_records(path), parse)
    if bad:
        raise SourceError(_bad_rows(bad))
    return examples


def examples_of_function(name: str, folder: Path, parse: Callable[[Mapping[str, Any]], Example]) -> list[tuple[str, Example]]:
    """The rows that a user's `file.py:function` gives, as examples, each behind its name and number.

    Raises ConfigError where there is no such function, SourceError for one that fails or gives none, and with the number of the
    first row that is malformed.
    """
    function = load_user_function(name, folder)
    try:
        rows = list(function())
    except BessemerError:
        raise
    except Exception as error:  # a user's function may raise anything
        raise SourceError(f"{name}: it failed: {type(error).__name__}: {error}") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise SourceError(f"{name}: row {number:,} must be a dict, it is {row!r}"[:200])
    if not rows:
        raise SourceError(f"{name}: it gives no row")
    records = [Record(dict(row), number, f"{name}: row {number:,}") for number, row in enumerate(rows, start=1)]
    examples, bad = parsed(records, parse)
    if bad:
        raise SourceError(f"{bad[0].record.place}: {bad[0].why}")
    return examples


class BadRow(NamedTuple):
    """A row that is no example. why: in one line, to stand behind the row's place."""

    record: Record
    why: str


def parsed(
    records: Iterable[Record], parse: Callable[[Mapping[str, Any]], Example]
) -> tuple[list[tuple[str, Example]], list[BadRow]]:
    """Parsed rows with their places, and the errors of malformed ones. parse: raises ValueError or RequestError for a
    malformed row."""
    examples, bad = [], []
    for record in records:
        try:
            examples.append((record.place, parse(record.values)))
        except (ValueError, RecursionError, RequestError) as error:
            bad.append(BadRow(record, str(error)))
    return examples, bad


def _bad_rows(bad: Sequence[BadRow]) -> str:
    """The first of some rows with its reason, where the others are, and what to do."""
    (first, why), *others = bad
    remedy = "mend the row, or take it out of the file"
    if not others:
        return f"{first.place}: {why}; {remedy}"
    shown = ", ".join(f"{record.number:,}" for record, _ in others[:_NAMED_ROWS])
    kind = "lines" if first.place.endswith(f":{first.number}") else "rows"
    more = ", …" if len(others) > _NAMED_ROWS else ""
    return f"{first.place}: {why}; {len(others):,} more cannot be used ({kind} {shown}{more}); {remedy}"


def prompt_key(prompt: Turns) -> str:
    """Hash of a prompt, by which examples of one prompt are kept together."""
    return hash_value(prompt if isinstance(prompt, str) else [dict(message) for message in prompt])


def drawn(examples: Sequence[Example], most: int, seed: int) -> Sequence[Example]:
    """At most `most` examples, drawn at random, since the first ones would all come from the first file."""
    return examples if len(examples) <= most else random.Random(seed).sample(examples, most)


def files_fingerprint(names: Sequence[str], folder: Path) -> dict[str, str]:
    """Hashes of files, for a stage's key. Raises SourceError for a missing one."""
    for name in names:
        if not (folder / name).is_file():
            raise SourceError(f"{folder / name}: there is no such file")
    return {name: hash_file(folder / name) for name in names}


@dataclass(frozen=True)
class Conversation:
    """A conversation to learn from, and its source: a file or the name of made data. place: its row, for messages."""

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
        """Hash of the messages and the tools."""
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


#: Number of first words by which the kind of a question is known.
_WORDS_OF_KIND = 2


def mismatched_pairs(conversations: Path, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs of the conversations that `sft` trained on and held out: one of each question and answer that
    another answer is found for, in turn of the same kind and of another one where there are several.

    Items of tasks are left out: a verifier judges these. Raises SourceError or ArtefactError for a file that is missing or
    malformed.
    """
    training, held_out = (conversations / f"{name}.jsonl" for name in ("train", "validation"))
    return _pairs(training, seed), _pairs(held_out, seed) if held_out.stat().st_size else []


def _pairs(path: Path, seed: int) -> list[Pair]:
    by_kind: dict[tuple[str, ...], list[Conversation]] = defaultdict(list)
    for conversation in read_examples(path, _conversation):
        messages = conversation.messages
        if len(messages) == 2 and not conversation.source.startswith(TASK):
            by_kind[tuple(str(messages[0]["content"]).split()[:_WORDS_OF_KIND])].append(conversation)
    pairs = []
    for kind, alike in by_kind.items():
        generator = random.Random(derive_seed(seed, "mismatched"))
        generator.shuffle(alike)
        unlike = [one for other, of_other in by_kind.items() if other != kind for one in of_other]
        for number, (conversation, next_one) in enumerate(zip(alike, [*alike[1:], alike[0]], strict=True)):
            other = generator.choice(unlike) if unlike and number % 2 else next_one
            prompt, chosen, rejected = conversation.messages[:1], conversation.messages[1:], other.messages[1:]
            # one question may have several right answers
            if chosen != rejected and other.messages[:1] != prompt:
                pairs.append(Pair(prompt, chosen, rejected))
    return pairs


def _conversation(row: Mapping[str, Any]) -> Conversation:
    return Conversation(as_answered(row), str(row.get("source", "")))


def gather_pairs(
    names: Sequence[str], folder: Path, made: Mapping[str, Path], share: float, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs of all data that are named: of rows, `share` of the prompts are held out; of `made/mismatched`
    what the conversations were.

    made: what stages above have made, by name. Raises SourceError or ArtefactError for pairs that are missing or malformed.
    """
    mismatched: tuple[list[Pair], list[Pair]] = ([], [])
    if MISMATCHED in names:
        mismatched = mismatched_pairs(data_path(MISMATCHED, folder, made), seed)
    rows = [pair for name in names if name != MISMATCHED for pair in read_examples(data_path(name, folder, made), as_pair)]
    training, held_out = split_examples(rows, lambda pair: opening(pair.prompt), share, seed)
    return [*mismatched[0], *training], [*mismatched[1], *held_out]
