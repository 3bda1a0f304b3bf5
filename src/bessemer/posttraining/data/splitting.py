"""Training and held-out examples, split by their questions: one splitter for every stage.

Examples with similar openings lie on the same side, whatever their answers: else a second answer to a prompt, or the prompt
with another comma, could be held out although its like was learnt. Two openings are similar when they have the same words in
any order (3 + 4 lies with 4 + 3), and when they are near copies: a Jaccard similarity of 0.7 between their runs of three words,
as deduplication of text is done (Lee et al. 2022, "Deduplicating training data makes language models better"). Runs that many
openings have, as those of a template, do not count: what is asked differs between them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from bessemer.core.hashing import derive_seed, hash_value
from bessemer.data.text.word_rules import WORD
from bessemer.posttraining.data.formats import Answered, Turns
from bessemer.posttraining.data.picture_rows import has_pictures, sources_in

Example = TypeVar("Example")

#: Words of a run, and the fewest words of an opening that may be a near copy of another.
_RUN, _FEWEST = 3, 8
#: Words of an opening that are compared.
_MOST = 2000
_SIMILARITY = 0.7
#: A run in more openings than this number, or this share of all, belongs to a template.
_COMMON, _COMMON_SHARE = 10, 0.01
#: Most examples with similar openings that are held out together, where the share of all is smaller.
_TOGETHER = 10


def opening(turns: Turns) -> str:
    """The part of an example that is compared: the system message and the user's first message; of a text without roles all of
    it; of an example with pictures these alone, whatever is asked about them."""
    if isinstance(turns, str):
        return turns
    if has_pictures(turns):
        return "pictures " + " ".join(hash_value(source) for source in sources_in(turns))
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
    """Whether each opening is held out, by its hash or that of the first similar one.

    A group of similar openings with more examples than would be held out in all, such as conversations that begin with a
    greeting, is trained on.
    """
    keys = [opening_key(text) for text in openings]
    texts = dict(zip(keys, openings, strict=True))
    # in the order of keys, so that the split does not depend on the order of examples
    different = sorted(texts)
    first = dict(zip(different, _near_copies([_words(texts[key]) for key in different]), strict=True))
    groups = [first[key] for key in keys]
    sizes, most = Counter(groups), max(_TOGETHER, share * len(openings))
    is_held_out = {
        group: sizes[group] <= most and derive_seed(seed, "validation", different[group]) / 2**63 < share for group in sizes
    }
    return [is_held_out[group] for group in groups]


def opening_key(text: str) -> str:
    """Hash of an opening's words in alphabetical order; for an opening without words, of its text."""
    return hash_value(sorted(_words(text)) or text)


def _words(text: str) -> list[str]:
    return WORD.findall(text.casefold())


def _near_copies(openings: Sequence[list[str]]) -> list[int]:
    """For each opening the index of the first opening in its group of near copies; groups are transitive."""
    runs = [set(_runs(words[:_MOST])) if len(words) >= _FEWEST else set() for words in openings]
    counts = Counter(run for of_one in runs for run in of_one)
    most = max(_COMMON, _COMMON_SHARE * len(openings))
    sets = [{run for run in of_one if counts[run] <= most} for of_one in runs]
    # a union-find of its own, since that of deduplication needs numba, and tuning does not
    first = list(range(len(openings)))

    def root(number: int) -> int:
        while first[number] != number:
            first[number] = first[first[number]]
            number = first[number]
        return number

    with_run: dict[int, list[int]] = defaultdict(list)
    for number, own in enumerate(sets):
        # similar sets share one of their rarest runs (Bayardo et al. 2007, "Scaling up all pairs similarity search")
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
