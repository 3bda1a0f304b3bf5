"""Terminal output of `bessemer show` and `bessemer evaluate`: runs, tokenizers, models, presets, tasks, as tables.

Corpora are in `data_terminal`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table

from bessemer.core.metrics import baseline_label, duration, label, percent, short_count, shown, simple_values, size
from bessemer.core.report import Metrics, ReportData, StageRun, Text
from bessemer.evaluation.report import quality_sentences, quality_table
from bessemer.tokenization.specs import DOMAIN_FIGURES, SPLITS, UNKNOWN_NOTE, domains_of, figure, mostly_written
from bessemer.views.elements import token_words, tokens_text
from bessemer.views.parts_terminal import HEADING, bar_text, facts_text, listing, literal, section, show_parts, show_section


def show_run(report: ReportData) -> RenderableType:
    """A run: what was made, its stages, the sections that are headlines, what to type next."""
    parts: list[RenderableType] = [literal(report.name, HEADING)]
    if report.description:
        parts.append(literal(report.description, "dim"))
    parts += [literal(sentence) for sentence in report.sentences]
    if report.stages:
        parts += section("The pipeline", _stages(report.stages))
    for part in report.sections:
        if part.headline:
            parts += show_section(part)
    if report.next_steps:
        parts += section("What to type next", literal("\n".join(report.next_steps)))
    return Group(*parts)


def show_tokenizer(metrics: Metrics) -> RenderableType:
    """A tokenizer: its figures, what samples cost in it, its longest tokens, and a text in its tokens.

    metrics: those of the tokenize stage, or of `measure.describe`; what is missing is left out.
    """
    parts: list[RenderableType] = [facts_text(metrics)]
    for split in SPLITS:
        if isinstance(metrics.get(split), Mapping):
            parts += section(split, facts_text(metrics[split]))
    of_text = (metrics.get("validation") or {}).get("bytes_per_token")
    if of_text and metrics.get("baselines"):
        simplest = {baseline_label(name): value for name, value in metrics["baselines"].items() if value is not None}
        parts += section(
            "Bytes per token of the held-out text", _best_first({"This tokenizer": of_text}, simplest, highest=True)
        )
    if metrics.get("by_domain"):
        parts += section("Samples by kind of text", _domains(metrics["by_domain"]))
        if not all(map(mostly_written, metrics["by_domain"].values())):
            parts.append(Padding(literal(UNKNOWN_NOTE, "dim"), (0, 0, 0, 2)))
    parts += _vocabulary(metrics)
    for name, pieces in _token_texts(metrics).items():
        parts += section(name, tokens_text(pieces))
    return Group(*parts)


def show_tokenizers(described: Mapping[str, Metrics]) -> RenderableType:
    """Several tokenizers side by side, by name: their figures, what samples cost in each, a text in the tokens of each."""
    table = listing("", *described)
    simple = [simple_values(metrics) for metrics in described.values()]
    for name in dict.fromkeys(name for values in simple for name in values):
        table.add_row(literal(label(name), "dim"), *(literal(shown(name, values.get(name))) for values in simple))
    parts: list[RenderableType] = [table]
    for name, title in DOMAIN_FIGURES.items():
        parts += section(title, _side_by_side(described, name, highest=name == "bytes_per_token"))
    if not all(mostly_written(figures) for metrics in described.values() for figures in metrics["by_domain"].values()):
        parts.append(literal(f"\n{UNKNOWN_NOTE}", "dim"))
    lost = {
        name: [label(domain) for domain, figures in metrics["by_domain"].items() if not figures["round_trip"]]
        for name, metrics in described.items()
    }
    if any(lost.values()):
        lines = [f"{name}: {', '.join(domains)}" for name, domains in lost.items() if domains]
        parts += section("Decoding does not give the sample back", literal("\n".join(lines)))
    for name, metrics in described.items():
        parts += [literal(f"\n{name}", "bold"), *_vocabulary(metrics, shares=False)]
        for title, pieces in _token_texts(metrics).items():
            parts += section(title, tokens_text(pieces))
    shares = {name: metrics.get("embedding_shares", {}) for name, metrics in described.items()}
    if any(shares.values()):
        presets = dict.fromkeys(preset for of_one in shares.values() for preset in of_one)
        rows = [[preset, *(percent(of_one[preset]) for of_one in shares.values())] for preset in presets]
        parts += section(_SHARES_TITLE, listing("Preset", *shares, rows=rows))
    return Group(*parts)


_SHARES_TITLE = "The embedding's share of a model's parameters"


def _domains(by_domain: Mapping[str, Metrics]) -> Table:
    table = listing("Sample", *DOMAIN_FIGURES.values(), "Unknown", "Given back")
    for domain, figures in by_domain.items():
        back = literal("exactly", "dim") if figures["round_trip"] else literal("not exactly", "yellow")
        table.add_row(literal(label(domain)), *(figure(figures, name) for name in (*DOMAIN_FIGURES, "unknown_share")), back)
    return table


def _side_by_side(described: Mapping[str, Metrics], name: str, *, highest: bool) -> Table:
    """One figure by sample, a column for each tokenizer, the best of a row bold."""
    table = listing("Sample", *described)
    for domain in domains_of(list(described.values()), name):
        of_each = [metrics["by_domain"][domain] for metrics in described.values()]
        known = [of_one[name] for of_one in of_each if of_one.get(name) is not None and mostly_written(of_one)]
        best = (max(known) if highest else min(known)) if known else None
        cells = [
            literal(figure(of_one, name), "dim" if not mostly_written(of_one) else "bold" if of_one.get(name) == best else "")
            for of_one in of_each
        ]
        table.add_row(literal(label(domain)), *cells)
    return table


def _vocabulary(metrics: Metrics, *, shares: bool = True) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for name, title in (("longest_tokens", "The longest tokens"), ("unused_examples", "Some of the unused tokens")):
        if metrics.get(name):
            parts += section(title, token_words(metrics[name]))
    if shares and metrics.get("embedding_shares"):
        table = Table.grid(padding=(0, 2))
        for preset, share in metrics["embedding_shares"].items():
            table.add_row(literal(preset, "dim"), bar_text(share), percent(share))
        parts += section(_SHARES_TITLE, table)
    return parts


def _token_texts(metrics: Metrics) -> dict[str, Sequence[str]]:
    return {"A text in tokens": metrics["sample_tokens"]} if metrics.get("sample_tokens") else {}


def show_model(metrics: Metrics, values: str = "float32") -> RenderableType:
    """A model: its figures, its kinds of layers and its parts, as `model_metrics` gives them.

    values: the type in which its cache is counted, for the reader. A figure that is missing is left out.
    """
    total = metrics.get("parameters")
    notes = {
        "flops_per_token": f"of a training token, with {metrics.get('context_length', 0):,} tokens of context",
        "kv_bytes_per_token": f"in {values}",
    }
    if total and metrics.get("active_parameters") is not None:
        notes["active_parameters"] = f"that one token meets: {percent(metrics['active_parameters'] / total)}"
    figures = Table.grid(padding=(0, 2))
    figures.add_column()
    figures.add_column(justify="right")
    for name, value in simple_values(metrics).items():
        if name == "active_parameters" and value == total:
            continue
        figures.add_row(literal(label(name), "dim"), literal(shown(name, value)), literal(notes.get(name, ""), "dim"))
    parts: list[RenderableType] = [figures]
    if metrics.get("layer_kinds"):
        rows = [
            [_runs(kind["layers"]), kind["attention"], kind["positions"], kind["feed_forward"]]
            for kind in metrics["layer_kinds"]
        ]
        kinds = listing("Layers", "Attention", "Positions", "Feed-forward", rows=rows)
        for column in kinds.columns:
            column.justify = "left"
        parts += section(f"{sum(len(kind['layers']) for kind in metrics['layer_kinds'])} layers", kinds)
    if metrics.get("layers"):
        table = listing("Part", "count", "parameters", "share", "")
        for layer in metrics["layers"]:
            share = layer["parameters"] / total if total else 0
            shapes = literal(_shapes(layer.get("shapes", [])), "dim")
            table.add_row(
                literal(layer["part"]),
                f"{layer['count']:,}",
                f"{layer['parameters']:,}",
                percent(share) if total else "",
                shapes,
            )
        parts += section("Parts", table)
    return Group(*parts)


def show_presets(figures: Mapping[str, Metrics]) -> RenderableType:
    """The presets in a table."""
    rows = []
    for name, metrics in figures.items():
        total, active, kinds = metrics["parameters"], metrics["active_parameters"], metrics["layer_kinds"]
        described = "; ".join(dict.fromkeys(re.split(",| over", kind["attention"])[0] for kind in kinds))
        rows.append(
            (
                name,
                short_count(total),
                short_count(active) if active != total else "",
                f"{metrics['context_length']:,}",
                str(sum(len(kind["layers"]) for kind in kinds)),
                literal(described + (", experts" if active != total else ""), "dim"),
            )
        )
    return listing("Preset", "parameters", "active", "context", "layers", "", rows=rows)


def _runs(layers: Sequence[int]) -> str:
    """Numbers of layers, runs of them shortened: `1–5, 7–11 … 25–26`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    words = [str(first) if first == last else f"{first}–{last}" for first, last in runs]
    return ", ".join(words) if len(words) <= 4 else f"{', '.join(words[:2])} … {words[-1]}"


