"""Tasks on an engine: questions in calls of bounded size, answers judged, figures with their standard errors.

`evaluate_tasks` writes an evaluation's folder; `TaskScores` scores a model between two steps of its training; tasks that name a
judge of this machine get it from `connected_judges`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch

from bessemer.core.errors import BessemerError, ConfigError
from bessemer.core.hashing import derive_seed, hash_value
from bessemer.core.progress import Progress
from bessemer.evaluation.contamination import task_contamination
from bessemer.evaluation.evaluation_folder import Score, TaskFolder
from bessemer.evaluation.task_prompts import PromptEncoder
from bessemer.evaluation.task_results import task_results
from bessemer.evaluation.thinking import answers_after_thinking
from bessemer.inference.chat import EngineChat
from bessemer.inference.engine import Completion, Engine, SamplingParams
from bessemer.tasks.config import TaskOptions
from bessemer.tasks.judge import Ask
from bessemer.tasks.judged import JudgedTask
from bessemer.tasks.questions import (
    Context,
    GenerationQuestion,
    GenerationSettings,
    GenerationTask,
    LikelihoodQuestion,
    LikelihoodTask,
    Outcome,
    Task,
)
from bessemer.tasks.registry import CORE, core_score, find_tasks
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer

#: Format number of `results.json`.
RESULTS_FORMAT = 1

#: Questions, and samples, of one call of the engine: enough to fill its steps, and what an interruption loses at most.
_QUESTIONS_AT_ONCE = 128

Question = LikelihoodQuestion | GenerationQuestion
Line = dict[str, Any]


def evaluate_tasks(
    engine: Engine,
    tasks: Sequence[Task],
    out: Path,
    *,
    model: Mapping[str, Any],
    progress: Progress,
    corpus: Path | None = None,
) -> dict[str, Any]:
    """Evaluate a model on tasks and write `items.jsonl` and `results.json` below `out`; what is there already is kept.

    model: what identifies the model, as plain values. corpus: a folder of the documents that it was trained on. Returns what
    `results.json` holds: by task, accuracy and standard error (`task_results`) and what was left out for this model
    (`left_out`), CORE-n where its tasks are among them, and with a corpus how much of each task stands in it
    (`contamination`). Raises ConfigError where `out` holds an evaluation of another model or with other settings.
    """
    encoders = {task.name: PromptEncoder(engine.tokenizer, engine.context_length, task.begin_token) for task in tasks}
    left_out = {task.name: task.fit_to_model(encoders[task.name].count, engine.context_length) for task in tasks}
    for name, sentences in left_out.items():
        for sentence in sentences:
            progress.say(f"  {name}: {sentence}")
    questions: dict[str, Sequence[Question]] = {task.name: list(task.questions()) for task in tasks}
    identities = {task.name: task_identity(task, questions[task.name]) for task in tasks}
    folder = TaskFolder(out, model, identities)
    by_task: dict[str, Any] = {}
    for task in tasks:
        asked = questions[task.name]
        _answer(engine, encoders[task.name], task, asked, folder, progress)
        names = _names(task, asked)
        lines = [folder.done[names[question.form], _id(question)] for question in asked]
        by_task[task.name] = task_results(task, lines)
        if left_out[task.name]:
            by_task[task.name]["left_out"] = list(left_out[task.name])
        _warn(task, by_task[task.name], progress)
    results = {"format": RESULTS_FORMAT, "model": dict(model), "tasks": by_task}
    of_core = [(task, by_task[task.name]["accuracy"]) for task in tasks if task.group == CORE]
    if of_core:
        results["core"] = core_score(of_core)
    if corpus is not None:
        texts = {
            name: task.item_texts() for task in tasks for name in dict.fromkeys(_names(task, questions[task.name]).values())
        }
        scores: dict[str, dict[str, Score]] = {}
        for (name, id), line in folder.done.items():
            if line["score"] is not None:
                scores.setdefault(name, {})[id] = Score(line["score"], line["cluster"])
        results["contamination"] = task_contamination(texts, corpus, scores, progress)
    folder.write_results(results)
    return results


def score_tasks(engine: Engine, tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
    """`task_results` by task of a model as it is now; nothing is written."""
    results = {}
    for task in tasks:
        questions: Sequence[Question] = list(task.questions())
        names = _names(task, questions)
        asker = _asker(engine, PromptEncoder(engine.tokenizer, engine.context_length, task.begin_token), task)
        lines = [
            _line(task, names, question, *answer)
            for batch in _batches(questions, asker.at_once)
            for question, answer in zip(batch, asker.answer(batch), strict=True)
        ]
        results[task.name] = task_results(task, lines)
    return results


def task_identity(task: Task, questions: Sequence[Question]) -> dict[str, Any]:
    """What answers of a task depend on: its settings, and a hash of what it asks."""
    asked = [
        [
            _id(question),
            question.cluster,
            question.form,
            [[_plain(part.context), part.continuations] for part in question.parts],
        ]
        if isinstance(question, LikelihoodQuestion)
        else [_id(question), question.cluster, question.form, _plain(question.context)]
        for question in questions
    ]
    return {"settings": dict(task.settings), "questions": hash_value(asked)}


def _plain(context: Any) -> Any:
    return context if isinstance(context, str) else [dict(message) for message in context]


def _answer(
    engine: Engine,
    encoder: PromptEncoder,
    task: Task,
    questions: Sequence[Question],
    folder: TaskFolder,
    progress: Progress,
) -> None:
    """Answer the questions that have no line yet, in their order, so that what they share is in the prefix cache."""
    names = _names(task, questions)
    left = [question for question in questions if (names[question.form], _id(question)) not in folder.done]
    done = len(questions) - len(left)
    asker = _asker(engine, encoder, task)
    progress.say(f"  {task.name}: prompts begin with {asker.beginning(questions[0])}")
    with progress.task(task.name, total=len(questions), unit="questions", completed=done) as bar:
        for batch in _batches(left, asker.at_once):
            folder.add(
                [_line(task, names, question, *answer) for question, answer in zip(batch, asker.answer(batch), strict=True)]
            )
            bar.advance(len(batch))


def answers(engine: Engine, task: Task, questions: Sequence[Question]) -> Iterator[list[Outcome]]:
    """What a model's answers to questions of a task are worth, in their order, a call of the engine at a time."""
    asker = _asker(engine, PromptEncoder(engine.tokenizer, engine.context_length, task.begin_token), task)
    for batch in _batches(questions, asker.at_once):
        yield [outcome for outcome, _ in asker.answer(batch)]


