"""What a model forgot in a fine-tuning: general tasks before and after, item by item; and limits that a result must meet.

A tuned model is better on what it was tuned for, and often worse at the rest (McCloskey and Cohen 1989; of language models: Luo
et al. 2023, arXiv 2308.08747). The same items are answered by likelihood by the model before and after, in the same precision.
Accuracies of few items are coarse: one item of fifty is two points. So the measure is the mean −log p a token of the right
answers, whose paired differences have small errors; accuracies stand beside it.

The tasks come with the package (`general_knowledge`, `general_texts`), or are named. They are passed in, since what asks them
is in a later package. Imports no PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from bessemer.core.config import Config, setting
from bessemer.core.errors import ConfigError
from bessemer.core.statistics import paired_difference
from bessemer.posttraining.sft.report import size_word
from bessemer.tasks.questions import ItemResult

if TYPE_CHECKING:
    from bessemer.inference.engine import Engine

#: Exit code when the new model breaks a limit.
LIMITS_BROKEN = 3

#: Results by task and item.
ItemResults = Mapping[str, Mapping[str, ItemResult]]


class GeneralTasks(Protocol):
    """Tasks by which a model is compared with what it was before."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Questions by task."""

    def results(self, engine: Engine, advance: Callable[[float], None]) -> ItemResults:
        """Results of an engine's model on each task's items, by the items' ids. advance: called with the number of new
        answers."""


def forgetting(before: ItemResults, after: ItemResults) -> dict[str, Any] | None:
    """Figures and words that compare the same items before and after; losses are in nats a token of the right answers. None for
    fewer than two items.

    `forgot` is true where the whole 95 % interval of the mean rise is above 0. Items of all tasks count alike.
    """
    tasks = {name: _figures(items, after[name]) for name, items in before.items() if items}
    losses = [(one.loss, after[name][id].loss) for name, items in before.items() for id, one in items.items()]
    if len(losses) < 2:
        return None
    rise = paired_difference([late for _, late in losses], [early for early, _ in losses])
    low, high = rise.interval()
    size = size_word(rise)
    if low > 0:
        answer = f"yes, {size}"
    elif high < 0:
        answer = "no, these became likelier"
    else:
        answer = "undecided"
    early, late = (float(np.mean(side)) for side in zip(*losses, strict=True))
    words = (
        f"forgotten of general tasks: {answer}. Loss of right answers {early:.3f} → {late:.3f} nats a token (95 % interval of "
        f"the rise: {low:.3f} to {high:.3f}; {rise.items:,} items)"
    )
    return {
        "verdict": words,
        "forgot": low > 0,
        "size": size,
        "loss_before": early,
        "loss_after": late,
        "rise": rise.mean,
        "interval": _finite(low, high),
        "items": rise.items,
        "tasks": tasks,
    }


def _figures(before: Mapping[str, ItemResult], after: Mapping[str, ItemResult]) -> dict[str, Any]:
    """A task's accuracies and losses before and after, with the intervals of the differences."""
    early = [before[id] for id in before]
    late = [after[id] for id in before]
    loss = paired_difference([one.loss for one in late], [one.loss for one in early])
    accuracy = paired_difference([one.score for one in late], [one.score for one in early])
    return {
        "items": len(early),
        "accuracy_before": float(np.mean([one.score for one in early])),
        "accuracy_after": float(np.mean([one.score for one in late])),
        "accuracy_interval": list(accuracy.interval(bounds=(-1, 1))),
        "loss_before": float(np.mean([one.loss for one in early])),
        "loss_after": float(np.mean([one.loss for one in late])),
        "rise": loss.mean,
        "interval": _finite(*loss.interval()),
    }


def _finite(low: float, high: float) -> list[float] | None:
    """An interval for JSON; None where a single item gives no spread."""
    return None if math.isinf(low) else [low, high]


class Limits(Config):
    """Limits for scripts: `bessemer finetune` ends with exit code 3 where a result does not meet one."""

    fail_if_worse: bool = setting(False, "Fail if the held-out loss is higher than before, with its whole interval.")
    min_improvement: float | None = setting(None, "Least fall of the mean held-out loss.", unit="nats a token")
    max_loss: float | None = setting(None, "Highest mean held-out loss at the end.", unit="nats a token")
    max_forgetting: float | None = setting(
        None, "Largest rise of the mean loss of right answers to general tasks.", unit="nats a token"
    )

    def check(self, *, asks_tasks: bool) -> None:
        """Raise ConfigError for a limit on a figure that is not measured. asks_tasks: whether general tasks are measured."""
        if self.max_forgetting is not None and not asks_tasks:
            raise ConfigError("--max-forgetting: of general tasks, and --general none asks none; leave one of them out")

    def broken(self, result: Mapping[str, Any]) -> list[str]:
        """The limits that a result breaks, a sentence each."""
        fall, after = result["difference"], result["loss_after"]
        sentences = []
        if self.fail_if_worse and result["interval"][1] < 0:
            sentences.append(f"--fail-if-worse: the loss of what was held out rose by {-fall:.3f} nats a token")
        if self.min_improvement is not None and fall < self.min_improvement:
            sentences.append(f"--min-improvement {self.min_improvement:g}: the loss of what was held out fell by {fall:.3f}")
        if self.max_loss is not None and after > self.max_loss:
            sentences.append(f"--max-loss {self.max_loss:g}: the loss of what was held out is {after:.3f}")
        if self.max_forgetting is not None:
            measured = result.get("forgetting")
            if measured is None:
                raise ConfigError(
                    "--max-forgetting: this fine-tuning ended without general tasks, or with items longer than the model's "
                    "context; tune into another folder, and name tasks that fit with --general"
                )
            if measured["rise"] > self.max_forgetting:
                rise = measured["rise"]
                sentences.append(f"--max-forgetting {self.max_forgetting:g}: the loss of general tasks rose by {rise:.3f}")
        return sentences
