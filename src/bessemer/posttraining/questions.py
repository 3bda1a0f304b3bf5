"""The data set `made/docs_questions`: questions and answers derived from documentation, without a model.

They ask for a function's purpose (the first sentence of its docstring), its signature, or its module. Names that occur twice in
their package are left out, so that each question has one answer; each document gives at most one question.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bessemer.core.hashing import hash_bytes
from bessemer.data.corpus.reader import iterate_documents
from bessemer.posttraining.config import DOCS_QUESTIONS
from bessemer.posttraining.conversations import Conversation

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
    """(id, text, metadata) of the public functions, methods and classes among the documents of a split, or of all."""
    for batch in iterate_documents(documents, ["id", "text", "metadata"], split):
        for row in batch.to_pylist():
            metadata = dict(row["metadata"] or ())
            qualname = metadata.get("qualname", "")
            if "package" in metadata and qualname and not any(part.startswith("_") for part in qualname.split(".")):
                yield row["id"], row["text"], metadata


def qualified_name(metadata: dict[str, str]) -> tuple[str, str]:
    """Package and name in it, by which a function is asked for."""
    return metadata["package"], metadata["qualname"]


def question_of(draw: str, text: str, metadata: dict[str, str]) -> tuple[str, str] | None:
    """One of the question–answer pairs of a document, chosen by its draw; None when it has none."""
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