def _names(task: Task, questions: Sequence[Question]) -> dict[str, str]:
    """What a task is called in `items.jsonl` by form: its name, with the form where there are several."""
    forms = dict.fromkeys(question.form for question in questions)
    return {form: task.name if len(forms) == 1 else f"{task.name} ({form})" for form in forms}


def _id(question: Question) -> str:
    return question.id or str(question.item)


def _line(task: Task, names: Mapping[str, str], question: Question, outcome: Outcome, computed: Line) -> Line:
    """A question's line of `items.jsonl`."""
    return {
        "task": names[question.form],
        "id": _id(question),
        "form": question.form,
        "cluster": question.cluster,
        "score": outcome.scores.get(task.headline(question.form)),
        "scores": dict(outcome.scores),
        **({"weights": dict(outcome.weights)} if outcome.weights else {}),
        **({"counts": dict(outcome.counts)} if outcome.counts else {}),
        **({"level": question.level} if isinstance(question, GenerationQuestion) and question.level is not None else {}),
        "prompt": _prompt(question),
        "answer": outcome.answer,
        "chosen": outcome.chosen,
        "gold": outcome.gold,
        **computed,
    }


def _prompt(question: Question) -> str:
    """What was asked, for a reader: the context; a conversation's messages; the contexts of a schema below each other."""
    if isinstance(question, GenerationQuestion):
        return _shown(question.context)
    first, *others = question.parts
    if len(first.continuations) > 1 or not others:
        return _shown(first.context)
    return "\n".join(_shown(part.context) + part.continuations[0] for part in question.parts)


