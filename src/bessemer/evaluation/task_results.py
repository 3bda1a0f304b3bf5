"""Figures of a task from the lines of its questions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bessemer.core.statistics import choice_probability, mean_estimate, reliability
from bessemer.tasks.questions import Task


def task_results(task: Task, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy of a task with its standard error and 95 % interval, clustered where items are; of several forms, that of the
    better one (`form`), and the scores of each.

    lines: of `items.jsonl`, at least one. accuracy: None where no item has a score. cut: questions whose context did not fit;
    cut_tokens: what was left out of them. empty: generated answers without text. counts: of what a task counts besides.
    """
    forms = {form: _form_results(task, form, lines) for form in dict.fromkeys(line["form"] for line in lines)}
    best = max(forms, key=lambda form: -1 if forms[form]["accuracy"] is None else forms[form]["accuracy"])
    results = {
        "form": best,
        **forms[best],
        "chance": task.chance,
        "shots": task.shots,
        "cut": sum(line["cut"] > 0 for line in lines),
        "cut_tokens": sum(line["cut"] for line in lines),
        "cached_tokens": sum(line.get("cached_tokens", 0) for line in lines),
    }
    if "texts" in lines[0]:
        results["empty"] = sum(not text.strip() for line in lines for text in line["texts"])
        results["samples"] = len(lines[0]["texts"])
    if "counts" in lines[0]:
        results["counts"] = {name: sum(line["counts"][name] for line in lines) for name in lines[0]["counts"]}
    if len(forms) > 1:
        results["forms"] = forms
    return results


def _form_results(task: Task, form: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    of_form = [line for line in lines if line["form"] == form]
    headline = task.headline(form)
    scores = {name: _score(of_form, name) for name in dict.fromkeys([headline, *_names(of_form)])}
    results = {
        "n": len(of_form),
        "score": headline,
        "accuracy": scores[headline]["mean"],
        "standard_error": scores[headline]["standard_error"],
        "interval": scores[headline]["interval"],
        "scores": scores,
    }
    levels = sorted({line["level"] for line in of_form if line.get("level") is not None})
    if levels:
        by_level = {level: [line for line in of_form if line.get("level") == level] for level in levels}
        results["by_level"] = {
            "level": task.level_name,
            "levels": [{"level": level, "n": len(of), **_score(of, headline)} for level, of in by_level.items()],
        }
    calibration = _calibration(of_form)
    if calibration is not None:
        results["calibration"] = calibration
    return results


def _names(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line["scores"]))


def _score(lines: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """The mean of a score over the items that have it, or over the things that it is a share of (`weights`).

    With its standard error, None for one item or cluster, and its 95 % interval. An item without the score is left out, and
    where none has it, everything is None.
    """
    scores: list[float] = []
    clusters: list[Any] = []
    for line in lines:
        if name in line["scores"]:
            # things of one item are not independent; an item without a cluster is its own: a tuple equals no name of a cluster
            weight = line.get("weights", {}).get(name, 1)
            scores += [line["scores"][name]] * weight
            clusters += [(line["id"],) if line["cluster"] is None else line["cluster"]] * weight
    if not scores:
        return {"mean": None, "standard_error": None, "interval": None}
    estimate = mean_estimate(scores, clusters)
    error = estimate.standard_error
    return {
        "mean": estimate.mean,
        "standard_error": None if math.isinf(error) else error,
        "interval": list(estimate.interval(bounds=(0, 1))),
    }


def _calibration(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Calibration of multiple choice by plain log-likelihood; other normalisations give no probabilities.

    None where items are no choices.
    """
    choices = [line for line in lines if "raw" in line["scores"] and len(line.get("log_likelihoods", [[]])[0]) > 1]
    if not choices:
        return None
    confidences = [choice_probability(line["log_likelihoods"][0])[1] for line in choices]
    clusters = [(line["id"],) if line["cluster"] is None else line["cluster"] for line in choices]
    calibration = reliability(confidences, [line["scores"]["raw"] for line in choices], clusters_N=clusters)
    return {
        "expected_calibration_error": calibration.expected_calibration_error,
        "bins": [
            {"n": bin.accuracy.items, "confidence": bin.confidence, "accuracy": bin.accuracy.mean} for bin in calibration.bins
        ],
    }
