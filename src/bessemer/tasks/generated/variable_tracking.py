"""Variable tracking: a value passed on through assignments scattered over a text (RULER, Hsieh et al. 2024, section 3.2).

RULER asks for the names of all variables that hold a value. Here the value of the last is asked for, so that an answer is one
number.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence

from bessemer.core.seeds import derive_seed
from bessemer.tasks.generated.haystack import Measure, Statement, build_prompt, count_words
from bessemer.tasks.generated.item import GeneratedItem

_NAME_LETTERS = 5


def variable_tracking_items(
    count: int,
    *,
    seed: int,
    length: int,
    hops: int = 4,
    chains: int = 1,
    measure: Measure = count_words,
    sentences: Sequence[str] | None = None,
) -> list[GeneratedItem]:
    """Items that ask for the value of a variable. An item depends on the seed, its number and the settings alone.

    length: most of a whole prompt, by `measure`. hops: assignments from a variable to the next, 0 for none. chains: how many
    there are, each with a value of its own; one is asked for. sentences: of the text around.

    Raises ValueError for a length that is too short, less than 0 hops and less than one chain.
    """
    if hops < 0 or chains < 1:
        raise ValueError(f"there are at least 0 hops and 1 chain, not {hops} and {chains}")
    return [_item(seed, number, length, hops, chains, measure, sentences) for number in range(count)]


def _item(
    seed: int, number: int, length: int, hops: int, chains: int, measure: Measure, sentences: Sequence[str] | None
) -> GeneratedItem:
    generator = random.Random(derive_seed(seed, "variable tracking", number))
    names = iter(_names(generator, chains * (hops + 1)))
    values = generator.sample(range(10_000, 100_000), chains)
    statements: list[Statement] = []
    asked = ""
    for chain, value in enumerate(values):
        depths = sorted(generator.random() for _ in range(hops + 1))
        name = next(names)
        statements.append(Statement(depths[0], f"VAR {name} = {value}."))
        for depth in depths[1:]:
            previous, name = name, next(names)
            statements.append(Statement(depth, f"VAR {name} = VAR {previous}."))
        if chain == 0:
            asked = name
    statements.sort(key=lambda statement: statement.depth)

    def frame(text: str) -> str:
        return f"{text}\n\nQuestion: What is the value of VAR {asked}?\nAnswer:"

    prompt = build_prompt(statements, frame, length=length, generator=generator, measure=measure, sentences=sentences)
    return GeneratedItem(prompt, str(values[0]))


def _names(generator: random.Random, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(generator.choices(string.ascii_uppercase, k=_NAME_LETTERS))] = None
    return list(names)
