"""Settings of the stages `revise` and `ai_preferences`. Imports no PyTorch."""

from __future__ import annotations

from typing import ClassVar

from bessemer.core.config import Config, setting
from bessemer.posttraining.chat_models.config import ChatModelConfig

#: Raised when the same settings and inputs give other rows than before.
REVISE_VERSION = 2
AI_PREFERENCES_VERSION = 2


class PrincipledConfig(Config):
    """What both stages have: prompts, answers of the model above, a policy and a critic."""

    shorthand: ClassVar[str | None] = "data"

    data: list[str] = setting(description="Files of prompts, as JSON lines, JSON, CSV or Parquet.", min_length=1)
    prompt_column: str = setting("prompt", "Column of the prompts: messages, or a text that the user says.")
    limit: int | None = setting(None, "The first prompts only; absent: all.", unit="prompts", ge=1)
    policy: str | None = setting(
        None, "YAML file of the policy that gives the principles; absent: Bessemer's own.", affects_output=False
    )
    principles: list[str] = setting(
        default_factory=list, description="Principles of the policy by name, of which each draw takes one; empty: all."
    )
    critic: ChatModelConfig | None = setting(None, "The model that criticises or compares; absent: the model that answers.")
    max_tokens: int = setting(256, "Longest answer.", unit="tokens", ge=1)
    temperature: float = setting(1.0, "Of the answers; 0: the likeliest token each time.", ge=0, allow_inf_nan=False)
    batch_size: int = setting(
        32, "Prompts under way at once; after each batch its rows are on the disk.", affects_output=False, gt=0
    )


class ReviseConfig(PrincipledConfig):
    """The stage `revise`: a model answers prompts, its answers are criticised by principles and written anew."""

    rounds: int = setting(1, "Critiques and revisions of an answer, one behind the other, by one principle each.", ge=1)


class AIPreferencesConfig(PrincipledConfig):
    """The stage `ai_preferences`: a model says which of two answers fits a principle better, and how sure it is."""

    principles_per_pair: int = setting(1, "Principles by which a pair is compared; the mean counts.", ge=1)
    least_confidence: float = setting(
        0.5, "Pairs whose preferred answer is better with no higher probability are left out.", ge=0.5, lt=1
    )
