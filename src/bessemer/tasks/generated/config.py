"""Settings of the kinds of task whose items are made by a seed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bessemer.core.config import setting
from bessemer.tasks.config import SampledConfig
from bessemer.tasks.generated.arithmetic import LEVELS, Part
from bessemer.tasks.generated.needle import MOST_NEEDLES


class GeneratedConfig(SampledConfig):
    """What the kinds of task whose items are made have: items of several levels, one of each asked in turn."""

    items: int = setting(50, "items of each level", unit="items", ge=1)
    max_tokens: int = setting(32, "longest answer", unit="tokens", ge=1)
    stop: list[Annotated[str, Field(min_length=1)]] = setting(
        default_factory=lambda: ["\n"], description="texts before which an answer ends; with `chat` a turn's end does"
    )


class ArithmeticConfig(GeneratedConfig):
    """Arithmetic on whole numbers, by difficulty; the answer is the last number that a model writes."""

    kind: Literal["arithmetic"] = setting("arithmetic", "expressions whose value is asked for")
    levels: list[Annotated[int, Field(ge=1, le=len(LEVELS))]] = setting(
        default_factory=lambda: list(range(1, len(LEVELS) + 1)),
        description="difficulties, from sums of single digits (1) to five terms with products and parentheses (8)",
        min_length=1,
    )
    operators: str | None = setting(
        None, "only these of `+-*`, whatever the difficulty; none: those of each difficulty", pattern=r"^[-+*]+$"
    )
    part: Part = setting(
        "all",
        "train: without one in eight expressions, by their numbers and operators, whatever the seed; held_out: these alone",
    )
    shots: int = setting(0, "answered examples of the same difficulty before each question", unit="examples", ge=0)
    example_delimiter: str = setting("\n", "text between description, examples and question")


class LengthConfig(GeneratedConfig):
    """What tasks at growing lengths have."""

    lengths: list[Annotated[int, Field(ge=32)]] = setting(
        default_factory=lambda: [256, 512, 1024, 2048, 4096, 8192, 16384, 32768],
        description="most tokens of a prompt, begin token and chat template included; the model's tokenizer counts. A length "
        "that does not leave `max_tokens` of the model's context is left out",
        min_length=1,
    )


class NeedleConfig(LengthConfig):
    """A number that stands somewhere in a long text (Kamradt 2023)."""

    kind: Literal["needle"] = setting("needle", "find a number in a long text")
    needles: int = setting(1, "numbers in the text, of which one is asked for", ge=1, le=MOST_NEEDLES)
    depth: float | None = setting(None, "where the number stands, 0 first … 1 last; none: anywhere", ge=0, le=1)


class VariableTrackingConfig(LengthConfig):
    """The value of a variable through assignments scattered over a long text (RULER, Hsieh et al. 2024)."""

    kind: Literal["variable_tracking"] = setting("variable_tracking", "follow assignments through a long text")
    hops: int = setting(4, "assignments from a variable to the next", ge=0)
    chains: int = setting(1, "chains of assignments, of which one is asked for", ge=1)
