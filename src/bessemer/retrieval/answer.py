"""Answers from an index: sources within a budget, citations of these sources only, and a check of each sentence against them.

While the model writes, a regular expression over the answer lets only the number of a source follow `[`, so that a citation
always names a source that was given. Afterwards every sentence is compared with the sources that it cites: the share
of its content words that they have. Sentences below a limit are marked. Text between quotation marks is looked for in the
sources, and comes back with its place in the document.

What was retrieved is data: it stands in the user's message, numbers in brackets in it are no citations, and control tokens in
it are text to the tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from bessemer.inference.engine import Engine
from bessemer.inference.sampling.params import SamplingParams
from bessemer.retrieval.chunks import sentences
from bessemer.retrieval.index import OpenIndex
from bessemer.retrieval.search import Hit, search
from bessemer.retrieval.store import EVERYTHING, PLAIN_WORDS, Filter, Passage

SYSTEM = (
    "Answer the question from the numbered sources alone. Behind each statement cite its source as [1]. "
    "If the sources do not hold the answer, say that they do not."
)
NOT_HELD = "The documents do not answer this."
#: Share of a sentence's content words that its sources must have.
SUPPORT = 0.5
_CITATION = re.compile(r"\[(\d+)\]")
_QUOTED = re.compile(r"“([^“”]{8,})”|\"([^\"]{8,})\"")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Statement:
    """A sentence of an answer. cited: numbers of its sources, from 1. support: share of its content words in them, or, where it
    cites none, in any; None for a sentence without content words."""

    text: str
    cited: tuple[int, ...]
    support: float | None

    @property
    def is_supported(self) -> bool:
        return self.support is None or self.support >= SUPPORT


@dataclass(frozen=True)
class Quote:
    """A quoted text that a source has. start, end: bytes in the document."""

    text: str
    source: int
    start: int
    end: int


@dataclass(frozen=True)
class Answer:
    """sources: in the order of their numbers. is_held: whether the documents hold an answer, as far as the search can tell."""

    text: str
    sources: Sequence[Hit]
    statements: Sequence[Statement] = ()
    quotes: Sequence[Quote] = ()
    is_held: bool = True

    @property
    def cited(self) -> list[int]:
        """The numbers of the sources that are cited, in order of the first citation."""
        return list(dict.fromkeys(number for one in self.statements for number in one.cited))


class Judge(Protocol):
    """Says whether hits answer a question."""

    def holds(self, question: str, hits: Sequence[Hit]) -> bool: ...


@dataclass(frozen=True)
class NearestJudge:
    """Judges that the documents hold an answer where the nearest passage's cosine is above a limit, which is fitted on
    questions with and without an answer (`calibrated_limit`). Without vectors it says so of every question: BM25's scores have
    no scale."""

    limit: float

    def holds(self, question: str, hits: Sequence[Hit]) -> bool:
        cosines = [hit.scores["meaning"] for hit in hits if "meaning" in hit.scores]
        return not cosines or max(cosines) >= self.limit


def calibrated_limit(held: Iterable[float], not_held: Iterable[float]) -> float:
    """The limit that best separates the best cosines of questions with an answer from those of questions without: the sum of
    both kinds' shares of mistakes is smallest."""
    yes, no = sorted(held), sorted(not_held)
    candidates = sorted({*yes, *no})
    mistakes = {
        limit: sum(value < limit for value in yes) / len(yes) + sum(value >= limit for value in no) / len(no)
        for limit in candidates
    }
    best = min(mistakes.values())
    return min(limit for limit, share in mistakes.items() if share == best)


def ask(
    engine: Engine,
    index: OpenIndex,
    question: str,
    *,
    count: int = 5,
    where: Filter = EVERYTHING,
    judge: Judge | None = None,
    params: SamplingParams | None = None,
) -> Answer:
    """Answer a question from an index. count: sources at most; fewer where the context holds no more.

    judge: refuses questions that the documents do not answer; None: the model alone decides. Raises RequestError as `search`.
    """
    hits = search(index, question, count, where=where)
    if not hits or (judge is not None and not judge.holds(question, hits)):
        return Answer(NOT_HELD, hits, is_held=False)
    params = params or SamplingParams(max_tokens=256, temperature=0)
    messages, used = prompt_of(engine, question, hits, params.max_tokens)
    held = params.with_changes(regex=citing(len(used)))
    completion = engine.chat(messages, held)
    return checked(completion.text.strip(), used)


def citing(count: int) -> str:
    """A regular expression for texts in which brackets hold only the numbers 1 to `count`."""
    numbers = "|".join(str(number) for number in range(1, count + 1))
    return rf"([^\[\]]|\[({numbers})\])*"


def prompt_of(engine: Engine, question: str, hits: Sequence[Hit], answer_tokens: int) -> tuple[list[dict[str, str]], list[Hit]]:
    """The conversation, and the sources that it holds: the first ones that leave room for the answer, at least one."""
    for number in range(len(hits), 0, -1):
        used = list(hits[:number])
        messages = conversation(question, [hit.passage for hit in used])
        tokens = len(engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True))
        if number == 1 or tokens + answer_tokens <= engine.longest:
            return messages, used
    raise AssertionError("there is at least one hit")


def conversation(question: str, sources: Sequence[Passage]) -> list[dict[str, str]]:
    """The messages that show numbered sources to a model, and ask it."""
    shown = "\n\n".join(f"[{place}] {_harmless(passage.shown)}" for place, passage in enumerate(sources, start=1))
    return [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"Sources:\n\n{shown}\n\nQuestion: {question}"},
    ]


def _harmless(text: str) -> str:
    """A source's text with its numbers in brackets changed, so that none looks like a citation."""
    return _CITATION.sub(r"(\1)", text)


def checked(text: str, sources: Sequence[Hit]) -> Answer:
    """An answer with the support of each sentence by the sources, and its quotes."""
    words = [set(_content_words(hit.passage.shown)) for hit in sources]
    everything = set().union(*words)
    statements = []
    for span in sentences(text):
        sentence = text[span.start : span.end].strip()
        if not sentence:
            continue
        cited = tuple(dict.fromkeys(int(number) for number in _CITATION.findall(sentence) if 0 < int(number) <= len(sources)))
        own = _content_words(_CITATION.sub("", sentence))
        known = set().union(*(words[number - 1] for number in cited)) if cited else everything
        support = sum(word in known for word in own) / len(own) if own else None
        statements.append(Statement(sentence, cited, support))
    return Answer(text, sources, statements, list(_quotes(text, sources)))


def _content_words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text.lower()) if word not in PLAIN_WORDS]


def _quotes(text: str, sources: Sequence[Hit]) -> Iterator[Quote]:
    """The quotes in an answer that a source holds word for word."""
    for match in _QUOTED.finditer(text):
        quoted = match[1] or match[2]
        for number, hit in enumerate(sources, start=1):
            place = hit.passage.text.find(quoted)
            if place >= 0:
                start = hit.passage.start + len(hit.passage.text[:place].encode())
                yield Quote(quoted, number, start, start + len(quoted.encode()))
                break
