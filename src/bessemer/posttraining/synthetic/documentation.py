"""Questions and answers from the documentation of functions, without a model: `made/docs_questions`, and the stage `honesty`.

Questions are for a function's purpose (the first sentence of its docstring), its signature, or its module. Names that occur
twice in their package are left out, so that each question has one answer; each document gives at most one question.

Honest pairs: the corpus answers a question for a function that a document documents, and none for a function that another
package has. Preferred is then "I don't know" to the answer of that other function, which is what a model that guesses would
say; and an answer that is there to "I don't know".
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bessemer.core.errors import SourceError
from bessemer.core.hashing import hash_bytes
from bessemer.data.corpus.reader import TRAIN, iterate_documents
from bessemer.posttraining.data.examples import Conversation
from bessemer.posttraining.data.made import DOCS_QUESTIONS, write_rows
from bessemer.posttraining.synthetic.config import HonestyConfig

#: Longest answer in characters, about 40 tokens, which a small model can reproduce.
LONGEST_ANSWER = 120
_SHORTEST_SUMMARY = 15
_SENTENCE_END = re.compile(r"(?<=[^.\s][.!?])\s")
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|etc|vs|cf|al)\.$")


def make_questions(documents: Path, split: str, count: int, seed: int) -> list[Conversation]:
    """At most `count` questions on the documents of a split, sampled by the seed; in sampling order."""
    names = Counter(qualified_name(metadata) for _, _, metadata in documented_functions(documents, split))
    draws = (
        (hash_bytes(str(seed).encode(), identifier.encode()), text, metadata)
        for identifier, text, metadata in documented_functions(documents, split)
        if names[qualified_name(metadata)] == 1
    )
    candidates = ((draw, pair) for draw, text, metadata in draws if (pair := question_of(draw, text, metadata)))
    drawn = heapq.nsmallest(count, candidates)
    return [
        Conversation.of(({"role": "user", "content": question}, {"role": "assistant", "content": answer}), DOCS_QUESTIONS)
        for _, (question, answer) in drawn
    ]


def has_question(documents: Path, split: str) -> bool:
    """Whether any document of a split gives a question."""
    return any(question_of("0" * 8, text, metadata) for _, text, metadata in documented_functions(documents, split))


def documented_functions(documents: Path, split: str | None) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(id, text, metadata) of the public functions, methods and classes among the documents of a split; None: of all splits."""
    for batch in iterate_documents(documents, ["id", "text", "metadata"], split):
        for row in batch.to_pylist():
            metadata = dict(row["metadata"] or ())
            qualname = metadata.get("qualname", "")
            if "package" in metadata and qualname and not any(part.startswith("_") for part in qualname.split(".")):
                yield row["id"], row["text"], metadata


def qualified_name(metadata: dict[str, str]) -> tuple[str, str]:
    """The package and the name in it, by which questions name a function."""
    return metadata["package"], metadata["qualname"]


def question_of(draw: str, text: str, metadata: dict[str, str]) -> tuple[str, str] | None:
    """One of the question–answer pairs of a document, chosen by the hash `draw`; None when it has none."""
    package, qualname = qualified_name(metadata)
    pairs = []
    if summary := first_sentence(text):
        pairs.append((f"What does `{qualname}` of {package} do?", summary))
    if signature := metadata.get("signature"):
        pairs.append((f"What is the signature of `{qualname}` of {package}?", f"Its signature is `{signature}`."))
    if module := metadata.get("module"):
        pairs.append((f"Which module of {package} defines `{qualname}`?", f"It is defined in `{module}`."))
    pairs = [(question, answer) for question, answer in pairs if len(answer) <= LONGEST_ANSWER]
    return pairs[int(draw[-8:], 16) % len(pairs)] if pairs else None


def first_sentence(text: str) -> str | None:
    """The first sentence of a docstring, on one line; None when it is too short, too long or not a plain sentence.

    text: a document of a documentation source: name and signature, an empty line, the docstring.
    """
    _, _, docstring = text.partition("\n\n")
    paragraph = " ".join(docstring.strip().partition("\n\n")[0].split())
    sentence = _SENTENCE_END.split(paragraph, maxsplit=1)[0]
    whole = sentence.endswith(".") and not _ABBREVIATION.search(sentence)
    plain = sentence[:1].isalpha() and sentence.isprintable() and "::" not in sentence
    return sentence if whole and plain and _SHORTEST_SUMMARY <= len(sentence) <= LONGEST_ANSWER else None


#: The file of pairs that `preference` and `reward` read.
HONESTY_FILE = "honesty.jsonl"
_DRAWS = 2**32


@dataclass(frozen=True, order=True)
class HonestPair:
    """A question with its right answer, or with the answer for another function. draw: hash by which pairs are sampled."""

    draw: str
    question: str
    answer: str
    is_known: bool

    def record(self, unsure: Sequence[str]) -> dict[str, Any]:
        """The pair as a row. unsure: phrases that say that something is unknown."""
        # use other digits than for the kind of question, or each kind would always have the same phrase
        ignorance = unsure[int(self.draw[16:24], 16) % len(unsure)]
        chosen, rejected = (self.answer, ignorance) if self.is_known else (ignorance, self.answer)
        prompt = [{"role": "user", "content": self.question}]
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "known": self.is_known}


def honesty(config: HonestyConfig, documents: Path, out: Path, *, seed: int) -> dict[str, Any]:
    """Write `honesty.jsonl` below `out`, pairs of documents to train on, in the order of their draws; return how many.

    Raises SourceError unless the documents document functions of at least two packages.
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
    # held-out documents are part of the corpus too
    names = Counter(qualified_name(metadata) for _, _, metadata in documented_functions(documents, None))
    packages = sorted({package for package, _ in names})
    for identifier, text, metadata in documented_functions(documents, TRAIN):
        if names[qualified_name(metadata)] > 1:
            continue
        draw = hash_bytes(b"honesty", str(seed).encode(), identifier.encode())
        is_known = int(draw[:8], 16) >= unknown_share * _DRAWS
        subject = metadata if is_known else _elsewhere(metadata, packages, names, draw)
        pair = None if subject is None else question_of(draw, text, subject)
        if pair is not None:
            yield HonestPair(draw, *pair, is_known)


def _elsewhere(
    metadata: dict[str, str], packages: Sequence[str], names: Counter[tuple[str, str]], draw: str
) -> dict[str, str] | None:
    """A function with the name of another package, drawn among the packages without a function of that name; None if all have
    one."""
    others = [package for package in packages if (package, metadata["qualname"]) not in names]
    return metadata | {"package": others[int(draw[8:16], 16) % len(others)]} if others else None
