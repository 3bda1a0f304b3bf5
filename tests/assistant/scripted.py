"""A model that writes what it is told to, and what is read of its turns."""

from __future__ import annotations

import re
from collections.abc import Iterable

from bessemer.assistant.generation import Delta
from bessemer.assistant.messages import Event, TextDelta, ThinkingDelta
from bessemer.assistant.tools import Tool


class ScriptedModel:
    """Writes the texts, or token ids, one after the other, a token a delta, each ended by an end token, by a stop token that is
    asked, or cut at max_tokens.

    A token's log-probability is minus its id. asked: what was generated.
    """

    def __init__(self, tokenizer, *texts, context_length=4096):
        self.tokenizer, self.context_length = tokenizer, context_length
        self.texts, self.asked = list(texts), []

    def stream(self, generation):
        self.asked.append(generation)
        text = self.texts.pop(0)
        ids = self.tokenizer.encode(text, add_bos=False) if isinstance(text, str) else text
        ids = [*ids, self.tokenizer.control_id("<|im_end|>")]
        stops = (place for place, id in enumerate(ids, start=1) if id in generation.params.stop_token_ids)
        ids = ids[: next(stops, len(ids))]
        made = ids[: generation.params.max_tokens]
        for place, id in enumerate(made):
            is_last = place == len(made) - 1
            reason = ("stop" if len(made) == len(ids) else "length") if is_last else None
            yield Delta([id], [-float(id)], weight_version=7, finish_reason=reason)


class OneTextModel(ScriptedModel):
    """Writes one text, and goes on in it where it was cut, as a model does that has its mind made up."""

    def __init__(self, tokenizer, ids):
        super().__init__(tokenizer)
        self.left = list(ids)

    def stream(self, generation):
        self.texts = [self.left]
        for delta in super().stream(generation):
            self.left = self.left[len(delta.token_ids) :]
            yield delta


def spelled(tokenizer, text: str) -> list[int]:
    """The tokens of a text whose control tokens are themselves."""
    ids = []
    for piece in re.split(r"(<\|[a-z_]+\|>)", text):
        control = tokenizer.control_id(piece)
        ids += tokenizer.encode(piece, add_bos=False) if control is None else [control]
    return ids


def joined(events: Iterable[Event]) -> list[Event]:
    """Events with neighbouring deltas of a kind as one."""
    whole = []
    for event in events:
        last = whole[-1] if whole else None
        if isinstance(event, ThinkingDelta | TextDelta) and type(last) is type(event):
            whole[-1] = type(event)(last.text + event.text)
        else:
            whole.append(event)
    return whole


def call_text(name: str, arguments: str) -> str:
    """A call as Hermes models write it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
WEATHER = Tool("weather", "The weather of a city.", CITY, lambda city: {"city": city, "degrees": 21})
