"""Settings of task files, one class for each kind of task, and the options of a call.

A template is a text with the fields of a row in braces: `Question: {query}`; `{{` is a brace.
"""

from __future__ import annotations

from pathlib import Path
from string import Formatter
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from bessemer.core.config import Config, setting
from bessemer.core.records import Record
from bessemer.tasks.questions import GenerationSettings
from bessemer.tasks.verifiers import Exact, Verifier


def _parts(text: str) -> list[tuple[str, str | None]]:
    """(literal text, name of the field behind it) in turn. Raises ValueError for anything else in braces."""
    parts = []
    for literal, name, spec, conversion in Formatter().parse(text):
        if name is not None and (not name.isidentifier() or spec or conversion):
            raise ValueError(f"braces hold the name of a field, not {name!r}; write {{{{ for a brace")
        parts.append((literal, name))
    return parts


def _checked(text: str) -> str:
    _parts(text)
    return text


#: A setting that is a template.
Template = Annotated[str, AfterValidator(_checked)]


def fill(template: str, record: Record) -> str:
    """The template with a row's fields. Raises ArtefactError where the row lacks one."""
    return "".join(literal + (record.text(name) if name is not None else "") for literal, name in _parts(template))


ChoiceScore = Literal["raw", "tokens", "characters", "bytes", "unconditional", "distinct_tokens"]


class PromptConfig(Config):
    """Settings of every kind of task: how a question is written."""

    name: str = setting("", "name of the task; empty: the file's", affects_output=False)
    description: Template = setting("", "text before all examples and the question")
    seed: int = setting(1234, "of the choice of examples, of items that are made, and of samples")
    limit: int | None = setting(None, "the first items only; none: all", unit="items", ge=1)
    begin_token: bool = setting(False, "begin a text with the begin token even where the tokenizer writes none")
    chat: bool = setting(False, "ask by the model's chat template, each example as a turn")
    system: str | None = setting(None, "system message, with `chat`; the description follows it")

    @model_validator(mode="after")
    def _system_needs_chat(self) -> Self:
        if self.system is not None and not self.chat:
            raise ValueError("system needs chat: true; plain text has no system message, `description` goes before all of it")
        return self


class TaskConfig(PromptConfig):
    """Settings of every kind of task over a file."""

    data: str = setting(
        description="JSONL, CSV or Parquet file with a row for each item, in the folder of the data or beside the task file",
        affects_output=False,
    )
    id: str | None = setting(
        None, "field that names an item in every evaluation; none: its line in the file", affects_output=False
    )
    cluster: str | None = setting(
        None,
        "field that items have in common which are not independent, such as a passage; none: all are",
        affects_output=False,
    )
    joiner: str = setting(" ", "text between a question and its answer")
    example_delimiter: str = setting("\n\n", "text between description, examples and question")
    shots: int = setting(0, "answered examples before each question", unit="examples", ge=0)
    examples: str | None = setting(None, "file of the examples; none: the task's own items, never the one that is asked")
    example_choice: Literal["fixed", "by_item"] = setting(
        "fixed", "the same examples for all items, which a model reads once; or others for each"
    )
    shuffle_seed: int | None = setting(None, "shuffle the items by this seed; none: in the order of the file")
    chance: float | None = setting(None, "score of guessing; none: one over the number of choices", ge=0, le=1)


class SampledConfig(PromptConfig):
    """How the answers of a task that generates are sampled."""

    max_tokens: int = setting(64, "longest answer", unit="tokens", ge=1)
    stop: list[Annotated[str, Field(min_length=1)]] = setting(
        default_factory=list, description="texts before which an answer ends; with `chat` a turn's end does"
    )
    samples: int = setting(1, "answers to each item", ge=1)
    temperature: float | None = setting(None, "0 is greedy; none: greedy for one sample, 0.8 for several", ge=0)
    top_p: float = setting(1.0, "sample from the likeliest tokens that together reach this probability", gt=0, le=1)

    thinking_budget: int | None = setting(
        None,
        "tokens of an answer after which its thinking (`<think>`) is closed, with `chat`; what follows the thinking is judged; "
        "none: no limit, and all of it is judged",
        unit="tokens",
        ge=0,
    )

    @model_validator(mode="after")
    def _thinking_needs_chat(self) -> Self:
        if self.thinking_budget is not None and not self.chat:
            raise ValueError("thinking_budget needs chat: true; an answer to plain text has no thinking that could be closed")
        return self

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"{self.samples} samples at temperature 0 are equal; raise temperature or take one sample")
        return self

    @property
    def generation(self) -> GenerationSettings:
        """How its answers are generated."""
        temperature = self.temperature if self.temperature is not None else 0.8 if self.samples > 1 else 0.0
        stop = () if self.chat else tuple(self.stop)
        return GenerationSettings(self.max_tokens, temperature, self.top_p, stop, self.samples, self.seed, self.thinking_budget)


