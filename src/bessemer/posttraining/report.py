"""Report of supervised fine-tuning: curves, diagnostics, figures, and answers to questions held in and held out."""

from __future__ import annotations

from pathlib import Path

from bessemer.core.json_lines import json_lines
from bessemer.core.report import Answer, Answers, Facts, Heading, Metrics, Part, Section, StageReport, Text
from bessemer.training.report import diagnostics, summary_line, task_accuracies, training_curves

__all__ = ["next_steps", "report", "summary_line"]

#: Answers shown of each kind, held in and held out.
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
