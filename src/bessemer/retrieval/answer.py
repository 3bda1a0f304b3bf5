"""Answers from an index: sources within a budget, citations of these sources only, and a check of each sentence against them.

While the model writes, a regular expression over the answer lets only the number of a source follow `[`, so that a citation
always names a source that was given. Afterwards every sentence is compared with the sources that it cites: the share
of its content words that they have. Sentences below a limit are marked. Text between quotation marks is looked for in the
sources, and comes back with its place in the document (`citations.py`).

A small model that reads five sources mixes them up, and cites any. So sources can also be read one at a time (`each`): of each
alone the model says how likely it holds the answer, this is added to the search's order, and the answer is written from the
best one. Its sentences are cited by what bears them out, not by what the model writes. A quote is chosen by the model among
the sentences of the sources, so it is one by construction.

What was retrieved is data: it stands in the user's message as parts of origin `document`, numbers in brackets in it are no
citations, and control tokens in it are text to the tokenizer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import expm1, log
from typing import Any, Literal, Protocol, TypeVar

from bessemer.assistant.messages import Message, MessagePart
from bessemer.core.errors import RequestError
from bessemer.inference.engine import Engine
from bessemer.inference.sampling.params import SamplingParams
from bessemer.retrieval.citations import (
    Entails,
    Quote,
    Statement,
    attributed,
    checked_statements,
    citing,
    has_citation,
    quotable,
    quotes_in,
    without_citations,
)
from bessemer.retrieval.index import OpenIndex
from bessemer.retrieval.search import Hit, search
from bessemer.retrieval.store import EVERYTHING, Filter

SYSTEM = (
    "Answer the question from the numbered sources alone. Behind each statement cite its source as [1]. "
    "If the sources do not hold the answer, say that they do not."
)
NOT_HELD = "The documents do not answer this."
#: How sources are read: as one text, or each alone.
Reading = Literal["together", "each"]
#: What a unit of the logarithm of a source's rank takes from its log-odds of holding the answer, in nats, where each is read
#: alone: the second is answered from where its odds are 64 times those of the first. Not fitted yet: of the first and second
#: passages, 62 and 12 % are right (`benchmarks/retrieval_development.json`), so odds that one can trust ask for 2.4.
RANK_WEIGHT = 6.0
#: Least probability that counts, which bounds log-odds.
_LEAST = 1e-6
_Hit = TypeVar("_Hit", bound=Hit)


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


#: What a unit of the similarity of headings counts beside one of the cosine, in what speaks for an answer: the middle of where
#: the calibration questions of `benchmarks/retrieval_questions.json` are separated best, with headings by
#: Qwen2.5-Coder-1.5B-Instruct. With headings by SmolLM2 none is better than the cosine alone.
HEADINGS_EVIDENCE = 0.5


def evidence(hits: Sequence[Hit]) -> float | None:
    """What speaks for it that hits hold an answer: the greatest cosine, and, where headings were written for the query, the
    greatest similarity of a hit's, weighted. None where there is neither: BM25's scores have no scale."""
    cosines = [hit.scores["meaning"] for hit in hits if "meaning" in hit.scores]
    similarities = [hit.scores["headings"] for hit in hits if "headings" in hit.scores]
    if not cosines and not similarities:
        return None
    return max(cosines, default=0.0) + HEADINGS_EVIDENCE * max(similarities, default=0.0)


@dataclass(frozen=True)
class NearestJudge:
    """Judges that the documents hold an answer where the `evidence` reaches a limit, which is fitted on questions with and
    without an answer (`calibrated_limit`), and to be fitted anew where headings are written. Of a question without evidence it
    says that they do."""

    limit: float

    def holds(self, question: str, hits: Sequence[Hit]) -> bool:
        found = evidence(hits)
        return found is None or found >= self.limit


def calibrated_limit(held: Iterable[float], not_held: Iterable[float]) -> float:
    """The limit that best separates the evidence for questions with an answer from that for questions without: the sum of
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
    reading: Reading = "together",
    quote: bool = False,
    section: int = 0,
    entails: Entails | None = None,
) -> Answer:
    """Answer a question from an index. count: sources at most; fewer where the context holds no more. section: as of `search`;
    of sources that the context does not hold so, what was found alone is read. The others are those of `answer_from`. Raises
    RequestError as `search`.
    """
    hits = search(index, question, count, where=where, section=section)
    return answer_from(engine, question, hits, judge=judge, params=params, reading=reading, quote=quote, entails=entails)


