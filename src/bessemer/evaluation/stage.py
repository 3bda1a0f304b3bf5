"""The stage `evaluate`: bits per byte of models and baselines, the models' answers to the tasks' questions, and the share of
both that fits a time limit."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bessemer.core.environment import usable_cores
from bessemer.core.errors import ConfigError
from bessemer.core.hashing import derive_seed
from bessemer.core.metrics import duration
from bessemer.core.progress import Progress
from bessemer.core.stage import StageContext
from bessemer.core.statistics import paired_bootstrap
from bessemer.core.store import write_json
from bessemer.data.corpus.reader import iterate_documents
from bessemer.data.corpus.remote import documents_of
from bessemer.evaluation.baselines import witten_bell_bits_per_byte, xz_bits_per_byte
from bessemer.evaluation.bits_per_byte import ScoredDocuments, breakdown, scored_documents, token_nats
from bessemer.evaluation.config import DOCS_QUESTIONS, EvaluateConfig
from bessemer.evaluation.docs_questions import (
    CHAT,
    HELD_IN,
    HELD_OUT,
    PLAIN,
    TRIAL_QUESTIONS,
    DocsQuestion,
    ScoredAnswer,
    answer_questions,
    read_questions,
)
from bessemer.evaluation.task_answerers import TaskForms, answers_in_better_form
from bessemer.inference.engine import Engine
from bessemer.model.device import check_dtype, is_fast, with_threads
from bessemer.tasks.config import TaskOptions
from bessemer.tasks.questions import GenerationTask, Outcome
from bessemer.tasks.registry import find_tasks, placed_task
from bessemer.tokenization.shards import TokenShards
from bessemer.tokenization.trained_template import extended_tokenizers
from bessemer.training.runtime import faster_threads, keep_freed_memory, thread_candidates
from bessemer.training.validation import whole_documents

#: Shares of the tokens and questions that one model is timed with; the time of the whole is extrapolated linearly.
_TRIALS = (1 / 16, 1 / 8)
#: Smallest share that is evaluated, whatever the time.
_SMALLEST_SHARE = 1 / 16
#: Seconds below which an evaluation is short; then these are its shares to time, and the smallest share.
_SHORT, _SHORT_TRIALS, _SMALLEST_OF_SHORT = 30.0, (1 / 64, 1 / 32), 1 / 64
#: Most time as a share of the models' training time, and the seconds that are always allowed.
_OF_TRAINING, _LEAST_SECONDS = 0.5, 10.0

#: Evaluates models with settings into a folder.
Evaluate = Callable[[EvaluateConfig, Mapping[str, Path], Path], object]


def within_minutes(
    config: EvaluateConfig,
    models: Mapping[str, Path],
    evaluate: Evaluate,
    progress: Progress,
    *,
    held_out_tokens: int | None = None,
    training_seconds: float | None = None,
) -> tuple[EvaluateConfig, dict[str, Any]]:
    """The settings with as many tokens and questions as fit `minutes`, and the measurement behind them.

    The last model is timed with two small shares: a model costs a + b × share seconds, and the baselines at most as much as a
    model. held_out_tokens: all that could be scored. training_seconds: of the models; evaluation takes half of that at most, so
    that a run of a few steps is not evaluated for minutes.
    """
    minutes, started = config.minutes, time.perf_counter()
    assert minutes is not None
    allowed = math.inf if training_seconds is None else max(_LEAST_SECONDS, _OF_TRAINING * training_seconds)
    is_trial, seconds_left = allowed < 60 * minutes, min(60 * minutes, allowed)
    whole = config
    if held_out_tokens is not None:
        config = config.with_changes(max_tokens=min(held_out_tokens, config.max_tokens or held_out_tokens))
    trials, smallest = (_TRIALS, _SMALLEST_SHARE) if seconds_left >= _SHORT else (_SHORT_TRIALS, _SMALLEST_OF_SHORT)
    name = list(models)[-1]
    if config.threads is None:
        cores = usable_cores()
        threads = faster_threads(cores, thread_candidates(cores))
        config, whole = config.with_changes(threads=threads), whole.with_changes(threads=threads)
    seconds = []
    with progress.task("measure this machine"):
        for share in trials:
            trial = with_share(config, share).with_changes(baselines=[])
            with TemporaryDirectory() as folder:
                begin = time.perf_counter()
                evaluate(trial, {name: models[name]}, Path(folder))
                seconds.append(time.perf_counter() - begin)
    slope = max(0.0, (seconds[1] - seconds[0]) / (trials[1] - trials[0]))
    fixed = max(0.0, seconds[0] - slope * trials[0])
    count = len(models) + bool(config.baselines)
    left = seconds_left - (time.perf_counter() - started)
    share = min(1.0, max(smallest, (left / count - fixed) / slope if slope else 1.0))
    measured = {
        "minutes": seconds_left / 60,
        **({"training_seconds": round(training_seconds or 0.0, 1)} if is_trial else {}),
        "share": round(share, 3),
        "seconds": round(time.perf_counter() - started, 1),
        "trials": seconds,
    }
    if share == 1.0:
        return whole.with_changes(minutes=None), measured
    why = (
        f"in proportion to {duration(training_seconds or 0.0)} of training"
        if is_trial
        else f"which is what {minutes:g} minutes hold here"
    )
    progress.say(f"  {share:.0%} of the tokens and questions, {why}")
    return with_share(config, share), measured


def with_share(config: EvaluateConfig, share: float) -> EvaluateConfig:
    """The settings with a share of the tokens and questions."""
    return config.with_changes(
        minutes=None,
        max_tokens=None if config.max_tokens is None else max(1, round(share * config.max_tokens)),
        questions=max(1, round(share * config.questions)),
    )


@dataclass(frozen=True)
class TaskAnswers:
    """A model's answers to the questions of a task, in their order, and the prompt form that they were given in."""

    form: str
    outcomes: Sequence[Outcome]
    headline: str

    @property
    def scores(self) -> list[float]:
        """The headline score of each."""
        return [outcome.scores.get(self.headline, 0.0) for outcome in self.outcomes]

    @property
    def summary(self) -> dict[str, Any]:
        """For `results.json`."""
        return {"asked_as": self.form, "n": len(self.outcomes), self.headline: fmean(self.scores)}


