"""The figures of an evaluation as a table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType

from bessemer.views.parts_terminal import listing, literal


def show_task_results(results: Mapping[str, Any]) -> RenderableType:
    """What `evaluate_tasks` returns: a row for each task and for each figure of several samples, and CORE-n below."""
    table = listing("Task", "Items", "Shots", "Asked", "Score", "Mean", "±", "Chance")
    for name, task in results["tasks"].items():
        asked = [f"{task['n']:,}", str(task["shots"]), task["form"]]
        headline = [task["score"], _share(task["accuracy"]), _share(task["standard_error"]), _share(task["chance"])]
        table.add_row(*map(literal, [name, *asked, *headline]))
        for score, figures in task["scores"].items():
            # of choices the other normalisations are in results.json
            if score != task["score"] and "calibration" not in task:
                cells = [*[""] * 4, score, _share(figures["mean"]), _share(figures["standard_error"]), ""]
                table.add_row(*map(literal, cells))
        if "by_level" in task:
            for each in task["by_level"]["levels"]:
                named = [f"  {task['by_level']['level']} {each['level']:,}", f"{each['n']:,}", "", "", ""]
                table.add_row(*map(literal, [*named, _share(each["mean"]), _share(each["standard_error"]), ""]))
        if "calibration" in task:
            error = task["calibration"]["expected_calibration_error"]
            table.add_row(*map(literal, [*[""] * 4, "calibration error", _share(error), "", ""]))
    lines: list[RenderableType] = [table, literal("± is the standard error of the mean over items.", "dim")]
    if "core" in results:
        core = results["core"]
        lines.append(literal(f"{core['name']}: {core['value']:.4f}. It compares with the same {core['n']} tasks only."))
    if results.get("contamination"):
        lines += ["", _contamination(results["contamination"])]
    return Group(*lines)


def _contamination(tasks: Mapping[str, Any]) -> RenderableType:
    """Of each task, the items that share a run of 13 words with the training corpus, and the scores with and without them."""
    table = listing("Task", "In the corpus", "Too short to tell", "Clean items", "Score of clean", "of those in the corpus")
    for name, task in tasks.items():
        items = task["clean"] + task["dirty"] + task["unknown"]
        counts = [f"{task['dirty']:,} of {items:,}", f"{task['unknown']:,}", f"{task['clean']:,}"]
        table.add_row(*map(literal, [name, *counts, _share(task["clean_accuracy"]), _share(task["dirty_accuracy"])]))
    return table


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
