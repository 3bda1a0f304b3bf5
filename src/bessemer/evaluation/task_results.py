"""Figures of a task from the lines of its questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bessemer.evaluation.statistics import mean_estimate
from bessemer.tasks.questions import Task


def task_results(task: Task, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy of a task with its standard error and 95 % interval, clustered where items are; of several forms, that of the
    better one (`form`), and the scores of each.

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
    of_form = [line for line in lines if line["form"] == form]
    # an item without a cluster is one of its own; a tuple, so that no name of a cluster is an item's
    clusters = [(line["id"],) if line["cluster"] is None else line["cluster"] for line in of_form]
    scores = {name: _mean([line["scores"][name] for line in of_form], clusters) for name in of_form[0]["scores"]}
    headline = task.headline(form)
    return {
        "n": len(of_form),
        "score": headline,
        "accuracy": scores[headline]["mean"],
        "standard_error": scores[headline]["standard_error"],
        "interval": scores[headline]["interval"],
        "scores": scores,
    }


def _mean(scores: Sequence[float], clusters: Sequence[Any]) -> dict[str, Any]:
    """The mean with its standard error, None for one item or cluster, and its 95 % interval."""
    estimate = mean_estimate(scores, clusters)
    error = estimate.standard_error
    return {
        "mean": estimate.mean,
        "standard_error": None if math.isinf(error) else error,
        "interval": list(estimate.interval(bounds=(0, 1))),
    }
