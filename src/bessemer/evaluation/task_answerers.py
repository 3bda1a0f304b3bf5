"""A model's answers to questions of a task, in calls of bounded size: by likelihood, by generation, and with thinking."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

from bessemer.core.hashing import derive_seed
from bessemer.evaluation.task_prompts import PromptEncoder
from bessemer.evaluation.thinking import answers_after_thinking
from bessemer.inference.engine import Engine
from bessemer.inference.sampling.params import SamplingParams
from bessemer.tasks.questions import GenerationQuestion, GenerationTask, LikelihoodQuestion, LikelihoodTask, Outcome, Task

#: Questions, and samples, of one call of the engine: enough to fill its steps, and what an interruption loses at most.
_QUESTIONS_AT_ONCE = 128

Question = LikelihoodQuestion | GenerationQuestion
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
        self.at_once = max(1, _QUESTIONS_AT_ONCE // how.samples)

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
        completions = self._engine.generate([prompt.context for prompt in prompts], params)
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