def answer_from(
    engine: Engine,
    question: str,
    hits: Sequence[Hit],
    *,
    judge: Judge | None = None,
    params: SamplingParams | None = None,
    reading: Reading = "together",
    quote: bool = False,
    entails: Entails | None = None,
) -> Answer:
    """Answer a question from what a search found.

    judge: refuses questions that the documents do not answer; None: the model alone decides, and with `quote` nothing is
    refused. reading: whether the model reads the sources together, or each alone and answers from the best. quote: the answer
    is a sentence of a source, which the model chooses. entails: judges whether sources bear out the sentences
    (`entailment.Entailment.probabilities`); None: by the share of common words.
    """
    if not hits or (judge is not None and not judge.holds(question, hits)):
        return Answer(NOT_HELD, hits, is_held=False)
    params = params or SamplingParams(max_tokens=256, temperature=0)
    if reading == "each":
        number = best_source(engine, question, hits, params.max_tokens)
        text, source = _from_one(engine, question, hits[number - 1], params, quote, is_judged=judge is not None)
        sources = [*hits[: number - 1], source, *hits[number:]]
        return checked(attributed(text, sources, [number]), sources, entails)
    messages, used = prompt_of(engine, question, hits, params.max_tokens)
    form = {"choice": quotable(used)} if quote else citation_form(used)
    return checked(engine.chat(messages, params.with_changes(**form)).text.strip(), used, entails)


def best_source(engine: Engine, question: str, hits: Sequence[Hit], answer_tokens: int) -> int:
    """The number of the source that most likely answers: by a model's log-odds that it does, and by the rank of its section.
    Passages of one section have the rank of the first of them: which of them a search finds first says little."""
    odds = holding(engine, question, hits, answer_tokens)
    sections = [(hit.passage.document, hit.passage.headings) for hit in hits]
    ranks = {section: rank for rank, section in enumerate(dict.fromkeys(sections), start=1)}
    scores = [own - RANK_WEIGHT * log(ranks[section]) for own, section in zip(odds, sections, strict=True)]
    return 1 + scores.index(max(scores))


def holding(engine: Engine, question: str, hits: Sequence[Hit], answer_tokens: int) -> list[float]:
    """Of each source, read alone, a model's log-odds that it answers the question: that its answer is not that the documents do
    not. Of a section what was found is read."""
    refusal = engine.tokenizer.encode(NOT_HELD, add_bos=False)
    items = []
    for hit in hits:
        messages, _ = prompt_of(engine, question, [hit.narrowed], answer_tokens)
        items.append((engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True), [refusal]))
    refused = [min(score.total, log(1 - _LEAST)) for (score,) in engine.score_items(items)]
    return [log(-expm1(total)) - max(total, log(_LEAST)) for total in refused]


def _from_one(
    engine: Engine, question: str, hit: Hit, params: SamplingParams, quote: bool, *, is_judged: bool
) -> tuple[str, Hit]:
    """An answer from one source, and this as it was read. The answer is a quote where the model's own does not end, as a small
    model that repeats itself; where the source bears no sentence of it out, which would then stand without a citation; and
    where a judge has found that the documents hold one and the model has not."""
    messages, used = prompt_of(engine, question, [hit], params.max_tokens)
    if not quote:
        completion = engine.chat(messages, params.with_changes(**citation_form(used)))
        text = completion.text.strip()
        is_fit = not is_judged if NOT_HELD in text else has_citation(attributed(text, used, [1]))
        if completion.finish_reason != "length" and is_fit:
            return text, used[0]
    return engine.chat(messages, params.with_changes(choice=quotable(used))).text, used[0]


