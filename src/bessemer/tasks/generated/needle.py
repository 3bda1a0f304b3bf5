"""Needle in a haystack: one fact in a long text (Kamradt 2023; with others like it: RULER, Hsieh et al. 2024, section 3.1)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from bessemer.core.seeds import derive_seed
from bessemer.tasks.generated.haystack import Measure, Statement, build_prompt, count_words
from bessemer.tasks.generated.item import GeneratedItem

_COLOURS = ("amber", "azure", "crimson", "ebony", "golden", "ivory", "jade", "scarlet", "silver", "violet")
_ANIMALS = ("badger", "crane", "dolphin", "falcon", "heron", "lynx", "otter", "raven", "salmon", "walrus")
MOST_NEEDLES = len(_COLOURS) * len(_ANIMALS)


def needle_items(
    count: int,
    *,
    seed: int,
    length: int,
    depth: float | None = None,
    needles: int = 1,
    measure: Measure = count_words,
    sentences: Sequence[str] | None = None,
) -> list[GeneratedItem]:
    """Items that ask for one of some secret numbers in a text. An item depends on the seed, its number and the settings alone.

    length: most of a whole prompt, by `measure`. depth: where the number stands, 0 first … 1 last; None: anywhere. needles: how
    many secret numbers there are, at most 100; those that are not asked for stand anywhere. sentences: of the text around.

    Raises ValueError for a length that is too short, a depth outside 0 … 1 and other numbers of needles.
    """
    if not 1 <= needles <= MOST_NEEDLES:
        raise ValueError(f"a text has 1 to {MOST_NEEDLES} needles, not {needles}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"a depth lies from 0 to 1, not {depth}")
    return [_item(seed, number, length, depth, needles, measure, sentences) for number in range(count)]


def _item(
    seed: int, number: int, length: int, depth: float | None, needles: int, measure: Measure, sentences: Sequence[str] | None
) -> GeneratedItem:
    generator = random.Random(derive_seed(seed, "needle", number))
    keys = generator.sample([f"{colour} {animal}" for colour in _COLOURS for animal in _ANIMALS], needles)
    values = generator.sample(range(1_000_000, 10_000_000), needles)
    depths = [generator.random() for _ in keys]
    if depth is not None:
        depths[0] = depth
    statements = [
        Statement(place, f"The secret number of the {key} is {value}.")
        for place, key, value in zip(depths, keys, values, strict=True)
    ]

    def frame(text: str) -> str:
        return f"{text}\n\nQuestion: What is the secret number of the {keys[0]}?\nAnswer:"

    prompt = build_prompt(statements, frame, length=length, generator=generator, measure=measure, sentences=sentences)
    return GeneratedItem(prompt, str(values[0]))
