"""Report of the stage `rl`: rewards, lengths, entropy, divergence, and completions with what they were worth."""

from __future__ import annotations

from pathlib import Path

from bessemer.core.metrics import read_metrics
from bessemer.core.report import (
    Cell,
    Column,
    Curves,
    Facts,
    Folded,
    Heading,
    Metrics,
    Part,
    Section,
    Series,
    StageReport,
    Table,
    Text,
)
from bessemer.training.report import diagnostics, summary_line, task_accuracies, training_curves

__all__ = ["report", "summary_line"]

#: Title of a chart → the metrics that are its curves.
_CHARTS = {
    "Reward": ("reward", "validation_reward"),
    "Tokens of a completion": ("completion_tokens",),
    "Entropy of a token, nats": ("entropy",),
    "Divergence from the model as it was, nats per token": ("kl",),
    "Reward that the critic expects": ("value",),
    "Share of the returns' variance that the critic explains": ("explained_variance",),
    "Log-probabilities of trainer and sampler: mean distance, nats": ("log_ratio",),
    "Shares of clipped tokens, of cut completions and of groups whose rewards are equal": (
        "clip_share",
        "cut_share",
        "equal_groups",
    ),
}
_LABELS = {"reward": "sampled", "validation_reward": "held out, greedy", "equal_groups": "equal groups", "cut_share": "cut"}
#: Rollouts of which completions are shown, and completions of each.
_SHOWN_ROLLOUTS, _SHOWN = 4, 8
#: Characters of a text in the table.
_LONGEST = 400


def report(stage: StageReport) -> Section:
    """Curves of the training, and completions along the way."""
    parts: list[Part] = [
        Text(
            "The model completes prompts, its completions are judged, and those better than others to the same prompt "
            "become likelier. The reward of held-out prompts is of greedy completions and says what it learnt; that of sampled "
            "ones is what it learnt from.",
            lead=True,
        ),
        *_charts(stage),
        *training_curves(stage.records),
        *task_accuracies(stage.records),
        *diagnostics(stage.records),
        Facts(stage.metrics),
        *_completions(stage.folder / "completions.jsonl"),
    ]
    return Section(stage.titled("Reinforcement learning"), parts)


def _charts(stage: StageReport) -> list[Part]:
    rewards = dict.fromkeys(
        key for record in stage.records for key in record if key.startswith("reward_") and key != "reward_std"
    )
    charts = list(_CHARTS.items())
    if rewards:
        charts.insert(1, ("Each reward", tuple(rewards)))
    parts: list[Part] = []
    for title, keys in charts:
        series = [one for key in keys if (one := _series(stage, key)).points()[0]]
        if series:
            parts.append(Curves(series, title))
    return parts


def _series(stage: StageReport, key: str) -> Series:
    found = [record for record in stage.records if isinstance(record.get(key), (int, float))]
    label = _LABELS.get(key, key.removeprefix("reward_").replace("_", " "))
    return Series(label, [record["step"] for record in found], [record[key] for record in found])


def _completions(path: Path) -> list[Part]:
    """The first completions of some rollouts, from the first to the last."""
    by_step: dict[int, list[Metrics]] = {}
    for record in read_metrics(path):
        shown = by_step.setdefault(record["step"], [])
        if len(shown) < _SHOWN:
            shown.append(record)
    steps = list(by_step)
    if not steps:
        return []
    most = min(_SHOWN_ROLLOUTS, len(steps))
    chosen = dict.fromkeys(steps[round(place * (len(steps) - 1) / max(most - 1, 1))] for place in range(most))
    columns = [Column("Prompt"), Column("Completion"), Column("Reward", True), Column("Advantage", True)]
    parts: list[Part] = [Heading("Completions along the way")]
    for step in chosen:
        rows: list[list[str | Cell]] = [
            [
                _cut(record["prompt"]),
                Cell(_cut(record["completion"]), remark="cut at the most tokens" if record["cut"] else ""),
                "none" if record["reward"] is None else f"{record['reward']:.3g}",
                f"{record['advantage']:+.2f}",
            ]
            for record in by_step[step]
        ]
        parts.append(Folded(f"Step {step:,}", [Table(columns, rows)]))
    return parts


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