def _shown(context: Context) -> str:
    return context if isinstance(context, str) else "\n\n".join(f"{one['role']}: {one['content']}" for one in context)


def _batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    each = iter(questions)
    while batch := list(islice(each, size)):
        yield batch


class _Asker(Protocol):
    """Answers the questions of a task. at_once: questions of one call of the engine."""

    at_once: int

    def beginning(self, question: Any) -> str:
        """The first tokens of a question, for a reader."""

    def answer(self, questions: Sequence[Any]) -> list[tuple[Outcome, Line]]:
        """What each question's answer is worth, and what was computed for it."""


def _asker(engine: Engine, encoder: PromptEncoder, task: Task) -> _Asker:
    if isinstance(task, LikelihoodTask):
        return _Scorer(engine, encoder, task)
    if task.generation.thinking_budget is not None:
        return _Thinker(engine, encoder, task, task.generation.thinking_budget)
    return _Generator(engine, encoder, task)


class _Scorer:
    """Answers questions by the likelihood of continuations."""

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
        answers = []
        for question, parts in zip(questions, encoded, strict=True):
            scores = list(islice(scored, len(parts)))
            computed = {
                "log_likelihoods": [[score.total for score in of_part] for of_part in scores],
                "tokens": [[len(score.token_ids) for score in of_part] for of_part in scores],
                "greedy": [[score.is_greedy for score in of_part] for of_part in scores],
                "cached_tokens": sum(of_part[0].cached_tokens for of_part in scores),
                "cut": sum(part.cut for part in parts),
            }
            answers.append((self._task.judge(question, scores), computed))
        return answers


