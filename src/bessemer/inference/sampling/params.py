"""Sampling parameters of a request; stop strings, at the first of which a completion's text is cut. Imports no torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import cache
from typing import Annotated, Any, Literal, Self
from weakref import WeakValueDictionary

from pydantic import Field, field_serializer, field_validator, model_validator

from bessemer.core.config import Config, setting
from bessemer.core.usercode import is_user_function

TokenId = Annotated[int, Field(ge=0)]

#: The fields that constrain the text, of which a request may set one.
GRAMMARS = ("json_schema", "regex", "choice", "ebnf")
#: Fields that depend on the tokens before, which beams do not keep apart.
_HISTORY = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logits_processor", "logprobs", "stop", *GRAMMARS)


class Mark(Enum):
    """What a field of `SamplingParams` means elsewhere; a field carries its marks in its annotation."""

    #: The sampler on the device computes it (`device_sampler.py`); a request that changes another is sampled on the host.
    DEVICE = auto()
    #: No sampler reads it: when an answer ends, how many there are, the prompt's log-probabilities, beams.
    UNREAD = auto()
    #: It shapes what tokens are drawn from, or how many are: beam search, which draws none, refuses it.
    DRAWS = auto()
    #: Clients of the server may set it under its own name, within its own limits, with nothing said in `protocol.py`.
    SERVED = auto()


class WatermarkConfig(Config):
    """A mark that sampling leaves in a text, found with the key (`watermark.py`)."""

    method: Literal["gumbel", "green"] = setting(
        "gumbel",
        "gumbel: the key takes the place of chance, and the distribution stays; green: tokens of a keyed list are favoured, "
        "also at temperature 0",
    )
    key: str = setting(description="secret that marks a text and finds the mark", min_length=16, repr=False)
    context_width: int = setting(
        4, "tokens before a token that its numbers depend on: more are harder to guess, and an edit breaks more", ge=1, le=32
    )
    greenlist_ratio: float = setting(0.25, "green: share γ of the vocabulary that is favoured", gt=0, lt=1)
    bias: float = setting(2.0, "green: what is added to the favoured logits, δ", gt=0, le=20)


class SamplingParams(Config):
    """How one request's tokens are chosen and when they end."""

    max_tokens: Annotated[int, Mark.UNREAD] = setting(
        256, "most new tokens; fewer where the context ends; 0: the prompt is read, and nothing is made", unit="tokens", ge=0
    )
    min_tokens: Annotated[int, Mark.DEVICE] = setting(
        0, "new tokens before which no end token may come and no stop text is looked for", unit="tokens", ge=0
    )
    temperature: Annotated[float, Mark.DEVICE] = setting(
        1.0, "divides the logits; below 0.00001 the likeliest token is taken every time", ge=0, allow_inf_nan=False
    )
    top_k: Annotated[int, Mark.DEVICE, Mark.DRAWS] = setting(
        0, "sample from the k likeliest tokens; 0: from all", unit="tokens", ge=0
    )
    top_p: Annotated[float, Mark.DEVICE, Mark.DRAWS] = setting(
        1.0, "sample from the likeliest tokens that together reach this probability", gt=0, le=1
    )
    min_p: Annotated[float, Mark.DEVICE, Mark.DRAWS, Mark.SERVED] = setting(
        0.0, "leave out tokens less likely than this share of the likeliest one's probability", ge=0, le=1
    )
    typical_p: Annotated[float, Mark.DRAWS, Mark.SERVED] = setting(
        1.0, "sample from the tokens nearest to the expected surprise that together reach this probability", gt=0, le=1
    )
    repetition_penalty: Annotated[float, Mark.DEVICE, Mark.SERVED] = setting(
        1.0, "divides the positive logits of tokens in prompt and answer, multiplies the negative", gt=0, allow_inf_nan=False
    )
    presence_penalty: Annotated[float, Mark.DEVICE, Mark.SERVED] = setting(
        0.0, "subtracted from the logits of tokens in the answer", ge=-2, le=2
    )
    frequency_penalty: Annotated[float, Mark.DEVICE, Mark.SERVED] = setting(
        0.0, "subtracted from the logits of tokens in the answer, once for each time they are there", ge=-2, le=2
    )
    logit_bias: Annotated[dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Mark.DEVICE] = setting(
        default_factory=dict, description="added to the logits of tokens, by token id"
    )
    allowed_tokens: Annotated[Annotated[list[TokenId], Field(min_length=1)] | None, Mark.DEVICE] = setting(
        None, "the only tokens that may be chosen, by id; none: all"
    )
    banned_tokens: Annotated[list[TokenId], Mark.DEVICE] = setting(
        default_factory=list, description="tokens that are never chosen, by id"
    )
    logits_processor: Any = setting(
        None,
        "your own change of the logits: a function of (prompt tokens, answer tokens, logits) that returns logits, "
        "or `file.py:function`",
    )
    watermark: Annotated[WatermarkConfig | None, Mark.DRAWS] = setting(
        None, "leave a mark that is found with its key; none: none"
    )
    seed: Annotated[int | None, Mark.DEVICE] = setting(None, "the same seed gives the same text; none: another text every time")
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], Mark.UNREAD] = setting(
        default_factory=list, description="texts before which the answer ends"
    )
    include_stop: Annotated[bool, Mark.UNREAD] = setting(False, "keep the stop text at the end of the answer")
    stop_token_ids: Annotated[list[TokenId], Mark.DEVICE] = setting(
        default_factory=list, description="tokens at which the answer ends, by id"
    )
    ignore_eos: Annotated[bool, Mark.UNREAD, Mark.SERVED] = setting(False, "go on after the end token, to measure speed")
    n: Annotated[int, Mark.UNREAD] = setting(1, "answers to one prompt", ge=1)
    best_of: Annotated[int | None, Mark.UNREAD, Mark.DRAWS] = setting(
        None, "answers that are made, of which the n likeliest are given; none: n", ge=1
    )
    logprobs: int | None = setting(
        None, "log-probability of each token of the answer, beside those of the k likeliest; none: none", unit="tokens", ge=0
    )
    logprobs_mode: Annotated[Literal["raw", "temperature", "sampled"], Mark.UNREAD] = setting(
        "raw",
        "distribution of `logprobs`: the model's own; at the temperature, after biases and penalties; or what is sampled from, "
        "truncated and renormalised",
    )
    prompt_logprobs: Annotated[int | None, Mark.UNREAD] = setting(
        None, "log-probability of each token of the prompt, beside those of the k likeliest; none: none", unit="tokens", ge=0
    )
    beam_width: Annotated[int, Mark.UNREAD] = setting(0, "beams of a beam search; 0: none", ge=0)
    length_penalty: Annotated[float, Mark.UNREAD] = setting(
        1.0, "beams are ranked by log-probability / length ** this; above 0 favours long answers", allow_inf_nan=False
    )
    json_schema: dict[str, Any] | str | None = setting(None, "the answer is JSON that fits this schema")
    regex: str | None = setting(None, "the answer matches this regular expression as a whole")
    choice: Annotated[list[str], Field(min_length=1)] | None = setting(None, "the answer is one of these texts")
    ebnf: str | None = setting(None, "the answer fits this context-free grammar, in Lark's notation")

    @field_validator("logits_processor", mode="before")
    @classmethod
    def _is_a_function(cls, value: Any) -> Callable[..., Any] | str | None:
        if value is None or callable(value) or (isinstance(value, str) and is_user_function(value)):
            return value
        raise ValueError("must be a function, or one of a file as file.py:function")

    @field_serializer("logits_processor", when_used="json")
    def _name_of_the_function(self, value: Callable[..., Any] | str | None) -> str | None:
        return value if isinstance(value, str) else None

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens}); lower it")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of ({self.best_of}) is below n ({self.n}); raise it or leave it out")
        if self.best_of is not None and not self.max_tokens:
            raise ValueError("best_of ranks answers, and max_tokens is 0; leave out best_of, or ask for a token")
        if self.allowed_tokens is not None and set(self.allowed_tokens) <= set(self.banned_tokens):
            raise ValueError("banned_tokens holds every one of allowed_tokens, so no token is left; allow another")
        if self.watermark is not None and not self.beam_width and not self.can_carry(self.watermark):
            raise ValueError("watermark: gumbel marks what is drawn, and temperature 0 draws nothing; take method green")
        grammars = [name for name in GRAMMARS if getattr(self, name) is not None]
        if len(grammars) > 1:
            raise ValueError(f"{' and '.join(grammars)} cannot be asked together; send one of them")
        if self.beam_width:
            self._fit_beams()
        return self

    def _fit_beams(self) -> None:
        if not self.max_tokens:
            raise ValueError("beam search makes tokens, and max_tokens is 0; leave out beam_width, or ask for a token")
        if self.n > self.beam_width:
            raise ValueError(f"n ({self.n}) is above beam_width ({self.beam_width}); raise beam_width")
        if self.temperature not in (0, 1):
            raise ValueError(f"beam search draws nothing: leave out temperature ({self.temperature}) or beam_width")
        changed = self.changed_settings
        for name in (*marked(Mark.DRAWS), *_HISTORY):
            if name in changed:
                raise ValueError(f"beam search does not take {name}; leave out {name} or beam_width")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken. Logits divided by less would lose their order in float32."""
        return self.temperature < 1e-5

    def can_carry(self, mark: WatermarkConfig) -> bool:
        """Whether a mark can be left in what these settings choose: not in beams, nor gumbel's where nothing is drawn."""
        return not self.beam_width and not (self.greedy and mark.method == "gumbel")

    @property
    def wants_sampler_log_probs(self) -> bool:
        """Whether log-probabilities are asked for that are not the model's own."""
        return self.logprobs is not None and self.logprobs_mode != "raw"

    @property
    def changed_settings(self) -> frozenset[str]:
        """The settings that differ from their defaults."""
        return frozenset(name for name, default in _defaults(type(self)) if getattr(self, name) != default)

    @property
    def grammar(self) -> tuple[Literal["json_schema", "regex", "choice", "ebnf"], Any] | None:
        """The one grammar that is asked, with its name."""
        return next(((name, value) for name in GRAMMARS if (value := getattr(self, name)) is not None), None)  # type: ignore[return-value]


