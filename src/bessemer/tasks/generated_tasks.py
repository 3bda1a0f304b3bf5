"""Tasks over items made from a seed, and their settings: arithmetic by difficulty, retrieval and variable tracking
at growing lengths.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

from pydantic import Field

from bessemer.core.config import setting
from bessemer.core.errors import ConfigError
from bessemer.core.records import Record
from bessemer.tasks.config import SampledConfig, fill
from bessemer.tasks.file_task import as_conversation
from bessemer.tasks.generate import verified_samples
from bessemer.tasks.generated_items import (
    LEVELS,
    MOST_NEEDLES,
    GeneratedItem,
    Measure,
    Split,
    arithmetic_items,
    count_words,
    needle_items,
    variable_tracking_items,
)
from bessemer.tasks.questions import Context, CountTokens, GenerationQuestion, GenerationTask, Outcome
from bessemer.tasks.verifiers import Numeric


class GeneratedConfig(SampledConfig):
    """Settings of tasks with generated items: items of several levels, one of each in turn."""

    items: int = setting(50, "items of each level", unit="items", ge=1)
    max_tokens: int = setting(32, "longest answer", unit="tokens", ge=1)
    stop: list[Annotated[str, Field(min_length=1)]] = setting(
        default_factory=lambda: ["\n"], description="texts before which an answer ends; with `chat` a turn's end does"
    )


class ArithmeticConfig(GeneratedConfig):
    """Arithmetic on whole numbers, by difficulty; the answer is the last number that a model writes."""

    kind: Literal["arithmetic"] = setting("arithmetic", "expressions whose value is asked for")
    levels: list[Annotated[int, Field(ge=1, le=len(LEVELS))]] = setting(
        default_factory=lambda: list(range(1, len(LEVELS) + 1)),
        description="difficulties, from sums of single digits (1) to five terms with products and parentheses (8)",
        min_length=1,
    )
    operators: str | None = setting(
        None, "only these of `+-*`, whatever the difficulty; none: those of each difficulty", pattern=r"^[-+*]+$"
    )
    part: Split = setting(
        "all",
        "train: without one in eight expressions, by their numbers and operators, whatever the seed; held_out: these alone",
    )
    skip: int = setting(
        0, "items of each difficulty before the first: those that another task with the same seed has", unit="items", ge=0
    )
    shots: int = setting(0, "answered examples of the same difficulty before each question", unit="examples", ge=0)
    example_delimiter: str = setting("\n", "text between description, examples and question")

    def output_settings(self) -> dict[str, Any]:
        """As of `Config`, without what is not skipped, so that evaluations of tasks that skip nothing go on."""
        kept = super().output_settings()
        if not self.skip:
            del kept["skip"]
        return kept


class LengthConfig(GeneratedConfig):
    """Settings of tasks at growing lengths."""

    lengths: list[Annotated[int, Field(ge=32)]] = setting(
        default_factory=lambda: [256, 512, 1024, 2048, 4096, 8192, 16384, 32768],
        description="most tokens of a prompt, begin token and chat template included; the model's tokenizer counts. A length "
        "that does not leave `max_tokens` of the model's context is left out",
        min_length=1,
    )


class NeedleConfig(LengthConfig):
    """A number that stands somewhere in a long text (Kamradt 2023)."""

    kind: Literal["needle"] = setting("needle", "find a number in a long text")
    needles: int = setting(1, "numbers in the text, of which one is asked for", ge=1, le=MOST_NEEDLES)
    depth: float | None = setting(None, "where the number stands, 0 first … 1 last; none: anywhere", ge=0, le=1)


class VariableTrackingConfig(LengthConfig):
    """The value of a variable through assignments scattered over a long text (RULER, Hsieh et al. 2024)."""

    kind: Literal["variable_tracking"] = setting("variable_tracking", "follow assignments through a long text")
    hops: int = setting(4, "assignments from a variable to the next", ge=0)
    chains: int = setting(1, "chains of assignments, of which one is asked for", ge=1)


C = TypeVar("C", bound=GeneratedConfig)
L = TypeVar("L", bound=LengthConfig)


class _NumberedItem(NamedTuple):
    """A generated item with its number in the task and in its level; neither depends on how many items are asked for."""

    number: int
    level: int
    number_in_level: int
    generated: GeneratedItem


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
        self._items_by_number: dict[int, _NumberedItem] = {}

    def questions(self) -> list[GenerationQuestion]:
        """Raises ConfigError for items that cannot be made."""
        self._items_by_number = {item.number: item for item in self._make()}
        return [
            GenerationQuestion(
                item.number,
                self._context(item.generated.prompt, self._examples(item.level)),
                id=f"{self.level_name} {item.level}: {item.number_in_level + 1}",
                level=item.level,
            )
            for item in self._items_by_number.values()
        ]

    def judge(self, question: GenerationQuestion, texts: Sequence[str]) -> Outcome:
        return verified_samples(Numeric(), texts, [self._items_by_number[question.item].generated.answer])

    def reference(self, question: GenerationQuestion) -> str:
        return self._items_by_number[question.item].generated.answer

    @abstractmethod
    def _items(self, level: int, count: int) -> list[GeneratedItem]:
        """The first items of a level. Raises ValueError for what cannot be made."""

    def _examples(self, level: int) -> Sequence[GeneratedItem]:
        """Answered items before each question of a level."""
        return ()

    @property
    def _remark(self) -> str:
        """The end of the message about an item that cannot be made."""
        return ""

    def _make(self) -> list[_NumberedItem]:
        limit = self._config.limit or self._config.items * len(self._levels)
        count = min(self._config.items, -(-limit // len(self._levels)))
        try:
            made = {level: self._items(level, count) for level in self._levels}
        except ValueError as error:
            raise ConfigError(f"task {self.name}: {error}{self._remark}") from None
        places = {level: place for place, level in enumerate(self._all_levels)}
        items = [
            _NumberedItem(number * len(places) + places[level], level, number, made[level][number])
            for number in range(count)
            for level in self._levels
        ]
        return items[:limit]

    def _context(self, prompt: str, examples: Sequence[GeneratedItem] = ()) -> Context:
        config = self._config
        description = fill(config.description, Record({}, 0, f"task {self.name}"))
        if not config.chat:
            shown = [f"{example.prompt} {example.answer}" for example in examples]
            return self._delimiter.join([*([description] if description else []), *shown, prompt])
        return as_conversation(config.system, description, examples, prompt)


class ArithmeticTask(GeneratedTask[ArithmeticConfig]):
    """Expressions by difficulty, `12 + 7 =`."""

    level_name = "difficulty"

    def __init__(self, config: ArithmeticConfig) -> None:
        super().__init__(config, config.levels)
        self.shots = config.shots
        self._delimiter = config.example_delimiter
        self._made: dict[int, list[GeneratedItem]] = {}

    def _items(self, level: int, count: int) -> list[GeneratedItem]:
        # the same number whatever the limit, so that it changes no example
        total = self._config.skip + self._config.items + self.shots
        difficulty = LEVELS[level - 1]
        if self._config.operators is not None:
            difficulty = difficulty._replace(operators=self._config.operators)
        made = arithmetic_items(total, seed=self._config.seed, difficulty=difficulty, part=self._config.part)
        self._made[level] = made[self._config.skip :]
        return self._made[level][:count]

    def _examples(self, level: int) -> Sequence[GeneratedItem]:
        return self._made[level][self._config.items :]


class LengthTask(GeneratedTask[L]):
    """Items at growing lengths: in words, after `fit_to_model` in the model's tokens."""

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
        # tokens around the prompt: begin token, description, chat template
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
