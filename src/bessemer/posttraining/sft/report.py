"""Results of supervised fine-tuning: the stage's section of the report, and the verdict of `bessemer finetune` in words.

The verdict says whether the model is better, by how much and how sure that is. `metric_curves` draws the logged figures of
every method of post-training. Imports no PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bessemer.core.errors import ArtefactError
from bessemer.core.metrics import size
from bessemer.core.records import json_lines
from bessemer.core.report import (
    Answer,
    Answers,
    Cell,
    Column,
    Curves,
    Facts,
    Heading,
    Metrics,
    Part,
    ReportData,
    Section,
    Series,
    StageReport,
    Table,
    Text,
)
from bessemer.core.statistics import Estimate, paired_difference
from bessemer.training.report import diagnostics, summary_line, task_accuracies, training_curves

__all__ = ["next_steps", "report", "summary_line"]


def metric_curves(records: Sequence[Metrics], charts: Mapping[str, tuple[Sequence[str], float]]) -> list[Curves]:
    """A chart for each title: its metrics, times a factor, in training and in validation (`validation_NAME`).

    records: the lines of a `metrics.jsonl`.
    """
    return [Curves(_series(records, keys, factor), title) for title, (keys, factor) in charts.items()]


def _series(records: Sequence[Metrics], keys: Sequence[str], factor: float) -> list[Series]:
    series = []
    for key in keys:
        for name, of in ((key, "training"), (f"validation_{key}", "held out")):
            points = [(record["step"], factor * record[name]) for record in records if name in record]
            if points:
                label = of if len(keys) == 1 else f"{key.rpartition('_')[2]}, {of}"
                series.append(Series(label, *zip(*points, strict=True)))
    return series


#: Answers shown of each kind: to questions of the training data, and to held-out ones.
_SHOWN_ANSWERS = 8


def report(stage: StageReport) -> Section:
    """Curves of a fine-tuning, and what its model answered in the run's evaluation."""
    parts: list[Part] = [
        Text(
            "The pretrained model learns to answer questions. Questions held in were part of this training: right answers to "
            "them are memorised and say nothing of what it knows. Questions held out were never shown.",
            lead=True,
        ),
        *training_curves(stage.records),
        *task_accuracies(stage.records),
        *diagnostics(stage.records),
        Facts(stage.metrics),
    ]
    answers = [
        answer
        for evaluation in stage.run.of_kind("evaluate")
        for answer in read_answers(evaluation.folder / "answers.jsonl")
        if answer.model == stage.name
    ]
    for held_in, title in ((False, "Held-out questions"), (True, "Held-in questions, memorised")):
        chosen = [answer for answer in answers if answer.held_in == held_in][:_SHOWN_ANSWERS]
        if chosen:
            parts += [Heading(title), Answers(chosen)]
    return Section(stage.titled("Fine-tuning"), parts)


def next_steps(stage: StageReport) -> list[str]:
    """A chat with the run's model, and serving it."""
    serve = [f"bessemer serve {stage.run.name}"] if (stage.run.folder / "model").exists() else []
    return [f"bessemer chat {stage.run.name}", *serve]


def read_answers(path: Path) -> list[Answer]:
    """The models' answers to the tasks' questions, from an evaluation's `answers.jsonl`; empty when there is no file."""
    if not path.exists():
        return []
    records: list[Metrics] = json_lines(path.read_text(encoding="utf-8"))
    return [
        Answer(
            question=record["messages"][-1]["content"],
            expected=record["reference"],
            answer=given["text"],
            correct=bool(given["exact_match"]),
            held_in=record["set"] == "held_in",
            model=model,
        )
        for record in records
        for model, given in record["answers"].items()
    ]


#: Words for the size of a difference, each up to a relative difference of the two perplexities.
SIZES = ((0.05, "a little"), (0.3, "clearly"), (1.0, "much"))
#: Characters of a question or an answer that are shown on one line.
_SHOWN = 160


def verdict(before_N: np.ndarray, after_N: np.ndarray) -> dict[str, Any]:
    """Figures and words on the losses of the same conversations before and after, in nats a token.

    `better` is true where the whole 95 % interval of the paired differences is above 0. `size` says by how much at least, by
    the interval's end that is nearer to 0; None where the interval contains 0.
    """
    estimate = paired_difference(before_N, after_N)
    low, high = estimate.interval()
    before, after = float(before_N.mean()), float(after_N.mean())
    size = size_word(estimate)
    if low > 0:
        answer = f"yes, {size} better"
    elif high < 0:
        answer = f"no, {size} worse"
    else:
        answer = "undecided"
    words = (
        f"better than before on what was held out: {answer}. Loss {before:.3f} → {after:.3f} nats a token, "
        f"{abs(estimate.mean):.3f} {'lower' if estimate.mean > 0 else 'higher'} (95 % interval of the fall: {low:.3f} to "
        f"{high:.3f}; {estimate.items:,} conversations)"
    )
    return {
        "verdict": words,
        "size": size,
        "loss_before": before,
        "loss_after": after,
        "difference": estimate.mean,
        "interval": [low, high],
        "conversations": estimate.items,
        "better": low > 0,
    }


def size_word(estimate: Estimate) -> str | None:
    """Words for the least size of a difference of losses; None where its interval contains 0."""
    low, high = estimate.interval()
    least = low if low > 0 else -high
    if least <= 0:
        return None
    share = 1 - math.exp(-least)
    return next(word for most, word in SIZES if share <= most)