class _Generator:
    """Answers questions by generation."""

    def __init__(self, engine: Engine, encoder: PromptEncoder, task: GenerationTask) -> None:
        self._engine = engine
        self._encoder = encoder
        self._task = task
        self.at_once = max(1, _QUESTIONS_AT_ONCE // task.generation.samples)

    def beginning(self, question: GenerationQuestion) -> str:
        return self._encoder.beginning(self._encoder.prompt(question.context, self._task.generation.max_tokens).context)

    def answer(self, questions: Sequence[GenerationQuestion]) -> list[tuple[Outcome, Line]]:
        how = self._task.generation
        prompts = [self._encoder.prompt(question.context, how.max_tokens) for question in questions]
        completions = self._engine.generate([prompt.context for prompt in prompts], [self._params(each) for each in questions])
        sampled: list[list[Completion]] = [[completion, *completion.others] for completion in completions]
        texts = [[sample.text for sample in samples] for samples in sampled]
        outcomes = self._task.judge_all(list(zip(questions, texts, strict=True)))
        computed: list[Line] = [
            {
                "texts": of_item,
                "finish_reasons": [sample.finish_reason for sample in samples],
                "cached_tokens": samples[0].cached_tokens,
                "cut": prompt.cut,
            }
            for of_item, samples, prompt in zip(texts, sampled, prompts, strict=True)
        ]
        return list(zip(outcomes, computed, strict=True))

    def _params(self, question: GenerationQuestion) -> SamplingParams:
        """Of an item's own random numbers, whatever is asked beside it."""
        how = self._task.generation
        seed = derive_seed(how.seed, self._task.name, question.item)
        return _sampling(how).with_changes(n=how.samples, seed=seed)


class _Thinker(_Generator):
    """Answers questions by generation, with thinking within a budget, which is not judged."""

    def __init__(self, engine: Engine, encoder: PromptEncoder, task: GenerationTask, budget: int) -> None:
        super().__init__(engine, encoder, task)
        self._budget = budget

    def answer(self, questions: Sequence[GenerationQuestion]) -> list[tuple[Outcome, Line]]:
        how = self._task.generation
        contexts = [question.context for question in questions for _ in range(how.samples)]
        seeds = [
            derive_seed(how.seed, self._task.name, question.item, sample)
            for question in questions
            for sample in range(how.samples)
        ]
        answered = iter(answers_after_thinking(self._engine, contexts, _sampling(how), self._budget, seeds))
        sampled = [list(islice(answered, how.samples)) for _ in questions]
        texts = [[sample.text for sample in samples] for samples in sampled]
        outcomes = self._task.judge_all(list(zip(questions, texts, strict=True)))
        computed: list[Line] = [
            {
                "texts": of_item,
                "thinking": [sample.thinking for sample in samples],
                "thinking_closed": [sample.is_closed for sample in samples],
                "completion_tokens": [sample.tokens for sample in samples],
                "finish_reasons": [sample.finish_reason for sample in samples],
                "cut": 0,  # a conversation that does not fit is refused
            }
            for of_item, samples in zip(texts, sampled, strict=True)
        ]
        return list(zip(outcomes, computed, strict=True))


def _sampling(how: GenerationSettings) -> SamplingParams:
    """How one answer is sampled, but for its seed."""
    return SamplingParams(max_tokens=how.max_tokens, temperature=how.temperature, top_p=how.top_p, stop=list(how.stop))


def _warn(task: Task, results: Mapping[str, Any], progress: Progress) -> None:
    """Say what a reader of the accuracy should know."""
    if results["cut"]:
        cut = f"{results['cut_tokens']:,} tokens cut from the left"
        progress.say(f"  {task.name}: the contexts of {results['cut']:,} questions were too long, {cut}")
    if results.get("empty"):
        total = results["n"] * results["samples"]
        progress.say(f"  {task.name}: {results['empty']:,} of {total:,} answers are empty, and count as wrong")
    for what, count in results.get("counts", {}).items():
        if count:
            progress.say(f"  {task.name}: {what}: {count:,}")


class TaskScores:
    """Some tasks with their data, for one model that changes. It keeps nothing of an evaluation: the engine with its KV cache
    lives as long as one does, and the memory is training's again."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks
        self._tokenizer: Tokenizer | None = None

    def check(self, tokenizer: Path, context_length: int) -> None:
        """Raise ConfigError when a task's prompts cannot be written with the tokenizer of a folder."""
        for task in self._tasks:
            encoder = PromptEncoder(self._load(tokenizer), context_length, task.begin_token)
            question = next(iter(task.questions()))
            try:
                if isinstance(question, GenerationQuestion):
                    encoder.prompt(question.context, 1)
                elif isinstance(question, LikelihoodQuestion):
                    encoder.part(question.parts[0])
            except BessemerError as error:
                raise ConfigError(f"tasks: {task.name}: {error}") from None

    def accuracies(self, model: Any, tokenizer: Path) -> dict[str, float]:
        """Accuracy by task of a decoder with its present weights, in evaluation mode."""
        device = model.head_weight.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            results = score_tasks(Engine(model, self._load(tokenizer)), self._tasks)
        return {name: float(figures["accuracy"]) for name, figures in results.items()}

    def _load(self, folder: Path) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(folder)
        return self._tokenizer


def open_tasks(names: Sequence[str], data: Path | None, limit: int) -> TaskScores:
    """Tasks by name or file, their first `limit` items. Raises as `find_tasks`."""
    return TaskScores(find_tasks(names, TaskOptions(data=data, limit=limit)))


@contextmanager
def connected_judges(tasks: Sequence[Task], device: str = "auto") -> Iterator[None]:
    """While entered, the tasks' judges that have no URL are open; a model that judges several tasks is opened once.

    Raises ArtefactError for a folder without a model.
    """
    with ExitStack() as stack:
        opened: dict[str, Engine] = {}
        for task in tasks:
            if isinstance(task, JudgedTask) and task.needs_judge:
                judge = task.judge_config
                if judge.model not in opened:
                    opened[judge.model] = stack.enter_context(Engine(Path(judge.model), device=device))
                task.connect(engine_judge(opened[judge.model], judge.max_tokens))
        yield


def engine_judge(engine: Engine, max_tokens: int = 512) -> Ask:
    """A judge of an engine: each prompt is what the user says, the answer is greedy.

    A prompt that the context does not hold is answered by nothing, from which no verdict can be read.
    """
    return EngineChat(engine, max_tokens=max_tokens).ask
