"""What a run says of its rollouts: figures for the metrics, and every completion with its rewards."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bessemer.core.metrics import MetricsLog
from bessemer.posttraining.rl.sampler import Group
from bessemer.posttraining.rl.samples import Sample

#: Completions and rewards of every rollout, a line each.
COMPLETIONS = "completions.jsonl"


@dataclass
class Tally:
    """Counts of one rollout. equal: groups whose rewards do not differ. refills: None without dynamic sampling. failures: of
    rewards, by what went wrong. metrics: what rewards logged."""

    groups: int = 0
    equal: int = 0
    refills: int | None = None
    failures: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)


def rollout_figures(
    samples: Sequence[Sample], groups: Sequence[Group], totals_R: Tensor, tally: Tally, names: Sequence[str]
) -> dict[str, float]:
    """Figures of a rollout for the metrics. names: of the rewards."""
    known = totals_R[~totals_R.isnan()]
    lengths = [len(sample.completion_ids) for sample in samples]
    figures = {
        "reward": float(known.mean()),
        "reward_std": float(known.std()) if len(known) > 1 else 0.0,
        "completion_tokens": statistics.fmean(lengths),
        "completion_tokens_max": float(max(lengths)),
        "cut_share": statistics.fmean(sample.is_cut for sample in samples),
        "dropped": float(totals_R.isnan().sum()),
    }
    if len(groups[0].samples) > 1:
        figures["equal_groups"] = tally.equal / tally.groups
    if tally.refills is not None:
        figures["refills"] = float(tally.refills)
    if len(names) > 1:
        rewards_RK = torch.cat([group.rewards_GK for group in groups])
        means = {f"reward_{name}": float(rewards_RK[:, k].nanmean()) for k, name in enumerate(names)}
        figures |= {name: value for name, value in means.items() if not math.isnan(value)}
    return figures


class CompletionsLog:
    """Every completion with its rewards, a line each."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        """names: of the rewards."""
        self._path = folder / COMPLETIONS
        self._names = names
        self._log: MetricsLog | None = None

    def write(self, step: int, groups: Sequence[Group], advantages_R: Tensor) -> None:
        """The rollout of a step, counted from 0; what the file holds of later ones is removed at the first call."""
        if self._log is None:
            self._log = MetricsLog(self._path, step or None)
        advantages = iter(advantages_R.tolist())
        for number, group in enumerate(groups):
            for place, sample in enumerate(group.samples):
                rewards = zip(self._names, group.rewards_GK[place].tolist(), strict=True)
                total = float(group.totals_G[place])
                row = {
                    "group": number,
                    "prompt": sample.prompt.text,
                    "completion": sample.text,
                    "tokens": len(sample.completion_ids),
                    "cut": sample.is_cut,
                    "rewards": {name: None if math.isnan(value) else value for name, value in rewards},
                    "reward": None if math.isnan(total) else total,
                    "advantage": next(advantages),
                }
                for name, value in group.extra[place].items():
                    # a user's column may have a name of ours
                    row[f"extra_{name}" if name in row or name == "step" else name] = value
                self._log.write(step + 1, **row)

    def close(self) -> None:
        """Close the file."""
        if self._log is not None:
            self._log.close()
