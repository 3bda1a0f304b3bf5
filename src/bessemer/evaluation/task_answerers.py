"""A model's answers to questions of a task: the questions as tokens; answers by likelihood, by generation, after thinking.

A question that the context does not hold is cut from the left. Calls of the engine are of bounded size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal, Protocol

from bessemer.assistant.assistant import Assistant, EngineModel
from bessemer.assistant.conversation import AssistantConfig, Conversation
from bessemer.assistant.episodes import Episode, StepResult, play
from bessemer.assistant.messages import EndReason, Message, as_messages
from bessemer.core.errors import RequestError
from bessemer.core.hashing import derive_seed
from bessemer.inference.engine import Engine
from bessemer.inference.images import PicturePrompt
from bessemer.inference.sampling.params import SamplingParams
from bessemer.model.vision.pictures import Picture
from bessemer.posttraining.data.picture_encoding import picture_of
from bessemer.posttraining.data.picture_rows import sources_in
from bessemer.tasks.questions import (
    Context,
    ContinuationRequest,
    GenerationQuestion,
    GenerationTask,
    LikelihoodQuestion,
    LikelihoodTask,
    Outcome,
    Question,
    Task,
)
from bessemer.tokenization.prompts import encode_continuations
from bessemer.tokenization.tokenizer import Tokenizer

#: Tokens that are shown of the beginning of a task's prompts.
_SHOWN = 5


@dataclass(frozen=True)
class EncodedPart:
    """Tokens of a context and of its continuations. cut: tokens of the context that were left out. pictures: of the context, in
    the order of their tokens."""

    context: list[int]
    continuations: list[list[int]]
    cut: int = 0
    pictures: Sequence[Picture] = ()

    @property
    def prompt(self) -> list[int] | PicturePrompt:
        """The context as the engine takes it."""
        return PicturePrompt(self.context, self.pictures) if self.pictures else self.context


class PromptEncoder:
    """Encodes for one model. context_length: the most tokens that it reads."""

    def __init__(self, tokenizer: Tokenizer, context_length: int, begin_token: bool = False) -> None:
        """begin_token: whether a text begins with the begin token even where the tokenizer writes none."""
        self._tokenizer = tokenizer
        self._context_length = context_length
        missing = [tokenizer.bos_id] if begin_token and not tokenizer.begin_ids else []
        self._begin = missing or list(tokenizer.begin_ids)
        self._missing = missing

    def part(self, part: ContinuationRequest) -> EncodedPart:
        """Encode a context and its continuations: a text as `encode_continuations` does, a conversation with the continuations
        alone. The last token of a continuation is not read and needs no place in the context."""
        if isinstance(part.context, str):
            context, continuations = encode_continuations(self._tokenizer, part.context, part.continuations)
            context = self._begun(context)
            space = part.context[len(part.context.rstrip()) :]
            continuations = [
                self._whole(space + text, ids) for text, ids in zip(part.continuations, continuations, strict=True)
            ]
        else:
            context = self._conversation(part.context)
            continuations = [self._tokenizer.encode(each, add_bos=False) for each in part.continuations]
        context, cut = self._cut(context, self._context_length + 1 - max(map(len, continuations)))
        return EncodedPart(context, continuations, cut)

    def holds(self, part: ContinuationRequest) -> bool:
        """Whether the context holds a part whole, so that nothing of it is cut."""
        encoded = self.part(part)
        longest = max(map(len, encoded.continuations))
        return not encoded.cut and len(encoded.context) + longest <= self._context_length + 1

    def count(self, context: Context) -> int:
        """How many tokens a context has, all of it."""
        return len(self._encoded(context))

    def prompt(self, context: Context, max_tokens: int) -> EncodedPart:
        """A context that leaves room for `max_tokens`, or for half of the model's context where that is less."""
        ids = self._encoded(context)
        kept, cut = self._cut(
            ids or [self._tokenizer.bos_id], self._context_length - min(max_tokens, self._context_length // 2)
        )
        return EncodedPart(kept, [], cut, pictures_in(context))

    def beginning(self, ids: Sequence[int]) -> str:
        """The first tokens of a prompt, for a reader, and whether a begin token is among them."""
        shown = " ".join(repr(self._tokenizer.decode([id], skip_special=False)) for id in ids[:_SHOWN])
        begins = bool(ids) and self._tokenizer.is_special(ids[0])
        doubled = len(ids) > 1 and ids[0] == ids[1] and begins
        return shown + (" (the begin token twice)" if doubled else "" if begins else " (no begin token)")

    def _encoded(self, context: Context) -> list[int]:
        return self._begun(self._tokenizer.encode(context)) if isinstance(context, str) else self._conversation(context)

    def _conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)

    def _whole(self, text: str, ids: list[int]) -> list[int]:
        """Tokens of a whole continuation. It is encoded alone where its beginning shares a token with the end of the context,
        as `-` does in `=-7`: there the convention leaves it out."""
        if not self._tokenizer.lossless or self._tokenizer.decode_bytes(ids, beginning=False) == text.encode():
            return ids
        return self._tokenizer.encode(text, add_bos=False)

    def _begun(self, ids: list[int]) -> list[int]:
        """A text's tokens with the begin token that `begin_token` adds; an empty text is that token already."""
        return ids if ids == self._missing else self._missing + ids

    def _cut(self, ids: list[int], most: int) -> tuple[list[int], int]:
        """The last `most` tokens behind the begin token, and how many were left out."""
        if len(ids) <= most:
            return ids, 0
        begin = self._begin
        if ids[: len(begin)] != begin or len(begin) >= most:
            begin = []
        kept = begin + ids[len(ids) - max(most - len(begin), 1) :]
        return kept, len(ids) - len(kept)


