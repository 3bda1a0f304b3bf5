"""Rewards by name. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bessemer.core.registry import Plugin, Registry
from bessemer.posttraining.rewards import config
from bessemer.tasks.questions import GenerationQuestion, GenerationTask

#: TRL's: of the keywords `completions`, `prompts`, `completion_ids` and the data's columns, a number for each completion.
RewardFunction = Callable[..., Sequence[float | None]]


class AskedTask(NamedTuple):
    """A task that prompts are of, and its questions by the number of their item."""

    task: GenerationTask
    questions: Mapping[int, GenerationQuestion]


@dataclass(frozen=True)
class RewardContext:
    """What a reward is made with besides its settings. folder: where files of the user's lie. tasks: by name. reward_model: the
    folder of the one that the stage `reward` has made."""

    folder: Path = Path()
    tasks: Mapping[str, AskedTask] = field(default_factory=dict)
    reward_model: Path | None = None


#: From settings and context to the reward.
RewardFactory = Callable[[Any, RewardContext], RewardFunction]

_OWN = "bessemer.posttraining.rewards"

REWARDS: Registry[RewardFactory] = Registry(
    "reward",
    config.GROUP,
    [
        Plugin("task", "the score of the task that a prompt is of", f"{_OWN}.verified:task_reward", config.TaskReward),
        Plugin(
            "answer", "the right answer of a column, exact or a number", f"{_OWN}.verified:answer_reward", config.AnswerReward
        ),
        Plugin("program", "code that passes its tests", f"{_OWN}.verified:program_reward", config.ProgramReward),
        Plugin("regex", "a regular expression that matches", f"{_OWN}.form:pattern_reward", config.PatternReward),
        Plugin("json_schema", "JSON that fits a schema", f"{_OWN}.form:json_schema_reward", config.JSONSchemaReward),
        Plugin("format", "parts in tags, each once, in order", f"{_OWN}.form:format_reward", config.FormatReward),
        Plugin("length", "a wanted number of tokens", f"{_OWN}.length:length_reward", config.LengthReward),
        Plugin("overlong", "DAPO's punishment of long answers", f"{_OWN}.length:overlong_reward", config.OverlongReward),
        Plugin("repetition", "minus the share of repeated runs", f"{_OWN}.length:repetition_reward", config.RepetitionReward),
        Plugin("judge", "a model's rating of the answer", f"{_OWN}.judged:judge_reward", config.JudgeReward),
        Plugin("rubric", "criteria that a model finds met", f"{_OWN}.judged:rubric_reward", config.RubricReward),
        Plugin(
            "reward_model",
            "the score of a trained reward model",
            f"{_OWN}.judged:reward_model_reward",
            config.RewardModelReward,
        ),
        Plugin(
            "environment",
            "what the environment of an episode says",
            f"{_OWN}.environment:environment_reward",
            config.EnvironmentReward,
        ),
    ],
)
