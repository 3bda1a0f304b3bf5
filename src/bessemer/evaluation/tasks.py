"""Tasks on an engine: questions in calls of bounded size, answers judged, figures with their standard errors.

`evaluate_tasks` writes an evaluation's folder; `TaskScores` scores a model between two steps of its training; tasks that name a
judge of this machine get it from `connected_judges`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from bessemer.core.errors import BessemerError, ConfigError
from bessemer.core.progress import Progress
from bessemer.core.stage import ItemScore
from bessemer.evaluation.contamination import task_contamination
from bessemer.evaluation.evaluation_folder import Score, TaskFolder
from bessemer.evaluation.task_answerers import Line, PromptEncoder, answerer_of, batches
from bessemer.evaluation.task_results import task_results
from bessemer.inference.chat import EngineChat
from bessemer.inference.engine import Engine
from bessemer.tasks.config import TaskOptions
from bessemer.tasks.judge import Ask
from bessemer.tasks.judged import JudgedTask
from bessemer.tasks.questions import (
    Context,
    GenerationQuestion,
    ItemResult,
    LikelihoodQuestion,
    LikelihoodTask,
    Outcome,
    Question,
    Task,
    question_id,
    task_identity,
)
from bessemer.tasks.registry import CORE, core_score, find_tasks
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer

#: Format number of `results.json`.
RESULTS_FORMAT = 1


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
        names = _answer(engine, encoders[task.name], task, questions[task.name], folder, progress)
        lines = [folder.done[names[question.form], question_id(question)] for question in questions[task.name]]
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
    return {task.name: task_results(task, _answered(engine, task)) for task in tasks}


def score_items(engine: Engine, tasks: Sequence[Task]) -> dict[str, dict[str, ItemScore]]:
    """Scores of each item by task, of a model with its present weights; where a task has several forms, those of the better
    one. Writes nothing."""
    scores = {}
    for task in tasks:
        lines = _answered(engine, task)
        form = task_results(task, lines)["form"]
        scores[task.name] = {
            line["id"]: ItemScore(float(line["score"]), line["cluster"])
            for line in lines
            if line["form"] == form and line["score"] is not None
        }
    return scores


def _answered(engine: Engine, task: Task) -> list[Line]:
    """The lines of a task's questions."""
    questions: Sequence[Question] = list(task.questions())
    names = _names(task, questions)
    answerer = answerer_of(engine, task)
    return [
        _line(task, names, question, *answer)
        for batch in batches(questions, answerer.at_once)
        for question, answer in zip(batch, answerer.answer(batch), strict=True)
    ]


def _answer(
    engine: Engine,
    encoder: PromptEncoder,
    task: Task,
    questions: Sequence[Question],
    folder: TaskFolder,
    progress: Progress,
) -> dict[str, str]:
    """Answer the questions that have no line yet, in their order, so that the prefix cache holds what they share.

    Returns what the task is called in `items.jsonl` by form.
    """
    names = _names(task, questions)
    left = [question for question in questions if (names[question.form], question_id(question)) not in folder.done]
    done = len(questions) - len(left)
    answerer = answerer_of(engine, task, encoder)
    progress.say(f"  {task.name}: prompts begin with {answerer.beginning(questions[0])}")
    with progress.task(task.name, total=len(questions), unit="questions", completed=done) as bar:
        for batch in batches(left, answerer.at_once):
            folder.add(
                [_line(task, names, question, *answer) for question, answer in zip(batch, answerer.answer(batch), strict=True)]
            )
            bar.advance(len(batch))
    return names


def _names(task: Task, questions: Sequence[Question]) -> dict[str, str]:
    """What a task is called in `items.jsonl` by form: its name, with the form where there are several."""
    forms = dict.fromkeys(question.form for question in questions)
    return {form: task.name if len(forms) == 1 else f"{task.name} ({form})" for form in forms}