def _shapes(shapes: Sequence[Sequence[int]]) -> str:
    """The shapes of a part's matrices; those of a part that has none as they are."""
    shown_shapes = [shape for shape in shapes if len(shape) > 1] or list(shapes)
    counted: dict[str, int] = {}
    for shape in shown_shapes:
        words = " × ".join(map(str, shape))
        counted[words] = counted.get(words, 0) + 1
    return ", ".join(f"{count} × ({words})" if count > 1 else f"({words})" for words, count in counted.items())


def show_facts(title: str, metrics: Metrics) -> RenderableType:
    """Any stage: its name and its simple figures."""
    return Group(literal(title, HEADING), facts_text(metrics))


def show_quality(quality: Metrics) -> RenderableType:
    """A model before and after quantisation: a table, and sentences about the loss."""
    return Group(*show_parts([quality_table(quality), *map(Text, quality_sentences(quality))]))


def _stages(stages: Sequence[StageRun]) -> Table:
    longest = max(stage.seconds for stage in stages) or 1
    rows = [
        (
            stage.name,
            duration(stage.seconds),
            bar_text(stage.seconds / longest),
            size(stage.peak_memory_bytes) if stage.peak_memory_bytes else "–",
            stage.summary,
        )
        for stage in stages
    ]
    table = listing("Stage", "time", "", "peak memory", "what it made", rows=rows)
    table.columns[-1].justify = "left"
    return table


