"""Settings of the stages `revise`, `ai_preferences`, `honesty`, `forgetting` and `synthesize`. Imports no PyTorch."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import field_validator, model_validator

from bessemer.core.config import Config, setting
from bessemer.data.config import CleanConfig, DeduplicateConfig, LimitConfig, SelectConfig
from bessemer.data.deduplication.registry import MinHashConfig
from bessemer.data.filters.registry import scores_of
from bessemer.posttraining.chat_models import ChatModelConfig
from bessemer.posttraining.data.made import ON_BAD_ROW, PLACES, OnBadRow

#: Raised when the same settings and inputs give other rows than before.
REVISE_VERSION = 2
AI_PREFERENCES_VERSION = 2


class PrincipledConfig(Config):
    """Settings that `revise` and `ai_preferences` share: prompts, answers of an earlier model, a policy and a critic."""

    shorthand: ClassVar[str | None] = "data"

    data: list[str] = setting(description=f"Prompts: {PLACES}.", min_length=1)
    prompt_column: str = setting("prompt", "Column of the prompts: messages, or a text that the user says.")
    on_bad_row: OnBadRow = setting("skip", ON_BAD_ROW)
    limit: int | None = setting(None, "The first prompts only; absent: all.", unit="prompts", ge=1)
    policy: str | None = setting(
        None, "YAML file of the policy that gives the principles; absent: Bessemer's own.", affects_output=False
    )
    principles: list[str] = setting(
        default_factory=list, description="Principles of the policy by name, of which each draw takes one; empty: all."
    )
    critic: ChatModelConfig | None = setting(None, "The model that criticises or compares; absent: the model that answers.")
    max_tokens: int = setting(256, "Longest answer.", unit="tokens", ge=1)
    temperature: float = setting(
        1.0, "Temperature of the answers; 0: the likeliest token each time.", ge=0, allow_inf_nan=False
    )
    batch_size: int = setting(32, "Prompts of a batch; its rows are written when it is complete.", affects_output=False, gt=0)


class ReviseConfig(PrincipledConfig):
    """The stage `revise`: a model answers prompts; its answers are criticised by principles and rewritten."""

    rounds: int = setting(1, "Rounds of critique and revision of an answer, each by one principle.", ge=1)


class AIPreferencesConfig(PrincipledConfig):
    """The stage `ai_preferences`: a model says which of two answers fits a principle better, and how sure it is."""

    principles_per_pair: int = setting(1, "Number of principles by which a pair is compared; their mean is used.", ge=1)
    least_confidence: float = setting(
        0.5, "Leave out pairs whose preferred answer is better with at most this probability.", ge=0.5, lt=1
    )


#: Raised when the same settings and inputs give other pairs than before.
HONESTY_VERSION = 2


class HonestyConfig(Config):
    """The stage `honesty`: pairs for questions that the documentation answers, and for questions that it does not."""

    shorthand: ClassVar[str | None] = "pairs"

    pairs: int = setting(400, "Most pairs.", gt=0)
    unknown_share: float = setting(
        0.5,
        "Share of pairs whose question no document answers; from such pairs only, a model would learn to know nothing.",
        gt=0,
        lt=1,
    )
    unsure: list[str] = setting(
        default_factory=lambda: ["I don't know.", "I don't know of such a thing.", "I can't say: I know nothing about it."],
        description="Answers to unknown questions, of which each pair gets one.",
        min_length=1,
    )


#: Raised when the same settings and inputs give other rows than before.
FORGETTING_VERSION = 1


class ForgettingConfig(Config):
    """The stage `forgetting`: documents that a model is to forget, and others beside which it forgets them."""

    shorthand: ClassVar[str | None] = "ids"

    ids: list[str] = setting(default_factory=list, description="Ids of documents to forget.")
    sources: list[str] = setting(
        default_factory=list, description="Sources all of whose documents are to be forgotten, such as canaries."
    )
    keep: int = setting(1000, "Other documents, drawn evenly, whose beginnings are to be kept.", unit="documents", ge=1)
    alike: int = setting(
        0,
        "Canaries that were never planted, to be kept beside those that are forgotten: without any, a model "
        "unlearns the form, and what it knows within it stays.",
        unit="canaries",
        ge=0,
    )
    prompt_words: int = setting(
        4, "Words at the beginning of a text that are given; what follows them is forgotten or kept.", unit="words", ge=1
    )
    words: int = setting(
        100, "A longer document to forget becomes several texts; of one to keep the first is taken.", unit="words", ge=8
    )

    @model_validator(mode="after")
    def _names_something(self) -> Self:
        if not self.ids and not self.sources:
            raise ValueError("name ids or sources of documents to forget")
        if self.prompt_words >= self.words:
            raise ValueError(f"prompt_words: a text of {self.words} words needs some after its beginning")
        return self


#: Raised when the same settings and inputs give other rows than before.
SYNTHESIZE_VERSION = 2


class WriterConfig(ChatModelConfig):
    """The model that writes."""

    temperature: float = setting(1.0, "temperature of its texts; 0: the likeliest token each time", ge=0, allow_inf_nan=False)


def _usual_deduplication() -> DeduplicateConfig:
    # two prompts of ten words that differ in one share half of their runs of three words
    near = MinHashConfig(ngram=3, bands=20, rows=4, threshold=0.6)
    return DeduplicateConfig(methods=["exact", "minhash"], minhash=near)


def _usual_scores() -> CleanConfig:
    return CleanConfig(score=["toxicity", "model_written"])


def _usual_limits() -> SelectConfig:
    # rules against degenerate text; phrases typical of a model are in nearly all of its answers
    limits = {"model_written_repetition": LimitConfig(max=0.5), "model_written_monotony": LimitConfig(max=0.7)}
    return SelectConfig(keep=["toxicity"], languages=[], thresholds=limits)


class SynthesizeConfig(Config):
    """The stage `synthesize`: a model writes prompts after the example of seeds, and answers them."""

    shorthand: ClassVar[str | None] = "data"

    data: list[str] = setting(description=f"Seeds, rows with a prompt: {PLACES}.", min_length=1)
    prompt_column: str = setting("prompt", "Column of the prompts: messages, or a text that the user says.")
    on_bad_row: OnBadRow = setting("skip", ON_BAD_ROW)
    prompts: int | None = setting(
        None, "Prompts to write after the example of seeds; absent: the seeds themselves are answered.", unit="prompts", ge=1
    )
    examples: int = setting(3, "Number of seeds shown for each prompt to write, drawn anew each time.", unit="seeds", ge=1)
    writer: WriterConfig | None = setting(None, "The model that writes; absent: the model of the stages above.")
    max_tokens: int = setting(512, "Longest text of the model above; a writer has its own setting.", unit="tokens", ge=1)
    temperature: float = setting(
        1.0, "Temperature of the model above; a writer has its own setting.", ge=0, allow_inf_nan=False
    )
    batch_size: int = setting(32, "Texts of a batch; its rows are written when it is complete.", affects_output=False, gt=0)
    deduplicate: DeduplicateConfig | None = setting(
        default_factory=_usual_deduplication,
        description="Deduplication of prompts, where seeds count as earlier than written ones: as in the stage of that name; "
        "null: none.",
    )
    clean: CleanConfig = setting(
        default_factory=_usual_scores, description="Edits and scores of the answers, as in the stage of that name."
    )
    select: SelectConfig = setting(
        default_factory=_usual_limits, description="Which answers are kept by their scores, as in the stage of that name."
    )

    @field_validator("deduplicate", mode="before")
    @classmethod
    def _bare_methods(cls, value: Any) -> Any:
        return {"methods": value} if isinstance(value, list) else value

    @field_validator("select", mode="before")
    @classmethod
    def _bare_presets(cls, value: Any) -> Any:
        return {"keep": value} if isinstance(value, (str, list)) else value

    @model_validator(mode="after")
    def _scores_are_computed(self) -> Self:
        known = [*self.clean.score, *self.clean.edit]
        wanted = [score for name in self.select.keep for score in scores_of(name)]
        if self.select.language_limits():
            wanted.append("language")
        missing = next((score for score in wanted if score not in known), None)
        if missing is not None:
            raise ValueError(f"select needs the score {missing}; add it to clean.score, or leave it out of select")
        return self
