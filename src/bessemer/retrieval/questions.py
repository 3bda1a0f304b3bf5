"""Questions made from an index, each with the passage that answers it, and conversations of answers that cite it.

A question is about a passage's subject (its title and headings) and answered by its first plain sentence. Documentation of
functions begins with an imperative ("Return the absolute value."), which also gives "How do I …?". Such questions share words
with their passage, so a search finds them more easily than what people ask.

To train an embedder, each question comes with its passage and with hard negatives: passages of other documents that a search
finds for it. In half of the rows the passage is without the sentence or the title that the question was made of, so that the
words that both share are not all that is learnt (the inverse cloze task, Lee et al. 2019).

Conversations have the form in which `ask` shows sources to a model, and what the search finds for a question as the sources, so
that a model tuned on them learns to cite the right one among near ones; and, with the passages of that document left out, to
say that the sources do not hold the answer.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bessemer.assistant.messages import Message
from bessemer.core.errors import SourceError
from bessemer.core.hashing import hash_value
from bessemer.retrieval.answer import NOT_HELD, grounded
from bessemer.retrieval.chunks import sentences
from bessemer.retrieval.index import OpenIndex
from bessemer.retrieval.search import Hit, search
from bessemer.retrieval.store import Passage

#: Fewest and most characters of an answer's sentence.
_SHORTEST, _LONGEST = 20, 200
#: Most sources of a conversation.
MOST_SOURCES = 4
#: Passages that are searched for, of which those that may be sources are taken.
_SEARCHED = 12
#: What a sentence of documentation begins with where it says what a function does, and the verb of the question that it gives.
_VERBS = {
    verb: "get" if verb == "return" else verb
    for verb in (
        *("add", "apply", "build", "call", "change", "check", "close", "compare", "compile", "compute", "convert", "copy"),
        *("count", "create", "decode", "delete", "encode", "escape", "execute", "find", "format", "generate", "get", "insert"),
        *("iterate", "join", "list", "load", "make", "merge", "move", "open", "parse", "print", "read", "register", "remove"),
        *("rename", "replace", "return", "run", "search", "send", "set", "show", "sort", "split", "start", "stop", "store"),
        *("test", "update", "wait", "wrap", "write"),
    )
}
#: What a title of documentation of code may begin with.
_KIND = re.compile(r"^(class|module|def) ")
_PLAIN_SENTENCE = re.compile(r"[A-Z][^\n\[\]<>|`]*[.]")


@dataclass(frozen=True)
class Question:
    """A question and the passage that answers it. answer: a sentence of the passage."""

    text: str
    answer: str
    subject: str
    passage: Passage


def make_questions(index: OpenIndex, count: int, seed: int = 0, longest: int | None = None) -> list[Question]:
    """At most `count` questions on different documents of an index, drawn by the seed. Subjects that several documents have,
    which would leave a question without one answer, are left out. longest: most characters of a passage; None: any.

    Raises SourceError where no passage gives a question.
    """
    found: dict[str, Question] = {}
    subjects: Counter[str] = Counter()
    for passage in index.store.passages():
        question = question_of(passage, seed)
        if longest is not None and len(passage.text) > longest:
            continue
        if question is not None and passage.document not in found:
            found[passage.document] = question
            subjects[question.subject] += 1
    alone = [question for question in found.values() if subjects[question.subject] == 1]
    if not alone:
        raise SourceError("no passage of this index gives a question: they need a title or headings, and a plain sentence")
    return sorted(alone, key=lambda one: hash_value([seed, one.passage.id]))[:count]


def question_of(passage: Passage, seed: int = 0) -> Question | None:
    """The question that a passage answers with its first plain sentence; None for one without."""
    subject = _subject(passage)
    answer = next(filter(None, (_plain(passage.text[span.start : span.end]) for span in sentences(passage.text))), None)
    if subject is None or answer is None:
        return None
    texts = [f"What does {subject} do?"] if _is_name(subject) else [f"What is said about {subject}?", f"{subject}: what is it?"]
    first, _, rest = answer.rstrip(".").partition(" ")
    verb = _VERBS.get(first.lower().removesuffix("s")) or _VERBS.get(first.lower())
    if verb is not None and rest:
        # twice: it is how people ask
        texts += [f"How do I {verb} {rest}?"] * 2
    return Question(random.Random(f"{seed} {passage.id}").choice(texts), answer, subject, passage)


def cited_conversations(
    index: OpenIndex,
    count: int,
    *,
    unanswered: float = 0.25,
    longest: int = 1000,
    most_sources: int = MOST_SOURCES,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Rows for tuning a model on answers with citations: {messages, held, document}. unanswered: share of the questions whose
    passage is not among the sources. longest: most characters of a source; passages with more take no part, which saves time.
    most_sources: the most sources of a conversation, which has
    one at least; with 1 a model learns to answer from a source alone (`ask`, `each`).

    Raises SourceError as `make_questions`.
    """
    for question in make_questions(index, count, seed, longest):
        draw = random.Random(f"{seed} {question.text} {question.passage.id}")
        is_held = draw.random() >= unanswered
        number = draw.randint(1, most_sources)
        hits = search(index, question.text, _SEARCHED)
        others = [hit for hit in hits if len(hit.passage.text) <= longest and _is_other(hit.passage, question)]
        sources = others[:number]
        answer = NOT_HELD
        if is_held:
            sources = sources[: number - 1]
            place = draw.randint(0, len(sources))
            sources.insert(place, Hit(question.passage, 0.0, {}, {}))
            answer = _answer(question, place + 1)
        if not sources:
            continue
        shown = [*grounded([Message.user(question.text)], sources), Message.assistant(answer)]
        messages = [{"role": message.role, "content": message.text} for message in shown]
        yield {"messages": messages, "held": is_held, "document": question.passage.document}