def citation_form(sources: Sequence[Hit]) -> dict[str, Any]:
    """Settings of sampling that hold an answer to citations of the sources; without sources, to saying that there are none."""
    return {"regex": citing(len(sources))} if sources else {"choice": [NOT_HELD]}


def prompt_of(engine: Engine, question: str, hits: Sequence[Hit], answer_tokens: int) -> tuple[list[dict[str, Any]], list[Hit]]:
    """The conversation, and the sources that it holds (`fitting_sources`)."""

    def messages_of(sources: Sequence[Hit]) -> list[dict[str, Any]]:
        return [message.as_template_input() for message in grounded([Message.user(question)], sources)]

    def fits(sources: Sequence[Hit]) -> bool:
        tokens = len(engine.tokenizer.apply_chat_template(messages_of(sources), add_generation_prompt=True))
        return tokens + answer_tokens <= engine.longest

    used = fitting_sources(hits, fits)
    return messages_of(used), used


def fitting_sources(hits: Sequence[_Hit], fits: Callable[[Sequence[_Hit]], bool]) -> list[_Hit]:
    """The first hits that leave room for the answer, at least one, and of these the first with their sections, as far as they
    fit. fits: whether sources do; if some do, so do fewer and shorter ones."""
    found = [hit.narrowed for hit in hits]
    count = most_sources(len(found), lambda number: fits(found[:number]))
    if not any(hit.found for hit in hits[:count]):
        return found[:count]
    widened = bisect_left(range(1, count + 1), True, key=lambda number: not fits([*hits[:number], *found[number:count]]))
    return [*hits[:widened], *found[widened:count]]


def most_sources(count: int, fits: Callable[[int], bool]) -> int:
    """The largest number of sources, at most `count` and at least one, that fits. fits: whether a number does; if one fits,
    all smaller ones do."""
    return 1 + bisect_left(range(2, count + 1), True, key=lambda number: not fits(number)) if count else 0


def question_of(messages: Sequence[Message]) -> str:
    """What a conversation asks: the user's last message. Raises RequestError where there is none."""
    return messages[_last_question(messages)].text


def grounded(messages: Sequence[Message], sources: Sequence[Hit]) -> list[Message]:
    """A conversation whose last question has numbered sources above it, each a part of origin `document`.

    A conversation's own system messages stay as they are; the instruction to cite is then a part of the question's message, and
    a system message elsewhere. Raises RequestError for a conversation without a user's message.
    """
    place = _last_question(messages)
    question = messages[place]
    instructed = any(message.role == "system" for message in messages)
    parts = [MessagePart(f"{SYSTEM}\n\nSources:" if instructed else "Sources:", "system")]
    for number, hit in enumerate(sources, start=1):
        shown = without_citations(hit.passage.shown)
        parts += [MessagePart(f"\n\n[{number}] ", "system"), MessagePart(shown, "document", hit.passage.document)]
    parts.append(MessagePart("\n\nQuestion: ", "system"))
    with_sources = replace(question, parts=(*parts, *question.parts)) if sources else question
    conversation = [*messages[:place], with_sources, *messages[place + 1 :]]
    return conversation if instructed or not sources else [Message.system(SYSTEM), *conversation]


def _last_question(messages: Sequence[Message]) -> int:
    places = [place for place, message in enumerate(messages) if message.role == "user"]
    if not places:
        raise RequestError("retrieval: the conversation has no message of the user's to search for")
    return places[-1]


def checked(text: str, sources: Sequence[Hit], entails: Entails | None = None) -> Answer:
    """An answer with the support of each sentence by the sources, and its quotes."""
    return Answer(text, sources, checked_statements(text, sources, entails), list(quotes_in(text, sources)))
