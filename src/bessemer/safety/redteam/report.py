"""Report of a red team: what was reached by which attack, what was refused, examples, before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bessemer.core.metrics import label, percent
from bessemer.core.report import (
    Cell,
    Column,
    Curves,
    Document,
    Documents,
    Folded,
    Heading,
    HeatMap,
    HeatMaps,
    KeyFigure,
    Metrics,
    Part,
    ReportData,
    Section,
    Series,
    StageReport,
    Table,
    Text,
)
from bessemer.safety.redteam.results import MEASURABLE, highest_rate

#: What each outcome means to a reader.
OUTCOMES = {
    "complied": "complied",
    "leaked": "leaked",
    "refused": "refused",
    "blocked": "blocked by the server",
    "unspecific": "neither refused nor did it",
    "incoherent": "babble",
}


def interval(rate: Mapping[str, Any] | None) -> str:
    """A rate with its 95 % interval: `12.5 % [4.0, 30.1]`."""
    if rate is None:
        return "–"
    return f"{percent(rate['rate'])} [{100 * rate['low']:.0f}, {100 * rate['high']:.0f}]"


def verdict_sentence(results: Metrics) -> str:
    """What the run shows, in a sentence; that it shows nothing, where it is not measurable."""
    harmless = results["harmless"]["answered"]
    if not results["by_attack"]:
        return "Not measured: no attempt was finished."
    if harmless is None:
        return (
            f"Attacks succeeded most often by {_most(results)}. Harmless requests were not asked, so over-refusal is unknown."
        )
    if not results["measurable"]:
        return (
            f"Not measurable: this model answers {percent(harmless['rate'])} of the harmless requests coherently and to "
            f"the point, under {MEASURABLE:.0%}. What it does not say it may be unable to say: the figures show the form of "
            "the report alone."
        )
    refused = results["harmless"]["refused"]
    return (
        f"Attacks succeeded most often by {_most(results)}; of the harmless requests {percent(refused['rate'])} were refused "
        f"and {percent(harmless['rate'])} answered to the point."
    )


def _most(results: Metrics) -> str:
    name, share = highest_rate(results)
    return f"{name} ({percent(share)})"


def redteam_parts(results: Metrics) -> list[Part]:
    """The parts of a run's section."""
    parts: list[Part] = [Text(verdict_sentence(results), lead=True)]
    if results["finished"] < results["planned"]:
        done = f"{results['finished']:,} of {results['planned']:,}"
        parts.append(Text(f"{done} attempts are finished; the budget ended before the others, which count nowhere."))
    if results["by_attack"]:
        parts += [Heading("By attack"), attacks_table(results)]
        parts += [Heading("By category"), categories_table(results), matrix_map(results)]
    if results["harmless"]["answered"] is not None:
        parts += [Heading("Harmless requests near a category"), _harmless_table(results["harmless"])]
    if (direct := results.get("direct")) is not None and direct["rate"] < MEASURABLE:
        parts.append(
            Text(
                f"The plain request succeeds in {percent(direct['rate'])}, under {MEASURABLE:.0%}: a later run with less shows "
                "no improvement for it."
            )
        )
    if results.get("best_of_n"):
        parts += _best_of_n(results["best_of_n"])
    if results.get("judge"):
        parts += _judge(results["judge"])
    parts += [Text(note[:1].upper() + note[1:] + ".") for note in results["notes"]]
    parts += [Text(f"{count:,} attempts could not be made: {why}.") for why, count in results["errors"].items()]
    if results["examples"]:
        parts.append(Folded("Prompts and answers", [Documents([_example(one) for one in results["examples"]])]))
    return parts


def attacks_table(results: Metrics) -> Table:
    """A row an attack: success with its interval, and what the other answers were."""
    rows: list[list[str | Cell]] = []
    for name, of in results["by_attack"].items():
        outcomes = [f"{of['outcomes'].get(key, 0):,}" for key in ("refused", "blocked", "unspecific", "incoherent")]
        success = Cell(interval(of), share=of["rate"])
        rows.append([Cell(name, strong=True), success, f"{of['attempts']:,}", *outcomes, f"{of['queries']:,}"])
    headings = ("Success, 95 % interval", "Attempts", "Refused", "Blocked", "Neither", "Babble", "Queries")
    return Table([Column("Attack"), *(Column(heading, True) for heading in headings)], rows)


def categories_table(results: Metrics) -> Table:
    """A row a category: success of all attacks together, and the attack that succeeds most often there."""
    rows: list[list[str | Cell]] = []
    for name, of in results["by_category"].items():
        attack, most = max(results["matrix"][name].items(), key=lambda pair: pair[1])
        most_shown = f"{attack}, {percent(most)}" if most else "none"
        rows.append([Cell(label(name), strong=True), Cell(interval(of), share=of["rate"]), f"{of['attempts']:,}", most_shown])
    columns = [Column("Category"), Column("Success, 95 % interval", True), Column("Attempts", True), Column("Most by")]
    return Table(columns, rows)


def matrix_map(results: Metrics) -> HeatMaps:
    """Success by category and attack, as shades."""
    attacks, categories = list(results["by_attack"]), list(results["matrix"])
    values = [[results["matrix"][category].get(attack, math.nan) for attack in attacks] for category in categories]
    names = [label(category) for category in categories]
    return HeatMaps([HeatMap("success by category and attack", values, names, attacks, "category", "attack")])


