"""Training and held-out examples, split by what is asked: one splitter for every stage.

Examples that open alike lie on the same side, whatever their answers: with two answers to a prompt, or the prompt typed once
more with another comma, a held-out loss would be that of what was learnt. Two openings are alike when they have the same words
in any order (3 + 4 lies with 4 + 3), and when they are near copies: a Jaccard similarity of 0.7 between their runs of three
words, as deduplication of text is done (Lee et al. 2022, "Deduplicating training data makes language models better"). Runs that
many openings have, as those of a template, do not count: what is asked differs between them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from bessemer.core.hashing import derive_seed, hash_value
from bessemer.data.text.word_rules import WORD
from bessemer.posttraining.data.formats import Answered, Turns

Example = TypeVar("Example")

#: Words of a run, and the fewest words of an opening that may be a near copy: shorter ones differ by what they ask.
_RUN, _FEWEST = 3, 8
#: Words of an opening that are compared.
_MOST = 2000
_SIMILARITY = 0.7
#: Runs that more openings have are a template's: this many, or this share of all.
_COMMON, _COMMON_SHARE = 10, 0.01
#: Examples that open alike and may be held out together, where the share of all is smaller.
_TOGETHER = 10


def opening(turns: Turns) -> str:
    """What an example is told apart by: the system message and the first that the user says; a text without roles is whole."""
    if isinstance(turns, str):
        return turns
    said = [str(turn.get("content") or "") for turn in turns if turn["role"] == "system"]
    first = next((turn for turn in turns if turn["role"] == "user"), turns[0] if turns else {})
    return "\n".join([*said, str(first.get("content") or "")])


def opening_of(answered: Answered) -> str:
    """The opening of a prompt with its answer, or of a conversation."""
    return opening(answered.prompt or answered.answer)


def split_examples(
    examples: Sequence[Example], opening_of: Callable[[Example], str], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(training, held out), in order: about `share` of the different openings are held out."""
    training: list[Example] = []
    held_out: list[Example] = []
    sides = are_held_out([opening_of(example) for example in examples], share, seed)
    for example, is_held_out in zip(examples, sides, strict=True):
        (held_out if is_held_out else training).append(example)
    return training, held_out


def are_held_out(openings: Sequence[str], share: float, seed: int) -> list[bool]:
    """Of each opening whether it is held out, by a hash of it or of the first that it is like.

    More examples that open alike than would be held out in all, as conversations that begin with a greeting, are trained on.
    """
    keys = [opening_key(text) for text in openings]
    texts = dict(zip(keys, openings, strict=True))
    # in the order of the keys, so that the side does not depend on the examples' order
    different = sorted(texts)
    first = dict(zip(different, _near_copies([_words(texts[key]) for key in different]), strict=True))
    groups = [first[key] for key in keys]
    sizes, most = Counter(groups), max(_TOGETHER, share * len(openings))
    is_held_out = {
        group: sizes[group] <= most and derive_seed(seed, "validation", different[group]) / 2**63 < share for group in sizes
    }
    return [is_held_out[group] for group in groups]


def opening_key(text: str) -> str:
    """Hash of an opening's words in alphabetical order; of one without words, of the text."""
    return hash_value(sorted(_words(text)) or text)


def _words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def _near_copies(openings: Sequence[list[str]]) -> list[int]:
    """Of each opening the number of the first one of those that it is a near copy of, through others too."""
    runs = [set(_runs(words[:_MOST])) if len(words) >= _FEWEST else set() for words in openings]
    counts = Counter(run for of_one in runs for run in of_one)
    most = max(_COMMON, _COMMON_SHARE * len(openings))
    sets = [{run for run in of_one if counts[run] <= most} for of_one in runs]
    # union-find of few numbers: that of deduplication is compiled by a package that tuning does not need
    first = list(range(len(openings)))

    def root(number: int) -> int:
        while first[number] != number:
            first[number] = first[first[number]]
            number = first[number]
        return number

    with_run: dict[int, list[int]] = defaultdict(list)
    for number, own in enumerate(sets):
        # sets that are alike share one of their rarest runs (Bayardo et al. 2007, "Scaling up all pairs similarity search")
        rarest = sorted(own, key=lambda run: (counts[run], run))[: int(len(own) * (1 - _SIMILARITY)) + 1]
        shared = [run for run in rarest if counts[run] > 1]
        for other in {other for run in shared for other in with_run[run]}:
            common = len(own & sets[other])
            if common >= _SIMILARITY * (len(own) + len(sets[other]) - common):
                one, another = sorted((root(other), root(number)))
                first[another] = one
        for run in shared:
            with_run[run].append(number)
    return [root(number) for number in range(len(openings))]


def _runs(words: Sequence[str]) -> Iterator[int]:
    return (hash(tuple(words[place : place + _RUN])) for place in range(len(words) - _RUN + 1))