def pictures_in(context: Context) -> list[Picture]:
    """The pictures of a conversation, in their order. Raises RequestError for one that cannot be read."""
    return [] if isinstance(context, str) else [picture_of(source, None) for source in sources_in(context)]


@dataclass(frozen=True)
class ThoughtAnswer:
    """An answer and the thinking before it. tokens: all that were generated, with thinking and tags.

    is_closed: whether the budget closed the thinking.
    """

    text: str
    thinking: str
    tokens: int
    is_closed: bool
    finish_reason: Literal["stop", "length"]


def answers_after_thinking(
    engine: Engine, contexts: Sequence[Context], params: SamplingParams, budget: int, seeds: Sequence[int]
) -> list[ThoughtAnswer]:
    """An answer to each conversation, whose thinking is closed where it reaches `budget` tokens.

    params: `max_tokens` is of thinking and answer together. seeds: of each answer. Raises RequestError for a conversation that
    does not fit the model's context.
    """
    assistant = Assistant(EngineModel(engine), params, config=AssistantConfig(thinking_budget=budget))
    episodes = play(
        assistant, [_SingleQuestion() for _ in contexts], [{"context": each} for each in contexts], params, seeds=seeds
    )
    return [_answer(episode) for episode in episodes]


class _SingleQuestion:
    """An environment of one question, without rewards."""

    tools = ()

    def reset(self, task: Mapping[str, Any], seed: int) -> Sequence[Message]:
        return as_messages(task["context"])

    def step(self, conversation: Conversation, end: EndReason) -> StepResult:
        return StepResult(None)


def _answer(episode: Episode) -> ThoughtAnswer:
    if episode.failure:
        raise RequestError(episode.failure)
    said, transcript = episode.conversation.messages[-1], episode.transcript
    first = transcript.is_own.index(True)
    return ThoughtAnswer(
        said.text,
        said.thinking,
        transcript.own_tokens,
        not all(transcript.is_own[first:]),
        "length" if episode.end == "length" else "stop",
    )


#: Questions, and samples, of one call of the engine: enough to fill its steps, and what an interruption loses at most.
_QUESTIONS_AT_ONCE = 128

#: What was computed for a question, as its line of `items.jsonl` holds it.
Line = dict[str, Any]


class Answerer(Protocol):
    """Answers the questions of a task. at_once: questions of one call of the engine."""

    at_once: int

    def beginning(self, question: Any) -> str:
        """The first tokens of a question, for a reader."""

    def answer(self, questions: Sequence[Any]) -> list[tuple[Outcome, Line]]:
        """What each question's answer is worth, and what was computed for it."""


def answerer_of(engine: Engine, task: Task, encoder: PromptEncoder | None = None) -> Answerer:
    """What answers the questions of a task by a model. encoder: of the task's prompts; None: made here."""
    encoder = encoder or PromptEncoder(engine.tokenizer, engine.context_length, task.begin_token)
    if isinstance(task, LikelihoodTask):
        return _LikelihoodAnswerer(engine, encoder, task)
    return (_GenerationAnswerer if task.generation.thinking_budget is None else _ThinkingAnswerer)(engine, encoder, task)


def batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Questions in their order, `size` at a time."""
    remaining = iter(questions)
    while batch := list(islice(remaining, size)):
        yield batch


def answers(engine: Engine, task: Task, questions: Sequence[Question]) -> Iterator[list[Outcome]]:
    """What a model's answers to questions of a task are worth, in their order, a call of the engine at a time."""
    answerer = answerer_of(engine, task)
    for batch in batches(questions, answerer.at_once):
        yield [outcome for outcome, _ in answerer.answer(batch)]


class _LikelihoodAnswerer:
    """Scores the continuations of each question."""

    def __init__(self, engine: Engine, encoder: PromptEncoder, task: LikelihoodTask) -> None:
        self._engine = engine
        self._encoder = encoder
        self._task = task
        self.at_once = _QUESTIONS_AT_ONCE

    def beginning(self, question: LikelihoodQuestion) -> str:
        return self._encoder.beginning(self._encoder.part(question.parts[0]).context)

    def answer(self, questions: Sequence[LikelihoodQuestion]) -> list[tuple[Outcome, Line]]:
        encoded = [[self._encoder.part(part) for part in question.parts] for question in questions]
        scored = iter(self._engine.score_items([(part.context, part.continuations) for parts in encoded for part in parts]))
        answered = []
        for question, parts in zip(questions, encoded, strict=True):
            scores = list(islice(scored, len(parts)))
            computed = {
                "log_likelihoods": [[score.total for score in of_part] for of_part in scores],
                "tokens": [[len(score.token_ids) for score in of_part] for of_part in scores],
                "greedy": [[score.is_greedy for score in of_part] for of_part in scores],
                "cached_tokens": sum(of_part[0].cached_tokens for of_part in scores),
                "cut": sum(part.cut for part in parts),
            }
            answered.append((self._task.judge(question, scores), computed))
        return answered


