"""Which principles a row is held to: drawn by their weights, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Mapping

from bessemer.core.policy import Principle
from bessemer.core.seeds import derive_seed


def drawn_principles(principles: Mapping[str, Principle], seed: int, row: int, count: int) -> list[str]:
    """Names of `count` principles for a row, by their weights, none twice before all have been drawn."""
    draw = random.Random(derive_seed(seed, "principles", row))
    drawn: list[str] = []
    left: list[str] = []
    for _ in range(count):
        left = left or list(principles)
        (name,) = draw.choices(left, [principles[one].weight for one in left])
        left.remove(name)
        drawn.append(name)
    return drawn
