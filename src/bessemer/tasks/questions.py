"""Tasks: the questions for a model, the answers or scores that they need, and their judgement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from bessemer.core.hashing import hash_value

#: What comes before an answer: a text, or a conversation for the model's chat template, whose contents may be parts with
#: pictures, each a path, a `data:` URI or a `StoredPicture`.
Context = str | tuple[Mapping[str, Any], ...]


class ContinuationScore(Protocol):
    """The likelihood of a continuation: what a task needs of the engine's `Score`."""

    @property
    def token_ids(self) -> Sequence[int]:
        """The continuation's tokens."""

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
class ContinuationRequest:
    """A context and the continuations that are scored behind it."""

    context: Context
    continuations: tuple[str, ...]


@dataclass(frozen=True)
class LikelihoodQuestion:
    """An item whose continuations are scored by their likelihood.

    item: its number in the task. form: one of several ways to ask it. id: names the item in every evaluation, its number if
    empty. cluster: what the item shares with others, such as a passage.
    """

    item: int
    form: str
    parts: tuple[ContinuationRequest, ...]
    id: str = ""
    cluster: str | None = None


@dataclass(frozen=True)
class GenerationQuestion:
    """An item whose answer is generated; the fields are those of `LikelihoodQuestion`.

    level: the difficulty or length by which scores are also given; None where a task has none.
    """

    item: int
    context: Context
    form: str = "generate"
    id: str = ""
    cluster: str | None = None
    level: int | None = None


@dataclass(frozen=True)
class Outcome:
    """The judgement of an answer: scores from 0 to 1 by name. answer: its text. chosen, gold: plain values, for a reader.

    An item is left out of the mean of a score that it lacks. weights: for a score that is a share of several things (the
    instructions of a prompt), their number; the mean is then over these. counts: events that no mean shows (programs stopped,
    verdicts that could not be read), summed over items.
    """

    scores: Mapping[str, float]
    answer: str = ""
    chosen: Any = None
    gold: Any = None
    weights: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)


class ItemResult(NamedTuple):
    """An item answered by likelihood. score: of its headline, 0 to 1. loss: −log p of the right answer, in nats a token."""

    score: float
    loss: float


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are generated. samples: of each item. temperature 0 is greedy; seed: of the samples.

    thinking_budget: tokens after which thinking is closed; the text after it is judged. None: the whole answer is judged.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    samples: int = 1
    seed: int = 0
    thinking_budget: int | None = None


#: How many tokens a model reads of a context, its begin token and its chat template included.
CountTokens = Callable[[Context], int]


class _Task(ABC):
    """Attributes of both kinds of task.

    name: unique in an evaluation. settings: plain JSON values, of which a change makes another task. chance: the headline score
    of guessing. shots: examples before each question. begin_token: whether a text begins with the begin token even where the
    tokenizer writes none. group, baseline: of a task that counts in a mean of centred scores. level_name: what the levels of
    its questions are.
    """

    name: str = ""
    settings: Mapping[str, Any] = {}
    chance: float | None = None
    shots: int = 0
    begin_token: bool = False
    group: str | None = None
    baseline: float = 0.0
    level_name: str = ""

    def fit_to_model(self, count_tokens: CountTokens, context_length: int) -> Sequence[str]:
        """Choose the items that fit a model, for tasks whose items have a length in tokens. Called before `questions`.

        Returns what is left out, a sentence each. Raises ConfigError where nothing fits the context.
        """
        return ()

    def item_texts(self) -> Mapping[str, Sequence[str]]:
        """By item its own texts (question, passage, choices), to look for in a training corpus; empty for generated items."""
        return {}

    @abstractmethod
    def headline(self, form: str) -> str:
        """Which of the scores of a form is its accuracy."""


class LikelihoodTask(_Task):
    """A task that is answered by the likelihood of continuations."""

    @abstractmethod
    def questions(self) -> Sequence[LikelihoodQuestion]:
        """All questions, those of one form together."""

    @abstractmethod
    def judge(self, question: LikelihoodQuestion, scores: Sequence[Sequence[ContinuationScore]]) -> Outcome:
        """Judge an item by the scores of the continuations of each part."""


class GenerationTask(_Task):
    """A task whose answers are generated. at_once: most questions of one call of the engine, which reads their pictures
    together; None: as many as fill its steps."""

    at_once: int | None = None
    generation: GenerationSettings = GenerationSettings()

    @abstractmethod
    def questions(self) -> Sequence[GenerationQuestion]:
        """All questions."""

    def reference(self, question: GenerationQuestion) -> str | None:
        """A right answer to a question, to learn from; None where a task judges without one."""
        return None

    @abstractmethod
    def judge(self, question: GenerationQuestion, texts: Sequence[str]) -> Outcome:
        """Judge the generated answers to a question, all of its samples together."""

    def judge_all(self, answered: Sequence[tuple[GenerationQuestion, Sequence[str]]]) -> list[Outcome]:
        """Judge the answers to several questions; a task may do that faster than one after the other."""
        return [self.judge(question, texts) for question, texts in answered]

    def headline(self, form: str) -> str:
        return "accuracy"


Task = LikelihoodTask | GenerationTask
Question = LikelihoodQuestion | GenerationQuestion


def question_id(question: Question) -> str:
    """What names a question in every evaluation."""
    return question.id or str(question.item)


def task_identity(task: Task, questions: Sequence[Question]) -> dict[str, Any]:
    """What answers of a task depend on: its settings, and a hash of its questions."""
    hashed = [[question_id(question), question.cluster, question.form, _plain_question(question)] for question in questions]
    return {"settings": dict(task.settings), "questions": hash_value(hashed)}


def _plain_question(question: Question) -> Any:
    if isinstance(question, GenerationQuestion):
        return _plain(question.context)
    return [[_plain(part.context), part.continuations] for part in question.parts]


def _plain(context: Any) -> Any:
    return context if isinstance(context, str) else [dict(message) for message in context]