class _GenerationAnswerer:
    """Generates the samples of each question and lets the task judge them."""

    def __init__(self, engine: Engine, encoder: PromptEncoder, task: GenerationTask) -> None:
        self._engine = engine
        self._encoder = encoder
        self._task = task
        how = task.generation
        #: How one answer is sampled, but for its seed.
        self._sampling = SamplingParams(
            max_tokens=how.max_tokens, temperature=how.temperature, top_p=how.top_p, stop=list(how.stop)
        )
        self.at_once = min(max(1, _QUESTIONS_AT_ONCE // how.samples), task.at_once or _QUESTIONS_AT_ONCE)

    def beginning(self, question: GenerationQuestion) -> str:
        return self._encoder.beginning(self._encoder.prompt(question.context, self._task.generation.max_tokens).context)

    def answer(self, questions: Sequence[GenerationQuestion]) -> list[tuple[Outcome, Line]]:
        computed = self._generate(questions)
        texts = [line["texts"] for line in computed]
        return list(zip(self._task.judge_all(list(zip(questions, texts, strict=True))), computed, strict=True))

    def _generate(self, questions: Sequence[GenerationQuestion]) -> list[Line]:
        how = self._task.generation
        prompts = [self._encoder.prompt(question.context, how.max_tokens) for question in questions]
        # random numbers of an item's own, whichever questions share its call
        params = [self._sampling.with_changes(n=how.samples, seed=self._seed(question)) for question in questions]
        completions = self._engine.generate([prompt.prompt for prompt in prompts], params)
        return [
            {
                "texts": [sample.text for sample in (completion, *completion.others)],
                "finish_reasons": [sample.finish_reason for sample in (completion, *completion.others)],
                "cached_tokens": completion.cached_tokens,
                "cut": prompt.cut,
            }
            for completion, prompt in zip(completions, prompts, strict=True)
        ]

    def _seed(self, question: GenerationQuestion, *sample: int) -> int:
        return derive_seed(self._task.generation.seed, self._task.name, question.item, *sample)


class _ThinkingAnswerer(_GenerationAnswerer):
    """Generates with thinking within the task's budget. The thinking is not judged."""

    def _generate(self, questions: Sequence[GenerationQuestion]) -> list[Line]:
        how = self._task.generation
        assert how.thinking_budget is not None
        contexts = [question.context for question in questions for _ in range(how.samples)]
        seeds = [self._seed(question, sample) for question in questions for sample in range(how.samples)]
        answered = iter(answers_after_thinking(self._engine, contexts, self._sampling, how.thinking_budget, seeds))
        by_question = [list(islice(answered, how.samples)) for _ in questions]
        return [
            {
                "texts": [sample.text for sample in samples],
                "thinking": [sample.thinking for sample in samples],
                "thinking_closed": [sample.is_closed for sample in samples],
                "completion_tokens": [sample.tokens for sample in samples],
                "finish_reasons": [sample.finish_reason for sample in samples],
                "cut": 0,  # a conversation that does not fit is refused
            }
            for samples in by_question
        ]


@dataclass(frozen=True)
class TaskForms:
    """A task by prompt form, as for a chat template and as plain text; the questions are the same and in one order."""

    tasks: Mapping[str, GenerationTask]

    @cached_property
    def questions(self) -> dict[str, Sequence[GenerationQuestion]]:
        """All questions by form."""
        return {form: task.questions() for form, task in self.tasks.items()}


def answers_in_better_form(
    engine: Engine, forms: TaskForms, trial: Sequence[int], advance: Callable[[float], None]
) -> tuple[str, list[Outcome]]:
    """The form in which a model answers the trial questions better, and its answers to all questions in that form.

    trial: the numbers of the questions that are answered in every form; of equally good forms the first is taken. advance:
    called with the number of answers after each call of the engine.
    """
    tasks, questions = forms.tasks, forms.questions

    def answered(form: str, numbers: Sequence[int]) -> dict[int, Outcome]:
        outcomes: list[Outcome] = []
        for batch in answers(engine, tasks[form], [questions[form][number] for number in numbers]):
            outcomes += batch
            advance(len(batch))
        return dict(zip(numbers, outcomes, strict=True))

    tried = {form: answered(form, trial) for form in tasks}
    total = {
        form: sum(outcome.scores.get(tasks[form].headline(form), 0.0) for outcome in outcomes.values())
        for form, outcomes in tried.items()
    }
    form = max(total, key=total.__getitem__)
    remaining = [number for number in range(len(questions[form])) if number not in tried[form]]
    by_number = tried[form] | answered(form, remaining)
    return form, [by_number[number] for number in range(len(by_number))]
