"""Settings of the stage `synthesize`. Imports no PyTorch."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import field_validator, model_validator

from bessemer.core.config import Config, setting
from bessemer.data.config import CleanConfig, DeduplicateConfig, LimitConfig, SelectConfig
from bessemer.data.deduplication.config import MinHashConfig
from bessemer.data.thresholds.presets import scores_of
from bessemer.posttraining.chat_models.config import ChatModelConfig

#: Raised when the same settings and inputs give other rows than before.
SYNTHESIZE_VERSION = 2


class WriterConfig(ChatModelConfig):
    """The model that writes."""

    temperature: float = setting(1.0, "of what it writes; 0: the likeliest token each time", ge=0, allow_inf_nan=False)


def _usual_deduplication() -> DeduplicateConfig:
    # of two prompts of ten words that differ in one, half of the runs of three words are the same
    near = MinHashConfig(ngram=3, bands=20, rows=4, threshold=0.6)
    return DeduplicateConfig(methods=["exact", "minhash"], minhash=near)


def _usual_scores() -> CleanConfig:
    return CleanConfig(score=["toxicity", "model_written"])


def _usual_limits() -> SelectConfig:
    # what degenerates; the phrases that give a model away are in nearly all of its answers
    limits = {"model_written_repetition": LimitConfig(max=0.5), "model_written_monotony": LimitConfig(max=0.7)}
    return SelectConfig(keep=["toxicity"], languages=[], thresholds=limits)


class SynthesizeConfig(Config):
    """The stage `synthesize`: a model writes prompts after the example of seeds, and answers them."""

    shorthand: ClassVar[str | None] = "data"

    data: list[str] = setting(
        description="Files of seeds, rows with a prompt, as JSON lines, JSON, CSV or Parquet.", min_length=1
    )
    prompt_column: str = setting("prompt", "Column of the prompts: messages, or a text that the user says.")
    prompts: int | None = setting(
        None, "Prompts to write after the example of seeds; absent: the seeds themselves are answered.", unit="prompts", ge=1
    )
    examples: int = setting(3, "Seeds that are shown where a prompt is written, drawn for each.", unit="seeds", ge=1)
    writer: WriterConfig | None = setting(None, "The model that writes; absent: the model of the stages above.")
    max_tokens: int = setting(512, "Longest text of the model above; a writer has its own.", unit="tokens", ge=1)
    temperature: float = setting(1.0, "Of the model above; a writer has its own.", ge=0, allow_inf_nan=False)
    batch_size: int = setting(
        32, "Texts under way at once; after each batch its rows are on the disk.", affects_output=False, gt=0
    )
    deduplicate: DeduplicateConfig | None = setting(
        default_factory=_usual_deduplication,
        description="Of the prompts, seeds before those that are written: as the stage of that name; null: none.",
    )
    clean: CleanConfig = setting(
        default_factory=_usual_scores, description="Edits and scores of the answers, as the stage of that name."
    )
    select: SelectConfig = setting(
        default_factory=_usual_limits, description="Which answers are kept by their scores, as the stage of that name."
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