def task_forms(name: str, limit: int, config: EvaluateConfig, folder: Path) -> TaskForms:
    """The first `limit` questions of a task: as messages for the chat template, and as text. folder: where the paths of task
    files and of their data begin.

    Raises ConfigError for a task of likelihood, and as `find_tasks`.
    """
    tasks: dict[str, GenerationTask] = {}
    data = None if config.tasks_folder is None else folder / config.tasks_folder
    for form in (CHAT, PLAIN):
        (task,) = find_tasks([placed_task(name, folder)], TaskOptions(chat=form == CHAT, limit=limit, data=data))
        if not isinstance(task, GenerationTask):
            raise ConfigError(f"tasks: {name} is asked by likelihood; ask it with `bessemer evaluate MODEL --tasks {name}`")
        tasks[form] = task
    return TaskForms(tasks)


def task_answers(engine: Engine, name: str, forms: TaskForms, progress: Progress, model: str) -> TaskAnswers:
    """A model's answers in the prompt form in which it answers the first questions better."""
    count = len(forms.questions[CHAT])
    trial = range(min(TRIAL_QUESTIONS, count))
    with progress.task(f"{name}: {model}", total=len(trial) + count, unit="answers") as bar:
        form, outcomes = answers_in_better_form(engine, forms, trial, bar.advance)
    return TaskAnswers(form, outcomes, forms.tasks[form].headline(form))


#: Format number of `results.json`.
RESULTS_FORMAT = 1

_NGRAM_ORDERS = {"witten_bell_5gram": 5, "witten_bell_6gram": 6}


def models_of(context: StageContext) -> dict[str, Path]:
    """The models to evaluate by stage, in the order in which they were trained."""
    return {role.removeprefix("model:"): path for role, path in context.inputs.items() if role.startswith("model:")}


