"""Figures of a task from the lines of its questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from statistics import fmean
from typing import Any

from bessemer.tasks.questions import Task


def standard_error(scores: Sequence[float]) -> float | None:
    """Standard error of the mean of independent items: √(Σ(s − s̄)² / (n(n − 1))); None for one item."""
    count = len(scores)
    if count < 2:
        return None
    mean = fmean(scores)
    return sqrt(sum((score - mean) ** 2 for score in scores) / (count * (count - 1)))


def task_results(task: Task, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy of a task with its standard error; of several forms, that of the better one (`form`), and the scores of each.

    lines: of `items.jsonl`, at least one. cut: questions whose context did not fit; cut_tokens: what was left out of them.
    empty: generated answers without text.
    """
    forms = {form: _form_results(task, form, lines) for form in dict.fromkeys(line["form"] for line in lines)}
    best = max(forms, key=lambda form: forms[form]["accuracy"])
    results = {
        "form": best,
        **forms[best],
        "chance": task.chance,
        "shots": task.shots,
        "cut": sum(line["cut"] > 0 for line in lines),
        "cut_tokens": sum(line["cut"] for line in lines),
        "cached_tokens": sum(line["cached_tokens"] for line in lines),
    }
    if "texts" in lines[0]:
        results["empty"] = sum(not text.strip() for line in lines for text in line["texts"])
        results["samples"] = len(lines[0]["texts"])
    if len(forms) > 1:
        results["forms"] = forms
    return results


def _form_results(task: Task, form: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    of_form = [line["scores"] for line in lines if line["form"] == form]
    by_score = {name: [scores[name] for scores in of_form] for name in of_form[0]}
    headline = task.headline(form)
    return {
        "n": len(of_form),
        "score": headline,
        "accuracy": fmean(by_score[headline]),
        "standard_error": standard_error(by_score[headline]),
        "scores": {
            name: {"mean": fmean(values), "standard_error": standard_error(values)} for name, values in by_score.items()
        },
    }