def _harmless_table(harmless: Metrics) -> Table:
    rows: list[list[str | Cell]] = [
        ["refused (over-refusal)", interval(harmless["refused"])],
        ["answered coherently and to the point", interval(harmless["answered"])],
    ]
    rows += [[Cell("", remark=OUTCOMES.get(name, name)), f"{count:,}"] for name, count in harmless["outcomes"].items()]
    return Table([Column("Of harmless requests"), Column("Share, 95 % interval", True)], rows)


def _best_of_n(curve: Metrics) -> list[Part]:
    parts: list[Part] = [
        Curves(
            [Series("best_of_n", curve["samples"], curve["rate"])],
            "attack success by number of samples",
            x_label="samples",
            wide=False,
            from_zero=True,
        )
    ]
    if curve["a"] is not None:
        parts.append(Text(f"−log ASR = {curve['a']:.2f} · N^−{curve['b']:.2f}, fitted to {len(curve['samples'])} points."))
    return parts


def _judge(judge: Metrics) -> list[Part]:
    rows: list[list[str | Cell]] = [
        ["both: the goal was reached", f"{judge['both_success']:,}"],
        ["the detectors of text alone", f"{judge['text_alone']:,}"],
        ["the judge alone", f"{judge['judge_alone']:,}"],
        ["neither", f"{judge['neither']:,}"],
    ]
    score = f"{judge['score']:.3f} [{judge['low']:.3f}, {judge['high']:.3f}]"
    return [
        Heading("The judge beside the detectors of text"),
        Text(f"StrongREJECT's mean score of {judge['rated']:,} answers to attacks: {score}, of 1."),
        Table([Column("Who says that the goal was reached"), Column("Attempts", True)], rows),
    ]


def _example(one: Metrics) -> Document:
    judged = one["judge"]
    score = "" if judged is None else f", judge {judged['score']:.2f}"
    outcome = OUTCOMES.get(one["outcome"], one["outcome"])
    words = f" ({one['refusal']})" if one["refusal"] else ""
    said = f"{outcome}{words}{score}"
    return Document(f"{one['prompt']}\n\n→ {one['answer']}", f"{one['attack']}, {label(one['category'])}", one["goal"], said)


def comparison_parts(comparison: Metrics) -> list[Part]:
    """Before and after, on the attempts that both runs made."""
    rows: list[list[str | Cell]] = []
    named = [("attack success, all requests", comparison["attack_success"])]
    named += [(name, of) for name, of in comparison["by_attack"].items()]
    named += [("over-refusal", comparison["over_refusal"]), ("harmless requests answered", comparison["answered"])]
    for name, of in named:
        if of is not None:
            change = f"{100 * of['change']:+.1f} [{100 * of['low']:+.0f}, {100 * of['high']:+.0f}]"
            rows.append([name, percent(of["before"]), percent(of["after"]), change, f"{of['attempts']:,}"])
    success = comparison["attack_success"]
    parts: list[Part] = [Heading("Before and after")]
    if success is not None and not comparison["measurable"]:
        parts.append(
            Text(
                f"Not measurable: before, attacks succeeded in {percent(success['before'])}, under {MEASURABLE:.0%}; whether a "
                "change makes attacks fail cannot be seen where they fail anyway.",
                lead=True,
            )
        )
    columns = [
        Column(""),
        Column("Before", True),
        Column("After", True),
        Column("Change, points", True),
        Column("Attempts", True),
    ]
    return [*parts, Table(columns, rows)]


def redteam_report(name: str, results: Metrics, comparison: Metrics | None = None) -> ReportData:
    """The page of a run of the command."""
    parts = [*redteam_parts(results), *([] if comparison is None else comparison_parts(comparison))]
    return ReportData(
        name=name,
        description="Red team",
        sentences=[verdict_sentence(results)],
        figures=key_figures_of(results),
        sections=[Section("Red team", parts, headline=True)],
    )


def key_figures_of(results: Metrics) -> list[KeyFigure]:
    """The attack that succeeds most often, and over-refusal; nothing where the model cannot be measured."""
    if not results["measurable"] or not results["by_attack"]:
        return []
    name, share = highest_rate(results)
    refused = results["harmless"]["refused"]["rate"]
    return [
        KeyFigure(value=f"{share:.0%}", label="attack success", note=f"by {name}, the most successful attack"),
        KeyFigure(value=f"{refused:.0%}", label="over-refusal", note="of harmless requests"),
    ]


# ------------------------------------------------------------------------------------------------------------------ the stage


def report(stage: StageReport) -> Section:
    """The section of the stage."""
    return Section(stage.titled("Red team"), redteam_parts(stage.metrics), headline=True)


def summary_line(metrics: Metrics) -> str:
    """Attempts, and whether they show something."""
    shown = "" if metrics["measurable"] else ", not measurable"
    return f"{metrics['finished']:,} attempts, {metrics['queries']:,} queries{shown}"


def sentences(stage: StageReport) -> Sequence[str]:
    """What the run shows."""
    return [f"Red team: {verdict_sentence(stage.metrics)[:1].lower()}{verdict_sentence(stage.metrics)[1:]}"]


def key_figures(stage: StageReport) -> Sequence[KeyFigure]:
    """As `key_figures_of`."""
    return key_figures_of(stage.metrics)
