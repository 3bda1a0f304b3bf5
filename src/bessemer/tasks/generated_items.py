"""Items made from a seed: arithmetic by difficulty, and retrieval and variable tracking in long texts.

Arithmetic on whole numbers has more digits, more terms, products and parentheses by difficulty. Needle in a haystack: one fact
in a long text (Kamradt 2023; with others like it: RULER, Hsieh et al. 2024, section 3.1). Variable tracking: a value passed on
through assignments scattered over a text (RULER, section 3.2). RULER asks for the names of all variables that hold a value;
here the question is the value of the last, so that an answer is one number.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Literal, NamedTuple

from bessemer.core.hashing import derive_seed, hash_bytes


class GeneratedItem(NamedTuple):
    """A prompt, and the one right answer to it: a number in digits."""

    prompt: str
    answer: str


#: Draws in a row without a new item after which none is left.
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
Split = Literal["all", "train", "held_out"]

#: One in eight expressions is held out.
_HELD_OUT = 8


class _Factor(NamedTuple):
    text: str
    value: int


def is_held_out(expression: str) -> bool:
    """Whether an expression is held out of all training, whatever the seed.

    It depends on the numbers and operators, not on their order: training on 3 + 4 teaches 4 + 3.
    """
    words = sorted(re.findall(r"\d+|[-+*]", expression))
    return int(hash_bytes(" ".join(words).encode())[:8], 16) % _HELD_OUT == 0


def arithmetic_items(count: int, *, seed: int, difficulty: Difficulty | int, part: Split = "all") -> list[GeneratedItem]:
    """Different items `EXPRESSION =` and their values; products come before sums. A larger count begins with the same items.

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


_WANTED: dict[Split, Callable[[str], bool]] = {
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

    sentences: filler, repeated in order from a random one on; None: plain sentences are made. Statements of one depth stay in
    their order. Raises ValueError where not even the statements fit, and for sentences without a word.
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
    # a tokenizer may need more tokens for the whole than for its sentences
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
    return [_needle_item(seed, number, length, depth, needles, measure, sentences) for number in range(count)]


def _needle_item(
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
    return [_variable_tracking_item(seed, number, length, hops, chains, measure, sentences) for number in range(count)]


def _variable_tracking_item(
    seed: int, number: int, length: int, hops: int, chains: int, measure: Measure, sentences: Sequence[str] | None
) -> GeneratedItem:
    generator = random.Random(derive_seed(seed, "variable tracking", number))
    names = iter(_names(generator, chains * (hops + 1)))
    values = generator.sample(range(10_000, 100_000), chains)
    statements: list[Statement] = []
    variable = ""
    for chain, value in enumerate(values):
        depths = sorted(generator.random() for _ in range(hops + 1))
        name = next(names)
        statements.append(Statement(depths[0], f"VAR {name} = {value}."))
        for depth in depths[1:]:
            previous, name = name, next(names)
            statements.append(Statement(depth, f"VAR {name} = VAR {previous}."))
        if chain == 0:
            variable = name
    statements.sort(key=lambda statement: statement.depth)

    def frame(text: str) -> str:
        return f"{text}\n\nQuestion: What is the value of VAR {variable}?\nAnswer:"

    prompt = build_prompt(statements, frame, length=length, generator=generator, measure=measure, sentences=sentences)
    return GeneratedItem(prompt, str(values[0]))


def _names(generator: random.Random, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(generator.choices(string.ascii_uppercase, k=_NAME_LETTERS))] = None
    return list(names)
