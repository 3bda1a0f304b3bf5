"""A conversation that is longer than the context, answered by retrieving from itself (`context_overflow: retrieve`).

The long texts that users and tools have put into the conversation are cut into passages as documents are (`chunks.py`). Those
with the words of the question stay, the best by BM25, as many as the context holds, in their order; `[…]` stands for what is
left out. The question is the user's last message. Where that holds a long text, the question is its first and last paragraphs,
or the one of these with a question mark, and stays.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from bessemer.assistant.messages import Message
from bessemer.retrieval.chunks import cut_document
from bessemer.retrieval.terms import words_of_text
from bessemer.retrieval.word_index import bm25_scores

#: What stands for passages that are left out.
OMITTED = "[…]"
#: Characters of a passage, above which a text is long, and the most of a paragraph that may be the question.
LONG_TEXT, _QUESTION = 800, 1000
_MARK = re.compile("[?？؟]")


class TextPassage(NamedTuple):
    """A passage and the headings above it. may_ask: whether it may be the question."""

    headings: tuple[str, ...]
    text: str
    may_ask: bool = False


class Place(NamedTuple):
    """A part of a message."""

    message: int
    part: int


@dataclass(frozen=True)
class Shortened:
    """A conversation that fits. omitted: characters that were left out."""

    messages: list[Message]
    omitted: int


def retrieved_from_itself(messages: Sequence[Message], fits: Callable[[Sequence[Message]], bool]) -> Shortened:
    """The conversation with as many passages of its long texts as fit; as it is where it fits, or where it has no such text.

    fits: whether a conversation leaves room for the answer; if one does, so does one with less text. Where not even the
    question does, no passage is left, and the result is as long as it is.
    """
    if fits(messages):
        return Shortened(list(messages), 0)
    texts = {
        Place(number, place): passages_of_text(part.text)
        for number, message in enumerate(messages)
        if message.role in ("user", "tool")
        for place, part in enumerate(message.parts)
        if part.origin != "system" and len(part.text) > LONG_TEXT
    }
    question, always = asking_passages(messages, texts)
    every = [(place, number) for place, passages in texts.items() for number in range(len(passages))]
    shown = ["\n".join([*texts[place][number].headings, texts[place][number].text]) for place, number in every]
    order = [every[row] for row in np.argsort(-bm25_scores(question, shown), kind="stable") if every[row] not in always]

    def with_passages(count: int) -> list[Message]:
        kept: dict[Place, list[int]] = {place: [] for place in texts}
        for place, number in sorted([*always, *order[:count]]):
            kept[place].append(number)
        return with_texts(messages, {place: _joined(texts[place], numbers) for place, numbers in kept.items()})

    count = bisect_left(range(1, len(order) + 1), True, key=lambda count: not fits(with_passages(count)))
    shortened = with_passages(count)
    before, after = (sum(len(message.text) for message in each) for each in (messages, shortened))
    return Shortened(shortened, max(0, before - after))


def asking_passages(
    messages: Sequence[Message], texts: Mapping[Place, Sequence[TextPassage]]
) -> tuple[str, list[tuple[Place, int]]]:
    """The words of the question, each once, and the passages of long texts that are it, or a part of it."""
    asked = max((number for number, message in enumerate(messages) if message.role == "user"), default=-1)
    asking: list[tuple[Place, int]] = []
    for place, passages in texts.items():
        if place.message == asked:
            ends = [number for number in sorted({0, len(passages) - 1}) if passages[number].may_ask]
            marked = [number for number in ends if _MARK.search(passages[number].text)]
            asking += [(place, number) for number in marked or ends]
    beside = [
        part.text for place, part in enumerate(messages[asked].parts if asked >= 0 else ()) if Place(asked, place) not in texts
    ]
    question = "\n".join([*beside, *(texts[place][number].text for place, number in asking)])
    return " ".join(dict.fromkeys(words_of_text(question))), asking


def passages_of_text(text: str, longest: int = LONG_TEXT) -> list[TextPassage]:
    """The passages of a text; paragraphs at its beginning and its end that may be a question are passages of their own."""
    text = text.encode(errors="replace").decode().strip()
    end = text.find("\n\n")
    first = end if 0 < end <= _QUESTION else 0
    start = text.rfind("\n") + 1
    last = start if first < start and len(text) - start <= _QUESTION else len(text)
    passages = [TextPassage((), text[:first], may_ask=True)] if first else []
    chunks = cut_document(text[first:last], longest=longest, overlap=0)
    passages += [TextPassage(chunk.headings, "\n".join(filter(None, (chunk.table_header, chunk.text)))) for chunk in chunks]
    return [*passages, TextPassage((), text[last:], may_ask=True)] if last < len(text) else passages


def _joined(passages: Sequence[TextPassage], kept: Sequence[int]) -> str:
    """Passages below their headings, and what stands for the others."""
    parts: list[str] = []
    before = -1
    headings: tuple[str, ...] = ()
    for number in kept:
        passage = passages[number]
        if number != before + 1:
            parts.append(OMITTED)
        if passage.headings and passage.headings != headings:
            parts.append(f"# {' › '.join(passage.headings)}")
        parts.append(passage.text)
        before, headings = number, passage.headings
    return "\n\n".join([*parts, *([OMITTED] if before != len(passages) - 1 else [])])


def with_texts(messages: Sequence[Message], texts: Mapping[Place, str]) -> list[Message]:
    """The conversation with other texts at some places."""
    return [
        replace(
            message,
            parts=tuple(
                replace(part, text=texts.get(Place(number, place), part.text)) for place, part in enumerate(message.parts)
            ),
        )
        for number, message in enumerate(messages)
    ]
