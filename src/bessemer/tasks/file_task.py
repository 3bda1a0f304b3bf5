"""Tasks over a file: their rows, the contexts of their questions, and the right options.

A context is a description, answered examples and a question, as one text or as the turns of a conversation.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from string import ascii_uppercase
from typing import Any, Generic, NamedTuple, TypeVar

from bessemer.core.errors import ArtefactError
from bessemer.core.records import Record, read_records
from bessemer.tasks.config import TaskConfig, fill
from bessemer.tasks.downloads import bring
from bessemer.tasks.questions import Context, GenerationQuestion

C = TypeVar("C", bound=TaskConfig)


class FileTask(Generic[C]):
    """The rows of a task over a file, and the attributes that every task has."""

    def __init__(self, config: C, folders: list[Path]) -> None:
        """folders: where the task's files are looked for in turn, and in the folders in these.

        Raises ArtefactError for a file that is not there, damaged or empty, for too few rows for the examples, and for a row
        that does not fit the settings.
        """
        self.name = config.name
        self.settings: Mapping[str, Any] = config.output_settings()
        self.shots = config.shots
        self.begin_token = config.begin_token
        self.chance = config.chance
        self._config = config
        rows = self._read_rows(folders)
        if config.shuffle_seed is not None:
            random.Random(config.shuffle_seed).shuffle(rows)
        others = None if config.examples is None else read_records(find_data(config.examples, folders))
        #: The items of the task; an item's number is its place here.
        self._items = rows[: config.limit]
        self._ids = [str(row.number) if config.id is None else row.text(config.id) for row in self._items]
        seen: set[str] = set()
        for row, id in zip(self._items, self._ids, strict=True):
            if id in seen:
                raise row.error(f"an item before it has the {config.id} {id!r} too")
            seen.add(id)
        self._clusters = [None if config.cluster is None else row.text(config.cluster) for row in self._items]
        self._prompter = Prompter(config, Examples(config, rows, others))

    def item_texts(self) -> dict[str, list[str]]:
        """Every text of an item's row, whichever fields the templates name."""
        return {id: list(_texts(row.values)) for id, row in zip(self._ids, self._items, strict=True)}

    def _generation_questions(self, context: Callable[[int, Record], Context]) -> list[GenerationQuestion]:
        """A question for each item. context: of an item's number and its row."""
        rows = zip(self._items, self._ids, self._clusters, strict=True)
        return [
            GenerationQuestion(item, context(item, row), id=id, cluster=cluster) for item, (row, id, cluster) in enumerate(rows)
        ]

    def _read_rows(self, folders: list[Path]) -> list[Record]:
        return read_records(find_data(self._config.data, folders))

    def _guessing(self, options: Sequence[Sequence[str]]) -> float:
        """The score of guessing: the settings', or the mean of one over each item's number of options."""
        return self._config.chance if self._config.chance is not None else fmean(1 / len(each) for each in options)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def find_data(name: str, folders: list[Path]) -> Path:
    """The file of that name. Raises ArtefactError when no folder has it."""
    for folder in folders:
        for path in (folder / name, *sorted(folder.glob(f"*/{name}"))):
            if path.is_file():
                return path
    looked = " and ".join(map(str, folders))
    raise ArtefactError(f"there is no {name} in {looked}; say where the data of tasks lies with --data{bring(name)}")


def options_of(record: Record, fields: str | list[str]) -> list[str]:
    """The options of a row: a field's list, or a field each. Raises ArtefactError for fewer than two, or an empty one."""
    options = record.texts(fields) if isinstance(fields, str) else [record.text(name) for name in fields]
    shown = repr(fields) if isinstance(fields, str) else ", ".join(map(repr, fields))
    if len(options) < 2:
        raise record.error(f"{shown} holds {len(options)} option, a question needs at least two")
    empty = next((index for index, option in enumerate(options) if not option.strip()), None)
    if empty is not None:
        raise record.error(f"option {empty} of {shown} is empty")
    return options


def gold_of(record: Record, field: str, options: int) -> int:
    """The index of a row's right option, given as such or as a letter. Raises ArtefactError when it is none of them."""
    given: Any = record.field(field)
    text = str(given).strip()
    letter = ascii_uppercase.find(text.upper()) if len(text) == 1 else -1
    index = letter if letter >= 0 else int(text) if text.isascii() and text.isdigit() and not isinstance(given, bool) else None
    if index is None or index >= options:
        raise record.error(f"{field!r} is {given!r}, and the right one of {options} options is 0 to {options - 1}, or a letter")
    return index


class Example(NamedTuple):
    """A question as it is written, and its answer."""

    question: str
    answer: str


class Examples:
    """Chooses the example rows of each item."""

    def __init__(self, config: TaskConfig, items: Sequence[Record], others: Sequence[Record] | None) -> None:
        """others: rows of a file of their own. Raises ArtefactError where there are too few."""
        self._config = config
        self._rows = items if others is None else others
        self._own = others is None
        needed = config.shots + (config.shots > 0 and self._own)
        if len(self._rows) < needed:
            raise ArtefactError(
                f"task {config.name}: {config.shots} examples need {needed} items, and there are {len(self._rows)}; "
                "ask for fewer with --shots"
            )
        # one more, in the place of the item itself where it is drawn
        spare = min(config.shots + 1, len(self._rows))
        self._fixed = random.Random(config.seed).sample(range(len(self._rows)), spare)

    def of(self, item: int) -> list[Record]:
        """The examples of an item by its number, never itself."""
        shots = self._config.shots
        if self._config.example_choice == "fixed":
            *_, spare = self._fixed
            # the spare one takes the item's place, so that the examples before it stay shared
            return [self._rows[spare if self._own and index == item else index] for index in self._fixed[:shots]]
        population = len(self._rows) - self._own
        drawn = random.Random(self._config.seed + item).sample(range(population), shots)
        return [self._rows[index + (self._own and index >= item)] for index in drawn]


class Prompter:
    """Writes the contexts of a task."""

    def __init__(self, config: TaskConfig, examples: Examples) -> None:
        self._config = config
        self._examples = examples

    def context(
        self, item: int, record: Record, question: str, as_example: Callable[[Record], Example], joiner: str | None = None
    ) -> Context:
        """The context of a question about a row. as_example: a row as an example. joiner: none: the task's."""
        joiner = self._config.joiner if joiner is None else joiner
        examples = [as_example(row) for row in self._examples.of(item)]
        description = fill(self._config.description, record)
        if self._config.chat:
            turns = [((each.question + joiner).rstrip(), each.answer.strip()) for each in examples]
            return as_conversation(self._config.system, description, turns, (question + joiner).rstrip())
        written = [f"{each.question}{joiner}{each.answer}" for each in examples]
        return self._config.example_delimiter.join([*([description] if description else []), *written, question]) + joiner


def as_conversation(system: str | None, description: str, examples: Sequence[tuple[str, str]], question: str) -> Context:
    """A context of messages: system message and description, examples as turns, and the question."""
    first = "\n\n".join(part for part in (system, description) if part)
    messages = [{"role": "system", "content": first}] if first else []
    for example_question, answer in examples:
        messages += [{"role": "user", "content": example_question}, {"role": "assistant", "content": answer}]
    return (*messages, {"role": "user", "content": question})