def record_lines(result: Mapping[str, Any]) -> list[str]:
    """Lines on a fine-tuning from its record: answers before and after, what was learnt and forgotten, and the verdict."""
    forgotten = result.get("forgetting")
    return [
        *answer_lines(result.get("answers", ())),
        result["data"],
        *([] if forgotten is None else forgetting_lines(forgotten)),
        *memory_lines(result.get("memory")),
        result["verdict"],
    ]


def memory_lines(memory: Mapping[str, float] | None) -> list[str]:
    """The memory that was announced and that the process took, in a line; none where it was not measured."""
    return [] if memory is None else [f"memory: {size(memory['taken'])} at most; announced: {size(memory['announced'])}"]


def _range(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.3f} to {interval[1]:.3f})"


def forgetting_table(figures: Mapping[str, Any]) -> Table:
    """The figures of `forgetting` by task, for a page or a terminal."""
    rows = [
        (
            Cell(f"{name} ({task['items']:,})"),
            _accuracies(task).removeprefix("accuracy ").removesuffix(", ") or "–",
            f"{task['loss_before']:.3f} → {task['loss_after']:.3f}",
            Cell(f"{task['rise']:+.3f}", remark=_range(task["interval"])),
        )
        for name, task in figures["tasks"].items()
    ]
    columns = [Column("General task"), Column("Accuracy", True), Column("Loss, nats a token", True), Column("Rise", True)]
    return Table(columns, rows)


def _accuracies(task: Mapping[str, Any]) -> str:
    """Accuracies for a line; empty where both are 0, as for tasks with long texts as answers."""
    before, after = task["accuracy_before"], task["accuracy_after"]
    return f"accuracy {before:.3f} → {after:.3f}, " if before or after else ""


def forgetting_lines(figures: Mapping[str, Any]) -> list[str]:
    """The figures of `forgetting` for a terminal: a line a task, and the verdict."""
    names = {name: f"{name} ({task['items']:,})" for name, task in figures["tasks"].items()}
    width = max(map(len, names.values()))
    lines = [
        f"  {names[name]:<{width}}  {_accuracies(task)}loss {task['loss_before']:.3f} → {task['loss_after']:.3f}, "
        f"{task['rise']:+.3f}{_range(task['interval'])}"
        for name, task in figures["tasks"].items()
    ]
    return [*lines, figures["verdict"]]


def compared_lines(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Compare two fine-tunings on the conversations that both held out: the differences of the second's losses from the
    first's. Raises ArtefactError where too few are shared, or the tokenizers differ, so that losses per token have different
    units.
    """
    first, second = (result.get("losses", {}) for result in results)
    shared = [id for id in first if id in second]
    if len(shared) < 2:
        raise ArtefactError(
            f"{' and '.join(names)} held out {len(shared)} conversations alike, too few to compare them on; tune both on the "
            "same data with the same seed, or evaluate both on a task: bessemer evaluate"
        )
    if results[0]["tokenizer"] != results[1]["tokenizer"]:
        raise ArtefactError(
            f"{' and '.join(names)} have different tokenizers, so that losses per token cannot be compared; evaluate both on a "
            "task: bessemer evaluate"
        )
    after = [np.array([losses[id][1] for id in shared]) for losses in (first, second)]
    comparison = verdict(after[0], after[1])
    tables = (
        f"{name}: {result['method']}, loss {result['loss_before']:.3f} → {result['loss_after']:.3f} nats a token"
        for name, result in zip(names, results, strict=True)
    )
    return [*tables, comparison["verdict"].replace("better than before", f"{names[1]} better than {names[0]}", 1)]


def answer_lines(answers: Sequence[Mapping[str, str]]) -> list[str]:
    """Questions with the answer of the data and those before and after, below each other, for a terminal."""
    lines = []
    for one in answers:
        lines.append(f"  {one_line(one['prompt'], _SHOWN)}")
        sides = (("data", "reference"), ("before", "before"), ("after", "after"))
        lines += [f"    {name}: {one_line(one[key], _SHOWN) or '(nothing)'}" for name, key in sides if key in one]
    return lines


def tuning_report(name: str, record: Mapping[str, Any], records: Sequence[Metrics]) -> ReportData:
    """The page of a finished fine-tuning: the verdict, what was forgotten, samples side by side, and the curves.

    record: of `finetune.json`. records: the lines of `metrics.jsonl`.
    """
    result = record["result"]
    held_out: list[Part] = [Text(result["verdict"], lead=True), Text(result["data"])]
    sections = [Section("Better or not", held_out, headline=True)]
    if (forgotten := result.get("forgetting")) is not None:
        sections.append(Section("Forgotten", [Text(forgotten["verdict"], lead=True), forgetting_table(forgotten)]))
    if result.get("answers"):
        columns = [Column(heading) for heading in ("Held-out question", "The data", "Before", "After")]
        sides = ("prompt", "reference", "before", "after")
        rows = [tuple(one.get(side) or "(nothing)" for side in sides) for one in result["answers"]]
        sections.append(Section("Answers side by side", [Table(columns, rows)]))
    sections.append(Section("Training", [*training_curves(records), Facts(result.get("metrics", {}))]))
    description = f"{result['method']}: {record.get('reason', '')}"
    return ReportData(name=name, description=description, sections=sections)


def one_line(text: str, most: int) -> str:
    """The beginning of a text, on one line."""
    words = " ".join(text.split())
    return words if len(words) <= most else f"{words[: most - 1]}…"
