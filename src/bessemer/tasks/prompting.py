"""Contexts: description, answered examples and a question, as one text or as the turns of a conversation."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bessemer.core.errors import ArtefactError
from bessemer.core.records import Record
from bessemer.tasks.config import TaskConfig
from bessemer.tasks.questions import Context
from bessemer.tasks.template import fill


class Example(NamedTuple):
    """A question as it is written, and its answer."""

    question: str
    answer: str


class Examples:
    """Which rows are the examples of each item."""

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
        # one to spare, for the item that is among them
        spare = min(config.shots + 1, len(self._rows))
        self._fixed = random.Random(config.seed).sample(range(len(self._rows)), spare)

    def of(self, item: int) -> list[Record]:
        """The examples of an item by its number, never itself."""
        shots = self._config.shots
        if self._config.example_choice == "fixed":
            *_, spare = self._fixed
            # in its place, so that what is before it stays shared
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
            return self._conversation(description, examples, question, joiner)
        written = [f"{each.question}{joiner}{each.answer}" for each in examples]
        return self._config.example_delimiter.join([*([description] if description else []), *written, question]) + joiner

    def _conversation(self, description: str, examples: Sequence[Example], question: str, joiner: str) -> Context:
        system = "\n\n".join(part for part in (self._config.system, description) if part)
        messages = [{"role": "system", "content": system}] if system else []
        for each in examples:
            messages.append({"role": "user", "content": (each.question + joiner).rstrip()})
            messages.append({"role": "assistant", "content": each.answer.strip()})
        messages.append({"role": "user", "content": (question + joiner).rstrip()})
        return tuple(messages)
