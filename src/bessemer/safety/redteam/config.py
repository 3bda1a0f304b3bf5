"""Settings of a red team, its attacks by name, and the stage's version. Imports no PyTorch."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import model_validator

from bessemer.core.config import Config, setting
from bessemer.core.registry import Plugin, Registry
from bessemer.safety.redteam import adaptive, attacks
from bessemer.safety.redteam.attacks import Attack
from bessemer.tasks.judged import JudgeConfig

#: Raised whenever the stage's output changes.
REDTEAM_VERSION = 1


class GcgSettings(Config):
    """Settings of `gcg` and `random_search`."""

    steps: int = setting(50, "steps of the search; each replaces one token", ge=1)
    candidates: int = setting(64, "suffixes that are evaluated in a step", ge=1)
    top_k: int = setting(256, "tokens of the steepest descent at each place, from which candidates are drawn", ge=1)
    suffix_tokens: int = setting(20, "length of the suffix", unit="tokens", ge=1, le=256)


class AttackerConfig(JudgeConfig):
    """The model that writes prompts for `refinement`."""

    temperature: float = setting(1.0, "temperature of its prompts", ge=0, allow_inf_nan=False)


#: Attacks by name. A recipe or the command names some; without that, `USUAL_ATTACKS`.
ATTACKS: Registry[Attack] = Registry(
    "attack",
    "bessemer.attacks",
    (
        Plugin("direct", "the plain request, and the harmless ones for over-refusal", attacks.DIRECT, attacks.NoSettings),
        Plugin("role_play", "the request inside a role", attacks.ROLE_PLAY, attacks.NoSettings),
        Plugin("prefix_injection", "the beginning of the answer is asked for", attacks.PREFIX_INJECTION, attacks.NoSettings),
        Plugin("encoding", "base64, rot13, leetspeak, homoglyphs and others", attacks.ENCODING, attacks.EncodingSettings),
        Plugin("translation", "the request in other languages", attacks.TRANSLATION, attacks.TranslationSettings),
        Plugin("payload_splitting", "the request in parts", attacks.PAYLOAD_SPLITTING, attacks.SplittingSettings),
        Plugin("many_shot", "many answered requests in the context", attacks.MANY_SHOT, attacks.ManyShotSettings),
        Plugin(
            "best_of_n", "the request with new noise, until one sample complies", attacks.BEST_OF_N, attacks.BestOfNSettings
        ),
        Plugin("escalation", "questions that lead to the request", adaptive.ESCALATION, adaptive.EscalationSettings),
        Plugin("refinement", "an attacker model writes the prompt", adaptive.REFINEMENT, adaptive.RefinementSettings),
        Plugin("document_injection", "an instruction in a document", attacks.DOCUMENT_INJECTION, attacks.NoSettings),
        Plugin("tool_injection", "an instruction in a tool's result", attacks.TOOL_INJECTION, attacks.NoSettings),
        Plugin("system_prompt", "questions for the system prompt", attacks.SYSTEM_PROMPT, attacks.NoSettings),
        Plugin("training_data", "beginnings of known texts", attacks.TRAINING_DATA, attacks.NoSettings),
        Plugin("gcg", "a suffix by gradients of the weights", "bessemer.safety.redteam.gcg:GCG", GcgSettings),
        Plugin("random_search", "a suffix by chance, beside gcg", "bessemer.safety.redteam.gcg:RANDOM_SEARCH", GcgSettings),
    ),
)

#: What a run tries where nothing is named: all but what needs an attacker, or takes hours.
USUAL_ATTACKS = (
    "direct",
    "role_play",
    "prefix_injection",
    "encoding",
    "translation",
    "payload_splitting",
    "many_shot",
    "best_of_n",
    "escalation",
    "document_injection",
    "tool_injection",
    "system_prompt",
    "training_data",
)


class RedTeamConfig(Config):
    """The stage `redteam`, and the command's settings: attacks on a model, with what they may cost."""

    shorthand: ClassVar[str | None] = "attacks"
    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("minutes", "budget"),)

    attacks: list[str] = setting(
        default_factory=lambda: list(USUAL_ATTACKS),
        description="attacks by name, `direct` among them for the baseline",
        min_length=1,
    )
    attack_settings: dict[str, dict[str, Any]] = setting(
        default_factory=dict, description="settings of attacks by their name, such as {best_of_n: {samples: 100}}"
    )
    categories: list[str] = setting(
        default_factory=list,
        description="categories of goals: the policy's, and injection, system_prompt, recitation; empty: all",
    )
    limit: int | None = setting(None, "the first goals of each kind and category only; none: all", unit="goals", ge=1)
    budget: int | None = setting(None, "most queries of the model; none: as many as the attacks need", unit="queries", ge=1)
    minutes: float | None = setting(
        None,
        "of the stage: most time; a measurement at the start says how many queries that is, and takes the place of `budget`; "
        "searches of gcg are not counted. none: no limit",
        unit="minutes",
        gt=0,
    )
    policy: str | None = setting(None, "YAML file of the policy; none: Bessemer's own", affects_output=False)
    seeds: list[str] = setting(
        default_factory=list, description="YAML files of goals of your own, beside ours", affects_output=False
    )
    own_seeds: bool = setting(True, "whether the goals that come with Bessemer are tried")
    system: str = setting("", "system prompt of the model; empty: none")
    max_tokens: int = setting(160, "longest answer", unit="tokens", ge=1)
    temperature: float = setting(0.0, "temperature of the answers, where an attack says no other", ge=0, allow_inf_nan=False)
    attacker: AttackerConfig | None = setting(None, "the model that attacks, for `refinement`; none: none")
    judge: JudgeConfig | None = setting(None, "the model that rates answers by StrongREJECT's rubric; none: none")

    @model_validator(mode="after")
    def _attacks_are_known(self) -> Self:
        from bessemer.core.errors import ConfigError

        try:
            for name in self.attacks:
                ATTACKS.find(name)
            for name, values in self.attack_settings.items():
                settings = ATTACKS.find(name).settings
                if name not in self.attacks:
                    raise ConfigError(f"attack_settings: {name} is none of the attacks that are named")
                (settings or attacks.NoSettings).parse(values, name)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if self.attacker is None and "refinement" in self.attacks:
            raise ValueError("the attack refinement needs a model that attacks: name an attacker, or leave it out")
        return self

    @property
    def resolved(self) -> bool:
        """Whether the number of queries is not left to a measurement."""
        return self.minutes is None

    def plugins(self) -> list[tuple[str, str]]:
        return sorted({*super().plugins(), *((ATTACKS.group, name) for name in self.attacks)})

    def settings_of(self, name: str) -> Config:
        """The settings of one attack."""
        return (ATTACKS.find(name).settings or attacks.NoSettings).parse(self.attack_settings.get(name, {}), name)
