"""Rewards that a model gives: a rating, the criteria of a rubric that are met, the score of a reward model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bessemer.core.errors import ConfigError
from bessemer.posttraining.chat_models.files import model_place
from bessemer.posttraining.chat_models.opening import open_chat_model
from bessemer.posttraining.formats import conversation_text
from bessemer.posttraining.reward.reward_model import RewardModel
from bessemer.posttraining.rewards.config import JudgeReward, RewardModelReward, RubricReward
from bessemer.posttraining.rewards.registry import RewardContext, RewardFunction
from bessemer.posttraining.rewards.texts import texts_of
from bessemer.tasks.judge import Answered, Criterion, RubricJudge
from bessemer.tasks.judged import CriterionConfig

Turns = str | Sequence[Mapping[str, Any]]


def judge_reward(settings: JudgeReward, context: RewardContext) -> RewardFunction:
    """(rating − 1) / 4. A judgement that cannot be read is NaN: it fails, and is never guessed.

    Raises as `open_chat_model`.
    """
    ask = open_chat_model(settings.judge, context.folder).ask
    judge = RubricJudge(ask) if settings.criterion is None else RubricJudge(ask, criterion=settings.criterion)

    def reward(completions: Sequence[Turns], prompts: Sequence[Turns], **columns: Any) -> list[float | None]:
        return _read(judge.scores(_answered(completions, prompts, settings.reference, columns)))

    return reward


def rubric_reward(settings: RubricReward, context: RewardContext) -> RewardFunction:
    """Σ w·yes / Σ w of the criteria of the settings and of the prompt; None for a prompt without any. NaN as of `judge_reward`.

    Raises as `open_chat_model`.
    """
    ask = open_chat_model(settings.judge, context.folder).ask
    common = [_criterion(one) for one in settings.criteria]

    def reward(completions: Sequence[Turns], prompts: Sequence[Turns], **columns: Any) -> list[float | None]:
        answered = _answered(completions, prompts, settings.reference, columns)
        own = _column(columns, settings.column, len(answered))
        places: dict[tuple[Criterion, ...], list[int]] = {}
        for place, given in enumerate(own):
            places.setdefault((*common, *_criteria(given)), []).append(place)
        rewards: list[float | None] = [None] * len(answered)
        for criteria, of_these in places.items():
            if not criteria:
                continue
            scores = _read(RubricJudge(ask, criteria).scores([answered[place] for place in of_these]))
            for place, score in zip(of_these, scores, strict=True):
                rewards[place] = score
        return rewards

    return reward


def reward_model_reward(settings: RewardModelReward, context: RewardContext) -> RewardFunction:
    """The model's score at the end token, which a completion that was cut is given too.

    Raises ConfigError where there is no model, ArtefactError where it gives no score.
    """
    place = context.reward_model if settings.model is None else model_place(settings.model, context.folder)
    if place is None:
        raise ConfigError("reward_model: name the folder of its model; no stage above has made one")
    model = RewardModel.open(place)

    def reward(completions: Sequence[Turns], prompts: Sequence[Turns], **_: Any) -> list[float | None]:
        return list(model.score([_turns(prompt) for prompt in prompts], [_turns(one) for one in completions]))

    return reward


def _read(scores: Sequence[float | None]) -> list[float | None]:
    return [math.nan if score is None else score for score in scores]


def _answered(
    completions: Sequence[Turns], prompts: Sequence[Turns], reference: str | None, columns: Mapping[str, Any]
) -> list[Answered]:
    references = _column(columns, reference, len(completions))
    return [
        Answered(
            prompt if isinstance(prompt, str) else conversation_text([dict(one) for one in prompt]), text, str(right or "")
        )
        for prompt, text, right in zip(prompts, texts_of(completions), references, strict=True)
    ]


def _column(columns: Mapping[str, Any], name: str | None, count: int) -> Sequence[Any]:
    """A column of the data; nothing for each row where none is named. Raises ValueError for one that is not there."""
    if name is None:
        return [None] * count
    if name not in columns:
        raise ValueError(f"the data has no column {name!r}")
    values: Sequence[Any] = columns[name]
    return values


def _criteria(given: Any) -> list[Criterion]:
    """A row's own criteria. Raises ValueError for what is no list of them."""
    if given is None:
        return []
    if not isinstance(given, list):
        raise ValueError(f"criteria must be a list of questions, they are {given!r}"[:200])
    return [_criterion(one if isinstance(one, str) else CriterionConfig.parse(one, "criteria")) for one in given]


def _criterion(given: CriterionConfig | str) -> Criterion:
    return Criterion(given) if isinstance(given, str) else Criterion(given.question, given.weight)


def _turns(given: Turns) -> Any:
    return given if isinstance(given, str) else tuple(dict(message) for message in given)