def _answer(question: Question, number: int) -> str:
    """The passage's sentence with its citation, behind the name where the question does not say it."""
    sentence = f"{question.answer.removesuffix('.')} [{number}]."
    if question.subject in question.text or not _is_name(question.subject):
        return sentence
    return f"Use {question.subject} [{number}]: {sentence[0].lower()}{sentence[1:]}"


def _is_other(passage: Passage, question: Question) -> bool:
    """Whether a passage is of another document, and does not hold the same sentence."""
    return passage.document != question.passage.document and question.answer not in passage.text


def _subject(passage: Passage) -> str | None:
    """What a passage is about: the innermost heading, or the title, a signature left out."""
    shown = (passage.headings.rpartition(" › ")[2] or passage.title).partition("(")[0].strip("`#* ")
    shown = _KIND.sub("", shown)
    return shown if 2 < len(shown) <= 80 else None


def _is_name(subject: str) -> bool:
    """Whether a subject is a name in code, such as json.loads."""
    return "." in subject and " " not in subject


def _plain(sentence: str) -> str | None:
    """A sentence on one line where it can stand alone as an answer."""
    line = " ".join(sentence.split())
    return line if _PLAIN_SENTENCE.fullmatch(line) and _SHORTEST <= len(line) <= _LONGEST else None


def contrastive_rows(index: OpenIndex, count: int, negatives: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows for training an embedder: those of `as_questions` with {text, negatives}: what answers the question, and at most so
    many passages that a search finds and that do not. Raises SourceError as `make_questions`."""
    questions = make_questions(index, count, seed)
    for question, row in zip(questions, as_questions(questions), strict=True):
        hits = search(index, question.text, _SEARCHED + negatives)
        others = [hit.passage.shown for hit in hits if _is_other(hit.passage, question)]
        yield {**row, "text": _learnt_text(question, seed), "negatives": others[:negatives]}


def _learnt_text(question: Question, seed: int) -> str:
    """The passage as it is shown, or, for half of the questions, without what the question was made of."""
    passage = question.passage
    if random.Random(f"{seed} text {passage.id}").random() < 0.5:
        return passage.shown
    if question.subject in question.text:
        return passage.text
    kept = [passage.text[span.start : span.end] for span in sentences(passage.text)]
    rest = "".join(sentence for sentence in kept if _plain(sentence) != question.answer).strip()
    # a name alone is no passage
    return passage.shown.replace(passage.text, rest) if len(rest) >= _SHORTEST else passage.shown


def as_questions(questions: Sequence[Question]) -> Iterator[dict[str, Any]]:
    """Rows for measuring a search: {question, document, passage, answer}."""
    for one in questions:
        yield {"question": one.text, "document": one.passage.document, "passage": one.passage.id, "answer": one.answer}
