"""Rewards of a completion's form: a pattern, JSON, parts in tags."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bessemer.core.json_schema import schema_check
from bessemer.posttraining.rewards.config import FormatReward, JSONSchemaReward, PatternReward
from bessemer.posttraining.rewards.registry import RewardContext, RewardFunction
from bessemer.posttraining.rewards.texts import texts_of

Completions = Sequence[str | Sequence[Mapping[str, Any]]]

_FENCE = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)


def pattern_reward(settings: PatternReward, context: RewardContext) -> RewardFunction:
    """1.0 where the pattern matches, else 0.0."""
    pattern = re.compile(settings.pattern, re.DOTALL)
    matches = pattern.fullmatch if settings.whole else pattern.search

    def reward(completions: Completions, **_: Any) -> list[float | None]:
        return [float(matches(text) is not None) for text in texts_of(completions)]

    return reward


def format_reward(settings: FormatReward, context: RewardContext) -> RewardFunction:
    """1.0 where the completion is the parts in their tags, with nothing but white space around them, or behind them text where
    the settings want it; else 0.0."""
    # no tag inside a part: each stands once
    tags = "|".join(re.escape(tag) for tag in settings.tags)
    inside = rf"(?:(?!</?(?:{tags})>).)*"
    parts = r"\s*".join(rf"<{re.escape(tag)}>{inside}</{re.escape(tag)}>" for tag in settings.tags)
    behind = rf"(?!</?(?:{tags})>)\S{inside}" if settings.text_after else ""
    pattern = re.compile(rf"\s*{parts}\s*{behind}", re.DOTALL)

    def reward(completions: Completions, **_: Any) -> list[float | None]:
        return [float(pattern.fullmatch(text) is not None) for text in texts_of(completions)]

    return reward


def json_schema_reward(settings: JSONSchemaReward, context: RewardContext) -> RewardFunction:
    """1.0 where the completion is JSON that fits its schema, else 0.0.

    Raises ConfigError without the package `jsonschema`, and for a schema that is none.
    """
    whose = "the reward json_schema"
    common = None if settings.json_schema is None else schema_check(settings.json_schema, whose)

    def reward(completions: Completions, json_schema: Sequence[Any] | None = None, **_: Any) -> list[float | None]:
        schemas = json_schema or [None] * len(completions)
        found: list[float | None] = []
        for text, schema in zip(texts_of(completions), schemas, strict=True):
            if settings.fenced and (block := _FENCE.search(text)) is not None:
                text = block[1]
            try:
                value = json.loads(text)
            except (json.JSONDecodeError, RecursionError):
                found.append(0.0)
                continue
            check = common
            if check is None and schema is not None:
                check = schema_check(json.loads(schema) if isinstance(schema, str) else schema, whose)
            found.append(float(check is None or check(value) is None))
        return found

    return reward
