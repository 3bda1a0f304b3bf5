"""Control tokens: their names and ids, and their provenance in a rendered conversation.

`<|endoftext|>` both begins and ends a document: a document is `[<|endoftext|>] + ids`, and the next one's ends it. The control
tokens of the chat template, those for fill-in-the-middle and the reserved ones take the last ids of the vocabulary.

In a rendered conversation nothing tells an `<|im_end|>` that the template wrote from one in a message. So the messages are
escaped before rendering: wherever a string holds a control token, or could become part of one (it ends as one begins, begins as
one ends, or lies inside one), a character is replaced by a stand-in, which occurs nowhere else. After rendering, every control
token is the template's own, and the stand-ins are replaced by their characters again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from bessemer.core.errors import RequestError

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
START_HEADER = "<|start_header_id|>"
END_HEADER = "<|end_header_id|>"
END_OF_TURN = "<|eot_id|>"

#: The control tokens of each chat template, in the order of their ids.
TEMPLATE_TOKENS: dict[str, tuple[str, ...]] = {
    "chatml": (END_OF_TEXT, IM_START, IM_END),
    "llama3": (END_OF_TEXT, START_HEADER, END_HEADER, END_OF_TURN),
    "plain": (END_OF_TEXT,),
}

#: ChatML's, the default.
SPECIAL_TOKENS = TEMPLATE_TOKENS["chatml"]

#: Tokens that end a speaker's turn: generation stops at them.
TURN_ENDS = (IM_END, END_OF_TURN)


#: Control tokens for fill-in-the-middle (prefix, suffix, middle) as published models spell them: Qwen2.5-Coder's, which new
#: tokenizers get, and StarCoder's.
FILL_IN_THE_MIDDLE_SPELLINGS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)


def control_tokens(chat_template: str, reserved: int = 0, fill_in_the_middle: bool = False) -> tuple[str, ...]:
    """All control tokens of a new tokenizer in the order of their ids: the template's, those for fill-in-the-middle if
    wanted, then `reserved` free slots."""
    middle = FILL_IN_THE_MIDDLE_SPELLINGS[0] if fill_in_the_middle else ()
    return TEMPLATE_TOKENS[chat_template] + middle + tuple(f"<|reserved_{slot}|>" for slot in range(reserved))


#: Words of the protocol, never escaped: templates compare with them and may build control tokens from them.
_PROTOCOL_WORDS = frozenset(
    {"system", "user", "assistant", "tool", "text", "image"}
    | {"function", "object", "array", "string", "number", "integer", "boolean", "null"}
)


def _candidates() -> Iterator[str]:
    """Characters that no text should hold: Unicode's noncharacters, then a thousand for private use."""
    noncharacters = chain(range(0xFDD0, 0xFDF0), *((plane << 16 | 0xFFFE, plane << 16 | 0xFFFF) for plane in range(1, 17)))
    return map(chr, chain(noncharacters, range(0xF0000, 0xF0400)))


class StandIns:
    """Stand-ins for characters: characters that do not occur in `text`, one for each character replaced."""

    def __init__(self, text: str) -> None:
        self._free = (char for char in _candidates() if char not in text and _json_escaped(char)[1:] not in text)
        self._for: dict[str, str] = {}

    def free(self) -> str:
        """An unused character that stands for none. Raises RequestError when there are no more."""
        char = next(self._free, None)
        if char is None:
            raise RequestError("the conversation holds more than a thousand of Unicode's noncharacters and private characters")
        return char

    def of(self, char: str) -> str:
        """The stand-in of a character."""
        if char not in self._for:
            self._for[char] = self.free()
        return self._for[char]

    def put_back(self, text: str) -> str:
        """The text with every stand-in replaced by its character, also where JSON escaped it."""
        if "\\u" in text:
            for char, stand_in in self._for.items():
                text = text.replace(_json_escaped(stand_in), _json_escaped(char))
        return text.translate({ord(stand_in): char for char, stand_in in self._for.items()})


