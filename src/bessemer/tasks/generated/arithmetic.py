"""Arithmetic on whole numbers by difficulty: more digits, more terms, products, parentheses."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Literal, NamedTuple

from bessemer.core.hashing import hash_bytes
from bessemer.core.seeds import derive_seed
from bessemer.tasks.generated.item import GeneratedItem

#: Draws in a row that give nothing new, after which there is taken to be nothing new.
_MOST_REPEATS = 1_000


class Difficulty(NamedTuple):
    """Numbers of up to `digits` digits, `terms` of them, joined by `operators` of `+-*`; perhaps pairs in parentheses."""

    digits: int
    terms: int
    operators: str
    parentheses: bool = False


#: From sums of single digits to what asks for several steps.
LEVELS = (
    Difficulty(1, 2, "+-"),
    Difficulty(2, 2, "+-"),
    Difficulty(2, 2, "*"),
    Difficulty(3, 3, "+-"),
    Difficulty(2, 3, "+-*"),
    Difficulty(3, 2, "*"),
    Difficulty(2, 3, "+-*", parentheses=True),
    Difficulty(3, 5, "+-*", parentheses=True),
)


#: Items to train on, the others, or both.
Part = Literal["all", "train", "held_out"]

#: One in eight expressions is held out.
_HELD_OUT = 8


class _Factor(NamedTuple):
    text: str
    value: int


def is_held_out(expression: str) -> bool:
    """Whether an expression is one of those that no training sees, whatever the seed. Expressions of the same numbers and
    operators are on one side, so that 3 + 4 says nothing about 4 + 3."""
    words = sorted(re.findall(r"\d+|[-+*]", expression))
    return int(hash_bytes(" ".join(words).encode())[:8], 16) % _HELD_OUT == 0


def arithmetic_items(count: int, *, seed: int, difficulty: Difficulty | int, part: Part = "all") -> list[GeneratedItem]:
    """Different items `EXPRESSION =` and their values; products come before sums. More of them begin with the same ones.

    difficulty: a level from 1 to 8, or what makes one. Raises ValueError for another level, digits below 1, fewer than 2 terms,
    operators that are not of `+-*`, and where there are fewer different items.
    """
    if isinstance(difficulty, int):
        if not 1 <= difficulty <= len(LEVELS):
            raise ValueError(f"levels of difficulty are 1 to {len(LEVELS)}, not {difficulty}")
        difficulty = LEVELS[difficulty - 1]
    if difficulty.digits < 1 or difficulty.terms < 2 or not difficulty.operators or set(difficulty.operators) - set("+-*"):
        raise ValueError(f"an item has numbers of at least 1 digit, at least 2 terms, and operators of +-*, not {difficulty}")
    generator = random.Random(derive_seed(seed, "arithmetic", *difficulty))
    wanted = _WANTED[part]
    made: dict[str, GeneratedItem | None] = {}
    left, repeats = count, 0
    while left:
        expression = _expression(generator, difficulty)
        if expression.text in made:
            repeats += 1
            if repeats == _MOST_REPEATS:
                raise ValueError(f"{difficulty} has fewer than {count:,} different items")
            continue
        repeats = 0
        is_wanted = wanted(expression.text)
        made[expression.text] = GeneratedItem(f"{expression.text} =", str(expression.value)) if is_wanted else None
        left -= is_wanted
    return [item for item in made.values() if item is not None]


_WANTED: dict[Part, Callable[[str], bool]] = {
    "all": lambda text: True,
    "train": lambda text: not is_held_out(text),
    "held_out": is_held_out,
}


def _expression(generator: random.Random, difficulty: Difficulty) -> _Factor:
    factors: list[_Factor] = []
    left = difficulty.terms
    # a pair in parentheses is one factor, and never all of the expression
    while left:
        paired = difficulty.parentheses and left >= 2 and left + len(factors) > 2 and generator.random() < 0.5
        numbers = [_number(generator, difficulty.digits) for _ in range(2 if paired else 1)]
        factor = _joined(generator, difficulty.operators, numbers)
        factors.append(_Factor(f"({factor.text})", factor.value) if paired else factor)
        left -= len(numbers)
    return _joined(generator, difficulty.operators, factors)


def _number(generator: random.Random, digits: int) -> _Factor:
    value = generator.randrange(10**digits)
    return _Factor(str(value), value)


def _joined(generator: random.Random, operators: str, factors: list[_Factor]) -> _Factor:
    text, summands = factors[0].text, [factors[0].value]
    for factor in factors[1:]:
        operator = generator.choice(operators)
        text += f" {operator} {factor.text}"
        if operator == "*":
            summands[-1] *= factor.value
        else:
            summands.append(factor.value if operator == "+" else -factor.value)
    return _Factor(text, sum(summands))
