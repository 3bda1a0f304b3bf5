"""Settings of a guard, and the registry of its rails. Nothing heavy is imported here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import field_validator

from bessemer.core.config import Config, nearest, setting
from bessemer.core.policy import Policy
from bessemer.core.registry import Plugin, Registry

if TYPE_CHECKING:
    from bessemer.safety.findings import Rail

#: Makes a rail for a policy.
RailMaker: TypeAlias = "Callable[[Policy, GuardConfig], Rail]"
GuardForm = Literal["llama_guard_3", "llama_guard_4", "qwen3guard", "gpt_oss_safeguard"]

_RAILS = "bessemer.safety.rails"
RAILS: Registry[RailMaker] = Registry(
    "rail",
    "bessemer.rails",
    [
        Plugin("rules", "personal data, secrets, injections, hidden text", f"{_RAILS}:rules_rail"),
        Plugin("words", "word lists: hazards, and the terms and patterns of the policy's categories", f"{_RAILS}:words_rail"),
        Plugin("classifier", "a linear classifier of short windows", f"{_RAILS}:classifier_rail"),
        Plugin("model", "a guard model behind an API", "bessemer.safety.guard_models:model_rail"),
    ],
)


class GuardConfig(Config):
    """What a guard looks with, and what it keeps."""

    rails: list[str] = setting(
        default_factory=lambda: ["rules", "words", "classifier"],
        description=f"what texts are looked at with: {', '.join(RAILS)}, or another package's",
        plugins=RAILS.group,
    )
    classifier: str | None = setting(None, "file of a classifier of one's own; none: the one that comes with Bessemer")
    model_url: str | None = setting(None, "of the rail `model`: an API of chat completions or completions, ending in /v1")
    model_name: str = setting("guard", "of the rail `model`: the model's name there")
    model_form: GuardForm = setting("llama_guard_3", "of the rail `model`: how it is asked, and answers")
    audit: str | None = setting(None, "file to which each decision is added, a line of JSON")
    audit_content: bool = setting(False, "the file also has the texts that were decided about")
    held_characters: int = setting(
        240,
        "an answer is held back to the end of a sentence, and for no more than so many characters",
        unit="characters",
        ge=16,
    )
    checked_characters: int = setting(
        1200, "characters at the end of a growing answer that are read at each check", unit="characters", ge=200
    )

    @field_validator("rails")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in RAILS:
                raise ValueError(f"there is no rail {name!r}{nearest(name, list(RAILS))}")
        if len(set(value)) < len(value):
            raise ValueError("a rail is named twice")
        return value