@cache
def _defaults(kind: type[SamplingParams]) -> list[tuple[str, Any]]:
    return [(name, field.get_default(call_default_factory=True)) for name, field in kind.model_fields.items()]


@cache
def marked(mark: Mark) -> tuple[str, ...]:
    """The fields of `SamplingParams` with a mark, in their order."""
    return tuple(name for name, field in SamplingParams.model_fields.items() if mark in field.metadata)


class StopStrings:
    """Passes text on, holding back only what could still become a stop string.

    The text ends before the stop string that is complete first, or behind it with `include`, however it is cut into chunks.
    What is fed with `search=False` completes none: of a stop string, the end has to come later. A character costs the same
    however many stop strings there are, and however long.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._automaton = _automaton_of(tuple(stops)) if stops else None
        self._include = include
        self._held = ""
        self._state = 0
        self.found = False
        #: The stop string that ended the text.
        self.matched = ""

    def feed(self, text: str, *, search: bool = True) -> str:
        """The text that may be shown now. Once `found`, nothing more is. search: whether a stop string may end in this text."""
        if self.found or self._automaton is None:
            return "" if self.found else text
        held, automaton, state = self._held + text, self._automaton, self._state
        for end, character in enumerate(text, len(self._held) + 1):
            state = automaton.next_state(state, character)
            if search and (length := automaton.ended[state]):
                self.found, self._held = True, ""
                self.matched = held[end - length : end]
                return held[: end if self._include else end - length]
            state = automaton.open_state[state]
        self._state = state
        shown = len(held) - automaton.depth[state]
        self._held = held[shown:]
        return held[:shown]

    def flush(self) -> str:
        """The text held back, at the end."""
        rest, self._held = self._held, ""
        return rest


class _StopAutomaton:
    """The automaton of Aho and Corasick (1975): its state is the longest end of a text that begins a stop string.

    ended: by state, the length of the longest stop string that is complete, 0 for none. open_state: by state, that of the
    longest end that is no whole stop string, or begins another. depth: by state, the length of that end.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._edges: dict[tuple[int, str], int] = {}
        self.depth, self.ended = [0], [0]
        has_longer = [False]
        for stop in stops:
            state = 0
            for character in stop:
                has_longer[state] = True
                if (following := self._edges.get((state, character))) is None:
                    following = self._edges[state, character] = len(self.depth)
                    self.depth.append(self.depth[state] + 1)
                    self.ended.append(0)
                    has_longer.append(False)
                state = following
            self.ended[state] = len(stop)
        children: dict[int, list[tuple[str, int]]] = {}
        for (state, character), following in self._edges.items():
            children.setdefault(state, []).append((character, following))
        #: The state of the longest shorter end.
        self._shorter = [0] * len(self.depth)
        self.open_state = list(range(len(self.depth)))
        # breadth first: a state needs the shorter ones computed
        queue = deque([0])
        while queue:
            state = queue.popleft()
            for character, following in children.get(state, ()):
                self._shorter[following] = self.next_state(self._shorter[state], character) if state else 0
                queue.append(following)
            if state:
                self.ended[state] = self.ended[state] or self.ended[self._shorter[state]]
                if not has_longer[state]:
                    self.open_state[state] = self.open_state[self._shorter[state]]

    def next_state(self, state: int, character: str) -> int:
        """The state behind one more character."""
        while (following := self._edges.get((state, character))) is None and state:
            state = self._shorter[state]
        return following or 0


#: Automata in use: completions of one prompt share one.
_automata: WeakValueDictionary[tuple[str, ...], _StopAutomaton] = WeakValueDictionary()


def _automaton_of(stops: tuple[str, ...]) -> _StopAutomaton:
    automaton = _automata.get(stops)
    if automaton is None:
        automaton = _automata[stops] = _StopAutomaton(stops)
    return automaton


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length])), 0)