def evaluate(context: StageContext) -> dict[str, Any]:
    """Evaluate the models and write `results.json` and `answers.jsonl`; returns the content of the former.

    Inputs: `model:STAGE`, `tokens` with the split `validation`, their `documents`, and perhaps `conversations`, whose questions
    the task `docs_questions` asks. Raises ArtefactError when tokens and a model have different tokenizers, or no text is held
    out.
    """
    config: EvaluateConfig = context.config
    seed, progress = context.seed, context.progress
    documents, conversations = documents_of(context), context.inputs.get("conversations")
    assert documents is not None
    keep_freed_memory()  # batches allocate the same sizes again and again
    shards = TokenShards(context.inputs["tokens"] / "validation")
    scored = whole_documents(shards, config.max_tokens)
    questions: list[DocsQuestion] = []
    if conversations is not None and DOCS_QUESTIONS in config.tasks:
        questions = read_questions(conversations, config.questions, seed)
    generated = {
        name: task_forms(name, config.questions, config, context.folder) for name in config.tasks if name != DOCS_QUESTIONS
    }
    of_tasks: dict[str, dict[str, TaskAnswers]] = {name: {} for name in generated}
    answers, forms, dtypes = {}, {}, {}
    nats: dict[str, np.ndarray] = {}
    parts: ScoredDocuments | None = None
    for name, folder in models_of(context).items():
        engine = Engine(folder, device=context.device)
        shards.check_tokenizer(engine.tokenizer.hash, name, extended_tokenizers(engine.tokenizer.folder))
        progress.say(f"  measuring {name}")
        model_device = engine.model.head_weight.device
        dtypes[name] = _matmul_dtype(config, model_device)
        autocast = torch.autocast(model_device.type, torch.bfloat16, enabled=dtypes[name] == "bfloat16")
        with with_threads(config.threads), autocast:
            nats[name] = token_nats(
                engine.model,
                shards,
                scored,
                context_length=min(config.context_length, engine.context_length),
                batch_size=config.batch_size or (8 if model_device.type == "cpu" else 64),
                stride=config.stride,
                device=model_device,
                progress=progress,
            )
        if parts is None:
            parts = scored_documents(shards, documents, scored.documents, engine.tokenizer)
        if questions:
            forms[name], answers[name] = answer_questions(
                engine, questions, max_new_tokens=config.max_new_tokens, progress=progress, name=name
            )
        for task_name, forms_of_task in generated.items():
            of_tasks[task_name][name] = task_answers(engine, task_name, forms_of_task, progress, name)
    tasks = {DOCS_QUESTIONS: {name: _summary(answers[name], forms[name]) for name in answers}} if answers else {}
    for task_name, by_model in of_tasks.items():
        tasks[task_name] = {name: of_model.summary for name, of_model in by_model.items()}
    results = {
        "format": RESULTS_FORMAT,
        "bits_per_byte": {name: float(of.sum(dtype=np.float64)) / math.log(2) / scored.bytes for name, of in nats.items()},
        "bits_per_byte_by": {} if parts is None else breakdown(parts, nats),
        "scored": {"documents": scored.documents, "bytes": scored.bytes},
        "dtypes": dtypes,
        "baselines": _baselines(config, documents, scored.documents, progress),
        "tasks": tasks,
        "comparisons": _comparisons(answers, of_tasks, seed),
    }
    write_json(context.out / "results.json", results)
    _write_answers(context.out / "answers.jsonl", questions, answers, generated, of_tasks)
    return results


def _matmul_dtype(config: EvaluateConfig, device: torch.device) -> str:
    check_dtype(config.dtype, device)
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if is_fast(torch.bfloat16, device) else "float32"


