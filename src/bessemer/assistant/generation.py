"""What a turn asks of a model, and what comes of it step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bessemer.assistant.events import BadCall
from bessemer.assistant.json_calls import ParsedCall
from bessemer.inference.sampling.params import SamplingParams


@dataclass(frozen=True, eq=False)
class Generation:
    """A completion that a turn needs.

    token_ids: the prompt of a model of this machine. messages, tools: the same in the form of chat completions, for an API.
    """

    token_ids: Sequence[int]
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    params: SamplingParams


@dataclass(frozen=True)
class Delta:
    """What a step adds: tokens, of a model of this machine; or text, thinking and calls, of an API.

    log_probs: of each token; None where they are not known. weight_version: of the weights that the tokens were sampled with.
    """

    token_ids: Sequence[int] = ()
    log_probs: Sequence[float] | None = None
    weight_version: int = 0
    text: str = ""
    thinking: str = ""
    calls: Sequence[ParsedCall | BadCall] = ()
    finish_reason: str | None = None
