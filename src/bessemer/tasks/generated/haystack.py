"""Texts of a given length with a few statements among many sentences that have nothing to do with them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

#: The size of a text, in the unit that lengths are given in: words, or a tokenizer's tokens.
Measure = Callable[[str], int]

_PEOPLE = ("baker", "carpenter", "farmer", "gardener", "miller", "nurse", "painter", "pilot", "sailor", "tailor", "teacher")
_DEEDS = ("borrowed", "carried", "cleaned", "counted", "found", "mended", "moved", "painted", "sold", "weighed")
_KINDS = ("broken", "clean", "heavy", "little", "narrow", "old", "plain", "round", "small", "wooden")
_THINGS = ("barrel", "basket", "bench", "bottle", "bucket", "chair", "hammer", "ladder", "lamp", "table", "wheel")
_PLACES = ("behind the barn", "beside the road", "by the river", "in the kitchen", "near the station", "under the bridge")
_TIMES = ("after the rain", "at noon", "before breakfast", "in the evening", "on a quiet morning", "when winter came")


class Statement(NamedTuple):
    """A sentence that the answer depends on, and where it stands: 0 at the beginning of the text, 1 at its end."""

    depth: float
    sentence: str


def count_words(text: str) -> int:
    """Runs of letters, digits and underscores: a measure that needs no tokenizer."""
    return len(re.findall(r"\w+", text))


def build_prompt(
    statements: Sequence[Statement],
    frame: Callable[[str], str],
    *,
    length: int,
    generator: random.Random,
    measure: Measure = count_words,
    sentences: Sequence[str] | None = None,
) -> str:
    """`frame` around a text of statements among other sentences, as long as fits in `length`, by `measure`.

    sentences: to fill the text with, in their order from a random one on, around and around; without them plain ones are made.
    Statements of one depth stay in their order. Raises ValueError where not even the statements fit, and for sentences
    without a word.
    """
    if sentences is not None and not any(measure(sentence) > 0 for sentence in sentences):
        raise ValueError("the sentences to fill a text with are empty")
    filler = _made(generator) if sentences is None else _around(sentences, generator)
    room = length - measure(frame(_text([], statements)))
    if room < 0:
        raise ValueError(f"a length of {length:,} does not hold the question and its statements; {length - room:,} does")
    chosen: list[str] = []
    for sentence in filler:
        room -= measure(f" {sentence}")
        if room < 0:
            break
        chosen.append(sentence)
    # a tokenizer may need more for the whole than for its sentences
    while measure(prompt := frame(_text(chosen, statements))) > length:
        chosen.pop()
    return prompt


def _text(sentences: Sequence[str], statements: Sequence[Statement]) -> str:
    placed = [(round(statement.depth * len(sentences)), statement.sentence) for statement in statements]
    parts: list[str] = []
    for index in range(len(sentences) + 1):
        parts += [sentence for place, sentence in placed if place == index]
        parts += sentences[index : index + 1]
    return " ".join(parts)


def _made(generator: random.Random) -> Iterator[str]:
    while True:
        person, deed, kind, thing, place, time = map(generator.choice, (_PEOPLE, _DEEDS, _KINDS, _THINGS, _PLACES, _TIMES))
        yield f"The {person} {deed} the {kind} {thing} {place} {time}."


def _around(sentences: Sequence[str], generator: random.Random) -> Iterator[str]:
    for index in count(generator.randrange(len(sentences))):
        yield sentences[index % len(sentences)]
