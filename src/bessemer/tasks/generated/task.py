"""Tasks over items that are made by a seed: arithmetic by difficulty, retrieval and variable tracking at growing lengths."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from bessemer.core.errors import ConfigError
from bessemer.core.records import Record
from bessemer.tasks.generate import verified_samples
from bessemer.tasks.generated.arithmetic import LEVELS, arithmetic_items
from bessemer.tasks.generated.config import (
    ArithmeticConfig,
    GeneratedConfig,
    LengthConfig,
    NeedleConfig,
    VariableTrackingConfig,
)
from bessemer.tasks.generated.haystack import Measure, count_words
from bessemer.tasks.generated.item import GeneratedItem
from bessemer.tasks.generated.needle import needle_items
from bessemer.tasks.generated.variable_tracking import variable_tracking_items
from bessemer.tasks.questions import Context, CountTokens, GenerationQuestion, GenerationTask, Outcome
from bessemer.tasks.template import fill
from bessemer.tasks.verifiers import Numeric

C = TypeVar("C", bound=GeneratedConfig)
L = TypeVar("L", bound=LengthConfig)


class _Asked(NamedTuple):
    """An item: its number in the task and in its level, which does not depend on how many are asked."""

    item: int
    level: int
    number: int
    made: GeneratedItem


class GeneratedTask(GenerationTask, Generic[C]):
    """Items of several levels, one of each in turn, so that the first ones (`limit`) are of all levels."""

    def __init__(self, config: C, levels: Sequence[int]) -> None:
        self.name = config.name
        self.settings: Mapping[str, Any] = config.output_settings()
        self.begin_token = config.begin_token
        self.generation = config.generation
        self._config = config
        self._delimiter = "\n\n"
        self._all_levels = list(dict.fromkeys(levels))
        self._levels = self._all_levels
        self._asked: dict[int, _Asked] = {}

    def questions(self) -> list[GenerationQuestion]:
        """Raises ConfigError for items that cannot be made."""
        self._asked = {asked.item: asked for asked in self._make()}
        return [
            GenerationQuestion(
                asked.item,
                self._context(asked.made.prompt, self._examples(asked.level)),
                id=f"{self.level_name} {asked.level}: {asked.number + 1}",
                level=asked.level,
            )
            for asked in self._asked.values()
        ]

    def judge(self, question: GenerationQuestion, texts: Sequence[str]) -> Outcome:
        return verified_samples(Numeric(), texts, [self._asked[question.item].made.answer])

    def reference(self, question: GenerationQuestion) -> str:
        return self._asked[question.item].made.answer

    @abstractmethod
    def _items(self, level: int, count: int) -> list[GeneratedItem]:
        """The first items of a level. Raises ValueError for what cannot be made."""

    def _examples(self, level: int) -> Sequence[GeneratedItem]:
        """Answered items before each question of a level."""
        return ()

    @property
    def _remark(self) -> str:
        """What stands behind the message about an item that cannot be made."""
        return ""

    def _make(self) -> list[_Asked]:
        limit = self._config.limit or self._config.items * len(self._levels)
        count = min(self._config.items, -(-limit // len(self._levels)))
        try:
            made = {level: self._items(level, count) for level in self._levels}
        except ValueError as error:
            raise ConfigError(f"task {self.name}: {error}{self._remark}") from None
        places = {level: place for place, level in enumerate(self._all_levels)}
        asked = [
            _Asked(number * len(places) + places[level], level, number, made[level][number])
            for number in range(count)
            for level in self._levels
        ]
        return asked[:limit]

    def _context(self, prompt: str, examples: Sequence[GeneratedItem] = ()) -> Context:
        config = self._config
        description = fill(config.description, Record({}, 0, f"task {self.name}"))
        if not config.chat:
            shown = [f"{example.prompt} {example.answer}" for example in examples]
            return self._delimiter.join([*([description] if description else []), *shown, prompt])
        system = "\n\n".join(part for part in (config.system, description) if part)
        messages = [{"role": "system", "content": system}] if system else []
        for example in examples:
            messages += [{"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.answer}]
        return (*messages, {"role": "user", "content": prompt})


class ArithmeticTask(GeneratedTask[ArithmeticConfig]):
    """Expressions by difficulty, `12 + 7 =`."""

    level_name = "difficulty"

    def __init__(self, config: ArithmeticConfig) -> None:
        super().__init__(config, config.levels)
        self.shots = config.shots
        self._delimiter = config.example_delimiter
        self._made: dict[int, list[GeneratedItem]] = {}

    def _items(self, level: int, count: int) -> list[GeneratedItem]:
        # always as many, so that a limit changes no example
        total = self._config.items + self.shots
        difficulty = LEVELS[level - 1]
        if self._config.operators is not None:
            difficulty = difficulty._replace(operators=self._config.operators)
        self._made[level] = arithmetic_items(total, seed=self._config.seed, difficulty=difficulty, part=self._config.part)
        return self._made[level][:count]

    def _examples(self, level: int) -> Sequence[GeneratedItem]:
        return self._made[level][self._config.items :]


class LengthTask(GeneratedTask[L]):
    """Items at growing lengths: in words, until `fit_to_model` says how the model counts."""

    level_name = "length"

    def __init__(self, config: L) -> None:
        super().__init__(config, config.lengths)
        self._measure: Measure = count_words
        self._around = 0

    @property
    def _remark(self) -> str:
        return f"; {self._around} tokens more stand around it" if self._around else ""

    def fit_to_model(self, count_tokens: CountTokens, context_length: int) -> Sequence[str]:
        most = context_length - self.generation.max_tokens
        self._levels = [length for length in self._all_levels if length <= most]
        if not self._levels:
            raise ConfigError(
                f"task {self.name}: no length fits: the shortest is {min(self._all_levels):,} tokens, and the model's context "
                f"of {context_length:,} leaves {most:,} before an answer of {self.generation.max_tokens:,}"
            )
        empty = count_tokens("")
        self._measure = lambda text: count_tokens(text) - empty
        # what stands around the prompt: begin token, description, chat template
        self._around = count_tokens(self._context("x")) - self._measure("x")
        too_long = ", ".join(f"{length:,}" for length in self._all_levels if length > most)
        return [f"left out, since the model's context is {context_length:,} tokens: length {too_long}"] if too_long else []


class NeedleTask(LengthTask[NeedleConfig]):
    """A number in a long text."""

    def _items(self, level: int, count: int) -> list[GeneratedItem]:
        return needle_items(
            count,
            seed=self._config.seed,
            length=level - self._around,
            depth=self._config.depth,
            needles=self._config.needles,
            measure=self._measure,
        )


class VariableTrackingTask(LengthTask[VariableTrackingConfig]):
    """The value of a variable through assignments scattered over a long text."""

    def _items(self, level: int, count: int) -> list[GeneratedItem]:
        return variable_tracking_items(
            count,
            seed=self._config.seed,
            length=level - self._around,
            hops=self._config.hops,
            chains=self._config.chains,
            measure=self._measure,
        )