class ChoiceConfig(TaskConfig):
    """Multiple choice by likelihood."""

    kind: Literal["choice"] = setting("choice", "multiple choice by likelihood")
    prompt: Template = setting("{query}", "the question, with fields in braces")
    choices: str | list[str] = setting("choices", "field that holds the list of choices, or a list of fields with one each")
    gold: str = setting("gold", "field that holds the right choice: its index from 0, or its letter")
    form: Literal["cloze", "letters", "best"] = setting(
        "cloze", "score the choices themselves, or letters behind a list of them; best: both, of which the better counts"
    )
    score: ChoiceScore = setting(
        "characters",
        "log-likelihood that chooses in the cloze form: as it is, per token, per character, per byte, less that without the "
        "question, or per token behind those that all choices begin with",
    )
    unconditional: str | None = setting(None, "text before a choice without its question, such as `Answer:`; none: not scored")
    letter_line: str = setting(" {letter}. {choice}", "a choice in the list of the lettered form")
    letter_joiner: str = setting("\nAnswer: ", "text between the list of choices and the letter")

    @model_validator(mode="after")
    def _unconditional_has_a_prompt(self) -> Self:
        if self.score == "unconditional" and self.unconditional is None:
            raise ValueError("score: unconditional needs `unconditional`, the text before a choice without its question")
        return self


class SchemaConfig(TaskConfig):
    """One continuation behind several contexts, as in Winograd schemas."""

    kind: Literal["schema"] = setting("schema", "one continuation behind several contexts, of which one makes sense")
    options: str | list[str] = setting("context_options", "field that holds the list of contexts, or a list of fields")
    continuation: Template = setting("{continuation}", "what is scored, with fields in braces")
    gold: str = setting("gold", "field that holds the right context: its index from 0, or its letter")


class ClozeConfig(TaskConfig):
    """A continuation that greedy decoding writes, or not."""

    kind: Literal["cloze"] = setting("cloze", "right when every likeliest token is the continuation's")
    prompt: Template = setting("{context}", "the context, with fields in braces")
    continuation: Template = setting("{continuation}", "what is scored, with fields in braces")


class GenerateConfig(SampledConfig, TaskConfig):
    """An answer that is generated and verified."""

    kind: Literal["generate"] = setting("generate", "generate an answer and verify it")
    prompt: Template = setting("{context}", "the question, with fields in braces")
    answers: list[str] = setting(
        default_factory=lambda: ["answer"],
        description="fields that hold right answers, a text or a list each; the first must be there",
        min_length=1,
    )
    target: Template | None = setting(None, "the answer of an example, with fields in braces; none: its first right one")
    verifier: Verifier = setting(default_factory=Exact, description="what is right: exact, contains, numeric or regex")


class TaskOptions(Config):
    """Settings of a call, which override those of a task. None: the task's own."""

    data: Path | None = setting(None, "folder of the tasks' data; none: beside the task file")
    shots: int | None = setting(None, "answered examples before each question", unit="examples", ge=0)
    limit: int | None = setting(None, "the first items only", unit="items", ge=1)
    samples: int | None = setting(None, "answers to each item, of tasks that generate", ge=1)
    seed: int | None = setting(None, "of the choice of examples and of samples")
    chat: bool | None = setting(None, "ask by the model's chat template")
    thinking_budget: int | None = setting(
        None, "tokens after which an answer's thinking is closed, of tasks that generate, with `chat`", unit="tokens", ge=0
    )
    system: str | None = setting(None, "system message, with `chat`")