def _baselines(config: EvaluateConfig, documents: Path, scored: int, progress: Progress) -> dict[str, float]:
    if not config.baselines:
        return {}
    validation = list(islice(_texts(documents, "validation"), scored))
    orders = {name: _NGRAM_ORDERS[name] for name in config.baselines if name in _NGRAM_ORDERS}
    scores: dict[str, float] = {}
    with progress.task("baselines", total=len(config.baselines)) as task:
        if orders:
            by_order = witten_bell_bits_per_byte(
                _up_to(_texts(documents, "train"), config.baseline_bytes), validation, orders.values()
            )
            scores.update({name: by_order[order] for name, order in orders.items()})
            task.advance(len(orders))
        if "xz" in config.baselines:
            scores["xz"] = xz_bits_per_byte(validation)
            task.advance()
    return scores


def _texts(documents: Path, split: str) -> Iterator[bytes]:
    """The documents of a split as UTF-8, in the order of the token shards."""
    for batch in iterate_documents(documents, ["text"], split=split):
        for text in batch.column("text").to_pylist():
            yield text.encode()


def _up_to(texts: Iterable[bytes], limit: int) -> list[bytes]:
    """The first texts, up to the one that reaches `limit` bytes."""
    kept, size = [], 0
    for text in texts:
        kept.append(text)
        size += len(text)
        if size >= limit:
            break
    return kept


def _summary(answers: list[ScoredAnswer], form: str) -> dict[str, Any]:
    """A model's mean scores of held-in and held-out questions; a set without questions has none."""
    summary: dict[str, Any] = {"asked_as": form}
    for held in (HELD_IN, HELD_OUT):
        of_set = [answer for answer in answers if answer.question.held == held]
        summary[f"n_{held}"] = len(of_set)
        if of_set:
            summary[f"exact_match_{held}"] = fmean(answer.exact_match for answer in of_set)
            summary[f"rouge_l_{held}"] = fmean(answer.rouge_l for answer in of_set)
    return summary


def _comparisons(
    answers: Mapping[str, list[ScoredAnswer]], of_tasks: Mapping[str, Mapping[str, TaskAnswers]], seed: int
) -> list[dict[str, Any]]:
    """Each model against the one trained before it: held-out ROUGE-L, and the score of each task."""
    by_metric = {
        "rouge_l_held_out": {
            name: [answer.rouge_l for answer in given if answer.question.held == HELD_OUT] for name, given in answers.items()
        }
    }
    by_metric |= {task: {name: of.scores for name, of in by_model.items()} for task, by_model in of_tasks.items()}
    comparisons = []
    for metric, scores in by_metric.items():
        for earlier, later in pairwise(scores):
            if scores[later]:
                difference = paired_bootstrap(
                    scores[later], scores[earlier], seed=derive_seed(seed, "bootstrap", later, earlier)
                )
                comparisons.append(
                    {
                        "metric": metric,
                        "a": later,
                        "b": earlier,
                        "difference": difference.mean,
                        "interval": [difference.low, difference.high],
                        "confidence": 0.95,
                        "n": len(scores[later]),
                    }
                )
    return comparisons


def _write_answers(
    path: Path,
    questions: list[DocsQuestion],
    answers: Mapping[str, list[ScoredAnswer]],
    tasks: Mapping[str, TaskForms],
    of_tasks: Mapping[str, Mapping[str, TaskAnswers]],
) -> None:
    """Write one line per question: its messages, the reference, and each model's answer with its scores."""
    with path.open("w", encoding="utf-8") as stream:
        for index, question in enumerate(questions):
            given = {name: of_model[index] for name, of_model in answers.items()}
            record = {
                "task": DOCS_QUESTIONS,
                "set": question.held,
                "messages": question.messages,
                "reference": question.reference,
                "answers": {
                    name: {"text": answer.text, "exact_match": answer.exact_match, "rouge_l": round(answer.rouge_l, 4)}
                    for name, answer in given.items()
                },
            }
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        for task_name, forms in tasks.items():
            for index, chat_question in enumerate(forms.questions[CHAT]):
                record = {
                    "task": task_name,
                    "set": HELD_OUT,
                    "messages": chat_question.context,
                    "reference": forms.tasks[CHAT].reference(chat_question) or "",
                    "answers": {
                        name: {"text": of.outcomes[index].answer, "exact_match": bool(of.scores[index])}
                        for name, of in of_tasks[task_name].items()
                    },
                }
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