def _json_escaped(char: str) -> str:
    return json.dumps(char)[1:-1]


class ControlTokens:
    """The control tokens of a tokenizer, and the parts of them that strings can hold."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = tuple(sorted({token for token in tokens if token}, key=lambda token: (-len(token), token)))
        self._longest = max(map(len, self.tokens), default=0)
        pattern = "|".join(map(re.escape, self.tokens)) or "(?!)"
        #: Finds the tokens in a text, of two that begin at one place the longer, as tokenizers do.
        self.pattern = re.compile(pattern)
        # a template may change the case of a string
        self._typed = re.compile(pattern, re.IGNORECASE)
        lowered = [token.lower() for token in self.tokens]
        self._beginnings = {token[:end] for token in lowered for end in range(1, len(token))}
        self._endings = {token[start:] for token in lowered for start in range(1, len(token))}
        self._insides = {
            token[start:end] for token in lowered for start in range(1, len(token)) for end in range(start + 1, len(token))
        }
        edges = "|".join(sorted({re.escape(char) for token in self.tokens for char in (token[0], token[-1])}))
        self._edges = re.compile(edges or "(?!)", re.IGNORECASE)

    def escaped(self, text: str, stand_ins: StandIns) -> str:
        """The string with a character replaced in every part that could belong to a control token."""
        return _replaced(text, self._places(text), stand_ins)

    def fully_escaped(self, text: str, stand_ins: StandIns) -> str:
        """The string without any character that begins or ends a control token: safe whatever a template does with it."""
        if text in _PROTOCOL_WORDS:
            return text
        places = self._places(text) | {match.start() for match in self._edges.finditer(text)}
        return _replaced(text, places, stand_ins)

    def escaped_key(self, text: str, stand_ins: StandIns) -> str:
        """As `escaped` for a key of an object. A key that is an identifier changes only where it holds a whole control token:
        templates look it up by name."""
        places = self._whole(text) if text.isidentifier() else self._places(text)
        return _replaced(text, places, stand_ins)

    def _whole(self, text: str) -> set[int]:
        """Where control tokens begin in a string, overlapping ones too."""
        places: set[int] = set()
        match = self._typed.search(text)
        while match:
            places.add(match.start())
            match = self._typed.search(text, match.start() + 1)
        return places

    def _places(self, text: str) -> set[int]:
        if text in _PROTOCOL_WORDS:
            return set()
        places = self._whole(text)
        # a template may trim a string
        inner = (len(text) - len(text.lstrip()), len(text.rstrip()))
        for start, end in {(0, len(text)), inner}:
            length = end - start
            for part in range(1, min(self._longest, length + 1)):
                if text[end - part : end].lower() in self._beginnings:
                    places.add(end - part)
                if text[start : start + part].lower() in self._endings:
                    places.add(start + part - 1)
            if length < self._longest and text[start:end].lower() in self._insides:
                places.add(start)
        return places


def _replaced(text: str, places: set[int], stand_ins: StandIns) -> str:
    if not places:
        return text
    chars = list(text)
    for place in places:
        chars[place] = stand_ins.of(chars[place])
    return "".join(chars)


def strings_of(value: Any) -> Iterator[str]:
    """All strings in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_of(item)


def map_strings(value: Any, change: Callable[[str], str], change_key: Callable[[str], str]) -> Any:
    """A JSON value with its strings changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change_key(key): map_strings(item, change, change_key) for key, item in value.items()}
    if isinstance(value, list):
        return [map_strings(item, change, change_key) for item in value]
    return value


def split_at(text: str, pattern: re.Pattern[str], marks: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """The text in pieces (never empty), with whether each is a control token; marks are pieces of their own."""
    cut = re.compile(f"({pattern.pattern}|{'|'.join(map(re.escape, marks))})")
    for number, piece in enumerate(cut.split(text)):
        if piece:
            yield piece, number % 2 == 1 and piece not in marks