def _line(task: Task, names: Mapping[str, str], question: Question, outcome: Outcome, computed: Line) -> Line:
    """A question's line of `items.jsonl`."""
    return {
        "task": names[question.form],
        "id": question_id(question),
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
    """A question for a reader: the context; a conversation's messages; the contexts of a schema below each other."""
    if isinstance(question, GenerationQuestion):
        return _readable(question.context)
    first, *others = question.parts
    if len(first.continuations) > 1 or not others:
        return _readable(first.context)
    return "\n".join(_readable(part.context) + part.continuations[0] for part in question.parts)


def _readable(context: Context) -> str:
    return (
        context if isinstance(context, str) else "\n\n".join(f"{message['role']}: {message['content']}" for message in context)
    )


def _warn(task: Task, results: Mapping[str, Any], progress: Progress) -> None:
    """Report questions that were cut, empty answers, and what the task counts."""
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
    """Scores a model on tasks between two steps of its training. An engine and its KV cache are freed after each evaluation."""

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
        with _unchanged_random_state(model):
            results = score_tasks(Engine(model, self._load(tokenizer)), self._tasks)
        return {name: float(figures["accuracy"]) for name, figures in results.items()}

    def item_scores(self, model: Any, tokenizer: Path) -> dict[str, dict[str, ItemScore]]:
        """Score of each item by task of a decoder with its present weights."""
        with _unchanged_random_state(model):
            return score_items(Engine(model, self._load(tokenizer)), self._tasks)

    def _load(self, folder: Path) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(folder)
        return self._tokenizer


def _unchanged_random_state(model: Any) -> AbstractContextManager[None]:
    device = model.head_weight.device
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


class LikelihoodScores:
    """Scores an engine's model on tasks that are answered by likelihood, item by item, so that a model is compared with itself
    before a training (`posttraining.sft.forgetting.GeneralTasks`)."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        """Raises ConfigError for a task whose answers are generated, which take much longer and are not bounded by items."""
        for task in tasks:
            if not isinstance(task, LikelihoodTask):
                raise ConfigError(f"the task {task.name} generates answers; name tasks that are answered by likelihood")
        self._tasks = [task for task in tasks if isinstance(task, LikelihoodTask)]
        self._questions = {task.name: list(task.questions()) for task in self._tasks}

    @property
    def counts(self) -> dict[str, int]:
        """Questions by task."""
        return {name: len(questions) for name, questions in self._questions.items()}

    def results(self, engine: Engine, advance: Callable[[float], None]) -> dict[str, dict[str, ItemResult]]:
        """Each task's items by their ids, without those that the engine's context does not hold whole. advance: called with
        the number of questions after each call of the engine."""
        return {task.name: self._of_task(engine, task, advance) for task in self._tasks}

    def _of_task(self, engine: Engine, task: LikelihoodTask, advance: Callable[[float], None]) -> dict[str, ItemResult]:
        encoder = PromptEncoder(engine.tokenizer, engine.context_length, task.begin_token)
        answerer, questions = answerer_of(engine, task, encoder), self._questions[task.name]
        names = _names(task, questions)
        fitting = [question for question in questions if all(encoder.holds(part) for part in question.parts)]
        advance(len(questions) - len(fitting))
        items: dict[str, ItemResult] = {}
        for batch in batches(fitting, answerer.at_once):
            for question, (outcome, computed) in zip(batch, answerer.answer(batch), strict=True):
                key = question_id(question) if len(names) == 1 else f"{question_id(question)} ({question.form})"
                score = outcome.scores.get(task.headline(question.form), 0.0)
                items[key] = ItemResult(score, _loss_of_gold(outcome, computed))
            advance(len(batch))
        return items


def _loss_of_gold(outcome: Outcome, computed: Line) -> float:
    """−log p a token of the right answer: a continuation of the first part, or in a schema the right part's."""
    likelihoods, tokens = computed["log_likelihoods"], computed["tokens"]
    gold = outcome.gold if isinstance(outcome.gold, int) else 0
    part, place = (0, gold) if gold < len(likelihoods[0]) else (gold, 0)
    total, count = likelihoods[part][place], tokens[part][place]
    return float(-total / count)


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
    """A judge that an engine computes: each prompt is a user message, the answer is greedy.

    A prompt too long for the context gets an empty answer, from which no verdict can be read.
    """
    return EngineChat(engine, max_tokens=max_tokens).ask
