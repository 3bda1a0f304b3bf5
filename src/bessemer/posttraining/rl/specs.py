"""The stage `rl` for the pipeline, and its section of the report: rewards, lengths, entropy, divergence, and completions with
their rewards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    StageReport,
    Table,
    Text,
)
from bessemer.core.stage import Outside, StageContext
from bessemer.posttraining.rewards.config import RewardModelReward
from bessemer.posttraining.rl.config import RL_VERSION, RLConfig
from bessemer.training.report import diagnostics, series_of, summary_line, task_accuracies, training_curves
from bessemer.training.specs import check_loop, loop_packages, model_not_merged, resolved_by, training_arguments, training_stage

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
#: Number of rollouts in the report, and of completions of each.
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
        labels = {key: _LABELS.get(key, key.removeprefix("reward_").replace("_", " ")) for key in keys}
        series = [one for key, label in labels.items() if (one := series_of(stage.records, key, label=label)).points()[0]]
        if series:
            parts.append(Curves(series, title))
    return parts


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


def _rl(context: StageContext, *, only_resolve: bool = False) -> dict[str, Any]:
    from bessemer.posttraining.rl.stage import rl

    return rl(
        context.config,
        context.inputs["model"],
        context.out,
        reward_model=context.inputs.get("reward_model"),
        only_resolve=only_resolve,
        **training_arguments(context),
    )


def _fingerprint(config: RLConfig, outside: Outside) -> Any:
    from bessemer.posttraining.data.examples import files_fingerprint
    from bessemer.posttraining.data.made import is_data_name
    from bessemer.posttraining.rewards.config import rewards_fingerprint

    files = files_fingerprint([name for name in config.data if "." in name or is_data_name(name)], outside.folder)
    models = rewards_fingerprint(config.rewards, outside.folder)
    # models only where there are any, so that the keys of other runs stay
    return [files, models] if models else files


def _check(config: RLConfig) -> None:
    """Raises ConfigError for a name of no registry, besides what all stages that train need."""
    from bessemer.posttraining.preference.config import PAIR_LOSSES
    from bessemer.posttraining.rl.methods import ADVANTAGES, AGGREGATIONS, CORRECTIONS, DIVERGENCES, POLICY_LOSSES

    check_loop(config)
    ADVANTAGES.find(config.advantage)
    POLICY_LOSSES.find(config.loss)
    AGGREGATIONS.find(config.aggregation)
    CORRECTIONS.find(config.correction)
    DIVERGENCES.find(config.divergence)
    if config.pair_loss is not None:
        PAIR_LOSSES.find(config.pair_loss)


def _packages(config: RLConfig) -> list[str]:
    needed = ["jsonschema"] if any(reward.reward == "json_schema" for reward in config.rewards) else []
    return [*loop_packages(config), *needed]


def _unread(config: RLConfig) -> frozenset[str]:
    starts = config.critic is not None and config.critic.start == "reward_model"
    judges = any(isinstance(reward, RewardModelReward) and reward.model is None for reward in config.rewards)
    return frozenset() if starts or judges else frozenset({"reward_model"})


STAGES = (
    training_stage(
        kind="rl",
        summary="Train the model by rewards of what it writes (GRPO, PPO and their kin).",
        config=RLConfig,
        version=RL_VERSION,
        needs={"model": "model", "reward_model": "reward_model"},
        unread=_unread,
        makes={"model": "model", "completions": "completions.jsonl"},
        links={"model": "model", "adapter": "adapter"},
        lacks=model_not_merged,
        example="rl: {data: [prompts.jsonl], rewards: [answer]}",
        budget_seconds=55,
        report=report,
        summary_line=summary_line,
        run=_rl,
        resolve=resolved_by(_rl),
        fingerprint=_fingerprint,
        packages=_packages,
        check=_check,
    ),
)
