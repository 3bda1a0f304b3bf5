"""Pairs of honest and dishonest answers from documentation of functions.

The corpus answers a question for a function that a document documents, and none for a function that another package has.
Preferred is then "I don't know" to the answer of that other function, which is what a model that guesses would say; and an
answer that is there to "I don't know".
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.core.errors import SourceError
from bessemer.core.hashing import hash_bytes
from bessemer.data.corpus.reader import TRAIN
from bessemer.posttraining.finished_rows import write_rows
from bessemer.posttraining.honesty.config import HonestyConfig
from bessemer.posttraining.questions import documented_functions, qualified_name, question_of

#: The file of pairs that `preference` and `reward` read.
HONESTY_FILE = "honesty.jsonl"
_DRAWS = 2**32


@dataclass(frozen=True, order=True)
class HonestPair:
    """A question with an answer, which is right or of another function. draw: hash by which pairs are sampled."""

    draw: str
    question: str
    answer: str
    is_known: bool

    def record(self, unsure: Sequence[str]) -> dict[str, Any]:
        """The pair as a row. unsure: what is said where nothing is known."""
        # not by the digits that drew the question: each kind of question would have one phrase
        ignorance = unsure[int(self.draw[16:24], 16) % len(unsure)]
        chosen, rejected = (self.answer, ignorance) if self.is_known else (ignorance, self.answer)
        prompt = [{"role": "user", "content": self.question}]
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "known": self.is_known}


def honesty(config: HonestyConfig, documents: Path, out: Path, *, seed: int) -> dict[str, Any]:
    """Write `honesty.jsonl` below `out`, pairs of documents to train on, in the order of their draws; return how many.

    Raises SourceError where the documents are no documentation of functions of at least two packages.
    """
    wanted = round(config.pairs * config.unknown_share)
    pairs = list(_pairs(documents, config.unknown_share, seed))
    unknown = heapq.nsmallest(wanted, (pair for pair in pairs if not pair.is_known))
    known = heapq.nsmallest(config.pairs - wanted, (pair for pair in pairs if pair.is_known))
    if not unknown or not known:
        raise SourceError(
            f"{documents}: it gives {len(known):,} questions that it answers and {len(unknown):,} that it does not; both need "
            "documentation of functions of several packages, as the sources wheels and python_docs give it"
        )
    write_rows(out / HONESTY_FILE, [pair.record(config.unsure) for pair in sorted([*unknown, *known])])
    return {"pairs": len(unknown) + len(known), "known": len(known), "unknown": len(unknown)}


def _pairs(documents: Path, unknown_share: float, seed: int) -> Iterator[HonestPair]:
    """At most one pair of each document, of a function whose name is alone in its package."""
    # those held out are in the corpus too
    names = Counter(qualified_name(metadata) for _, _, metadata in documented_functions(documents, None))
    packages = sorted({package for package, _ in names})
    for identifier, text, metadata in documented_functions(documents, TRAIN):
        if names[qualified_name(metadata)] > 1:
            continue
        draw = hash_bytes(b"honesty", str(seed).encode(), identifier.encode())
        is_known = int(draw[:8], 16) >= unknown_share * _DRAWS
        asked = metadata if is_known else _elsewhere(metadata, packages, names, draw)
        found = None if asked is None else question_of(draw, text, asked)
        if found is not None:
            yield HonestPair(draw, *found, is_known)


def _elsewhere(
    metadata: dict[str, str], packages: Sequence[str], names: Counter[tuple[str, str]], draw: str
) -> dict[str, str] | None:
    """A function as if another package had it, drawn among those that have none of its name; None where all have one."""
    others = [package for package in packages if (package, metadata["qualname"]) not in names]
    return metadata | {"package": others[int(draw[8:16], 16) % len(others)]} if others else None
