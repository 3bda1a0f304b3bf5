"""What a task asks of a model, what it needs back, and what it makes of that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

#: What comes before an answer: a text, or a conversation for the model's chat template.
Context = str | tuple[Mapping[str, str], ...]


class ContinuationScore(Protocol):
    """How likely a model finds a continuation: what a task needs of `inference.scores.Score`."""

    @property
    def token_ids(self) -> Sequence[int]:
        """Its tokens."""

    @property
    def log_probs(self) -> Sequence[float]:
        """Of each token, in nats."""

    @property
    def total(self) -> float:
        """The continuation's log-probability, in nats."""

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding writes the whole of it."""


@dataclass(frozen=True)
class Part:
    """A context and the continuations that are scored behind it."""

    context: Context
    continuations: tuple[str, ...]


@dataclass(frozen=True)
class LikelihoodQuestion:
    """An item asked by the likelihood of continuations.

    item: its number in the task. form: one of several ways to ask it. id: names the item in every evaluation, its number if
    empty. cluster: what the item shares with others, such as a passage.
    """

    item: int
    form: str
    parts: tuple[Part, ...]
    id: str = ""
    cluster: str | None = None


@dataclass(frozen=True)
class GenerationQuestion:
    """An item whose answer is generated; the fields are those of `LikelihoodQuestion`."""

    item: int
    context: Context
    form: str = "generate"
    id: str = ""
    cluster: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What an answer is worth: scores from 0 to 1 by name. answer: its text. chosen, gold: plain values, for a reader."""

    scores: Mapping[str, float]
    answer: str = ""
    chosen: Any = None
    gold: Any = None


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated. samples: of each item. temperature 0 is greedy; seed: of the samples."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    samples: int = 1
    seed: int = 0


class _Task(ABC):
    """What both kinds of task have.

    name: unique in an evaluation. settings: plain JSON values, of which a change makes another task. chance: the headline score
    of guessing. shots: examples before each question. begin_token: whether a text begins with the begin token even where the
    tokenizer writes none. group, baseline: of a task that counts in a mean of centred scores.
    """

    name: str = ""
    settings: Mapping[str, Any] = {}
    chance: float | None = None
    shots: int = 0
    begin_token: bool = False
    group: str | None = None
    baseline: float = 0.0

    @abstractmethod
    def headline(self, form: str) -> str:
        """Which of the scores of a form is its accuracy."""


class LikelihoodTask(_Task):
    """A task that is asked by the likelihood of continuations."""

    @abstractmethod
    def questions(self) -> Sequence[LikelihoodQuestion]:
        """All questions, those of one form together."""

    @abstractmethod
    def judge(self, question: LikelihoodQuestion, scores: Sequence[Sequence[ContinuationScore]]) -> Outcome:
        """What the scores of the continuations of each part say."""


class GenerationTask(_Task):
    """A task whose answers are generated."""

    generation: GenerationSettings = GenerationSettings()

    @abstractmethod
    def questions(self) -> Sequence[GenerationQuestion]:
        """All questions."""

    @abstractmethod
    def judge(self, question: GenerationQuestion, texts: Sequence[str]) -> Outcome:
        """What the generated answers to a question are worth, all of its samples together."""

    def headline(self, form: str) -> str:
        return "accuracy"


Task = LikelihoodTask | GenerationTask
