"""What a run made, in plain words: for the last lines in the terminal and the head of the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bessemer.core.progress import size
from bessemer.pipeline.stages import DATA_STAGES
from bessemer.views.figures import LOSSY_NOTE, baseline_label, is_lossy

#: A model below this many parameters learns the look of its texts and little of what they say.
_SMALL = 100_000_000

Metrics = Mapping[str, Any]


def sentences(metrics: Mapping[str, Metrics]) -> list[str]:
    """A finished run in a few sentences. metrics: stage → the metrics in its manifest."""
    return [*_corpus(metrics), *_model(metrics), *_tasks(metrics.get("evaluate", {}))]


def _corpus(metrics: Mapping[str, Metrics]) -> list[str]:
    refined = [found for name, found in metrics.items() if name in DATA_STAGES]
    if not refined:
        return []
    first, last = refined[0], refined[-1]
    lines = [
        f"Corpus: {first['documents_out']:,} documents ({size(first['bytes_out'])}) went in, "
        f"{last['documents_out']:,} ({size(last['bytes_out'])}) were kept."
    ]
    if first.get("skipped_sources"):
        lines.append(f"A source could not be reached and is missing: {', '.join(first['skipped_sources'])}.")
    return lines


def _model(metrics: Mapping[str, Metrics]) -> list[str]:
    lines = []
    parameters = metrics.get("model", {}).get("parameters")
    if parameters:
        trained = metrics.get("pretrain", {}).get("tokens")
        lines.append(f"Model: {parameters:,} parameters{f', trained on {trained:,} tokens' if trained else ''}.")
    results = metrics.get("evaluate", {})
    scores, baselines = results.get("bits_per_byte", {}), results.get("baselines", {})
    if scores:
        shown = ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
        beside = ", ".join(f"{baseline_label(name)} {score:.3f}" for name, score in baselines.items())
        lines.append(
            f"Bits per byte on text held out of training, lower is better: {shown}"
            f"{f' (beside it: {beside})' if beside else ''}."
        )
        if is_lossy(metrics.get("tokenize")):
            lines.append(LOSSY_NOTE)
    if parameters and parameters < _SMALL:
        answers = " and answers the questions that it was tuned on" if "sft" in metrics else ""
        lines.append(
            f"At this size it writes in the style of its corpus{answers}; it does not know facts, reason, or answer "
            f"{'anything else' if answers else 'questions'} reliably."
        )
    return lines


def _tasks(results: Metrics) -> list[str]:
    lines = []
    for task, by_model in results.get("tasks", {}).items():
        if not by_model:
            continue
        name, scores = list(by_model.items())[-1]
        parts = []
        if "exact_match_held_in" in scores:
            parts.append(f"{scores['exact_match_held_in']:.0%} of the questions it was tuned on answered exactly (memorised)")
        if "exact_match_held_out" in scores:
            parts.append(f"{scores['exact_match_held_out']:.0%} of new ones, ROUGE-L {scores['rouge_l_held_out']:.2f}")
        lines.append(f"{task} after {name}: {'; '.join(parts)}.")
    return lines


def next_steps(run: str, folder: Path, metrics: Mapping[str, Metrics]) -> list[str]:
    """Commands that go on from a finished run."""
    commands = []
    if "sft" in metrics:
        commands.append(f"bessemer chat {run}")
    if (folder / "model").exists():
        commands.append(f"bessemer serve {run}")
    if "pretrain" in metrics:
        commands.append(f'bessemer generate {(folder / "stages" / "pretrain" / "model").as_posix()} "Return the"')
    return [*commands, f"bessemer show {run}"]