def _best_first(ours: Mapping[str, float], baselines: Mapping[str, float], *, highest: bool) -> Table:
    styled = {name: (value, "bold") for name, value in ours.items()}
    styled |= {name: (value, "dim") for name, value in baselines.items()}
    table = Table.grid(padding=(0, 2))
    for name, (value, style) in sorted(styled.items(), key=lambda item: item[1][0], reverse=highest):
        table.add_row(literal(name, style), f"{value:.3f}")
    return table


def show_task_results(results: Mapping[str, Any]) -> RenderableType:
    """What `evaluate_tasks` returns: a row for each task and for each figure of several samples, and CORE-n below."""
    table = listing("Task", "Items", "Shots", "Asked", "Score", "Mean", "±", "Chance")
    for name, task in results["tasks"].items():
        settings = [f"{task['n']:,}", str(task["shots"]), task["form"]]
        headline = [task["score"], _share(task["accuracy"]), _share(task["standard_error"]), _share(task["chance"])]
        table.add_row(*map(literal, [name, *settings, *headline]))
        for score, figures in task["scores"].items():
            # other normalisations of a choice's score are in results.json alone
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
    rows = []
    for name, task in tasks.items():
        items = task["clean"] + task["dirty"] + task["unknown"]
        counts = [f"{task['dirty']:,} of {items:,}", f"{task['unknown']:,}", f"{task['clean']:,}"]
        rows.append([name, *counts, _share(task["clean_accuracy"]), _share(task["dirty_accuracy"])])
    headings = ("In the corpus", "Too short to tell", "Clean items", "Score of clean", "of those in the corpus")
    return listing("Task", *headings, rows=rows)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
