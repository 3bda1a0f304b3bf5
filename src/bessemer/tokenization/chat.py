r"""The ChatML template: a conversation as text, as segments, and as token ids.

A conversation is `<|endoftext|>`, then per message `<|im_start|>ROLE\nCONTENT<|im_end|>\n`. It is rendered as
segments, of which only the template's own may hold control tokens: `<|im_end|>` typed by a user is text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bessemer.core.errors import RequestError
from bessemer.tokenization.special import END_OF_TEXT, IM_END, IM_START, SPECIAL_TOKENS

#: What `transformers`, vLLM and llama.cpp render; `chatml_segments` is the same, in segments.
CHATML = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

#: The template of each name, as it is stored in the tokenizer's folder.
CHAT_TEMPLATES = {"chatml": CHATML}

ROLES = ("system", "user", "assistant")

_CONTROL = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")


@dataclass(frozen=True)
class Segment:
    """A stretch of a rendered conversation. Only in the template's own do control tokens mean anything."""

    text: str
    is_template: bool
    role: str | None


def check_encodable(text: str) -> None:
    """Raise RequestError for a lone surrogate: half a UTF-16 pair, which is no character and has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which is not valid "
            "Unicode; remove it or decode the text again"
        ) from None


def chatml_segments(messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> list[Segment]:
    """The conversation in segments; joined, their texts are what `CHATML` renders.

    The segment that closes an assistant's message (`<|im_end|>`) carries the role `assistant`, other template
    segments carry none. Raises RequestError for a message that is not {"role": …, "content": text}.
    """
    if not messages:
        raise RequestError("a conversation needs at least one message")
    segments = [Segment(END_OF_TEXT, True, None)]
    for index, message in enumerate(messages):
        role, content = _checked(message, index)
        segments.append(Segment(f"{IM_START}{role}\n", True, None))
        segments.append(Segment(content, False, role))
        segments.append(Segment(IM_END, True, role if role == "assistant" else None))
        segments.append(Segment("\n", True, None))
    if add_generation_prompt:
        segments.append(Segment(f"{IM_START}assistant\n", True, None))
    return segments


def _checked(message: Mapping[str, str], index: int) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RequestError(f"message {index}: the role must be one of {', '.join(ROLES)}, got {role!r}")
    if not isinstance(content, str):
        raise RequestError(f"message {index}: the content must be text, got {type(content).__name__}")
    try:
        check_encodable(content)
    except RequestError as error:
        raise RequestError(f"message {index}: {error}") from None
    return role, content


@dataclass(frozen=True)
class Run:
    """A control token, or a maximal stretch of ordinary text between two of them.

    `assistant_from`: where, in bytes of the text's UTF-8, the assistant's own words begin; None when it has none here.
    """

    text: str
    is_control: bool
    assistant_from: int | None


def runs(segments: Sequence[Segment]) -> list[Run]:
    r"""Segments cut at the template's control tokens and joined between them.

    Text of the template and of a message that touch (`user\n` and the content) are one run, because the tokenizer
    sees them as one: a content that begins with a line break shares a token with the template's.
    """
    found: list[Run] = []
    text, assistant_from = "", None
    for segment in segments:
        for piece in _CONTROL.split(segment.text) if segment.is_template else [segment.text]:
            if segment.is_template and piece in SPECIAL_TOKENS:
                if text:
                    found.append(Run(text, False, assistant_from))
                found.append(Run(piece, True, 0 if segment.role == "assistant" else None))
                text, assistant_from = "", None
                continue
            if segment.role == "assistant" and piece:
                assistant_from = len(text.encode())
            text += piece
    if text:
        found.append(Run(text, False, assistant_from))
    return found
