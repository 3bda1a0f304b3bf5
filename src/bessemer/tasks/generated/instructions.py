"""Requests with constraints on the form of the answer, drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from bessemer.core.seeds import derive_seed

Settings = Mapping[str, Any]

_REQUESTS = (
    "Explain why the sky is blue.",
    "Describe how bread is made.",
    "Tell a story about a lighthouse keeper.",
    "Give advice to someone who moves to a new city.",
    "Explain what a library is to a child.",
    "Describe a walk through a forest in autumn.",
    "Say how a bicycle stays upright.",
    "Recommend a way to learn a language.",
    "Explain how a letter travels from sender to reader.",
    "Describe the work of a baker before sunrise.",
    "Say what makes a good neighbour.",
    "Explain why people keep diaries.",
    "Describe a market in a small town.",
    "Tell how rivers shape the land.",
    "Explain what happens when water boils.",
    "Describe a train journey at night.",
)
_WORDS = ("always", "bright", "common", "early", "morning", "quiet", "simple", "small", "water", "world")

#: Kinds that can be asked for together: of each group at most one, since those of a group contradict each other.
_GROUPS: tuple[tuple[Callable[[random.Random], Settings], ...], ...] = (
    (
        lambda draw: {"kind": "words", "at_most": draw.choice((30, 50, 80))},
        lambda draw: {"kind": "words", "at_least": draw.choice((20, 40, 60))},
        lambda draw: {"kind": "sentences", "at_least": 1, "at_most": draw.choice((2, 3, 4))},
    ),
    (
        lambda draw: {"kind": "bullets", "at_least": (count := draw.choice((2, 3, 4))), "at_most": count},
        lambda draw: {"kind": "numbered_items", "at_least": (count := draw.choice((2, 3, 4))), "at_most": count},
        lambda draw: {"kind": "paragraphs", "at_least": (count := draw.choice((2, 3))), "at_most": count},
    ),
    (
        lambda draw: {"kind": "upper_case"},
        lambda draw: {"kind": "lower_case"},
    ),
    (
        lambda draw: {"kind": "required_words", "words": draw.sample(_WORDS, 2)},
        lambda draw: {"kind": "word_frequency", "word": draw.choice(_WORDS), "at_least": draw.choice((2, 3))},
        lambda draw: {"kind": "forbidden_words", "words": ["the", draw.choice(_WORDS)]},
    ),
    (lambda draw: {"kind": "no_commas"},),
    (
        lambda draw: {"kind": "ends_with", "text": draw.choice(("That is all", "Good luck"))},
        lambda draw: {"kind": "quoted"},
    ),
    (
        lambda draw: {"kind": "title"},
        lambda draw: {"kind": "starts_with", "text": draw.choice(("Here is my answer", "Let us begin"))},
    ),
    (
        lambda draw: {"kind": "placeholders", "at_least": draw.choice((1, 2))},
        lambda draw: {"kind": "highlights", "at_least": draw.choice((1, 2))},
    ),
)
#: Whole answers inside quotation marks, or that begin with given words, hold neither a title before nor words after them.
_EXCLUDED = frozenset({frozenset({"quoted", "title"}), frozenset({"quoted", "starts_with"})})
_MOST_CONSTRAINTS = 3


def instruction_items(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Rows `{prompt, constraints}` with one to three constraints that do not contradict each other.

    A row depends on the seed and its number alone, so more of them begin with the same ones.
    """
    return [_item(random.Random(derive_seed(seed, "instructions", number))) for number in range(count)]


def _item(draw: random.Random) -> dict[str, Any]:
    request = draw.choice(_REQUESTS)
    wanted = draw.randint(1, _MOST_CONSTRAINTS)
    chosen: list[dict[str, Any]] = []
    for group in draw.sample(_GROUPS, len(_GROUPS)):
        one = dict(draw.choice(group)(draw))
        if len(chosen) < wanted and not any(frozenset({one["kind"], other["kind"]}) in _EXCLUDED for other in chosen):
            chosen.append(one)
    return {"prompt": request, "constraints": chosen}
