"""Citations in a text: which it may hold, which it holds, and what in the cited sources bears a sentence out.

A citation is the number of a source in brackets, `[2]`. `citing` is the regular expression that decoding is held to, so that a
citation names a source that was given. `CitationReader` finds citations in a text that grows, each with the sentence of its
source that shares most words with what was said; `checked_statements` compares whole sentences with the sources that they cite.
`attributed` cites them anew by that measure.
`quotable` are the sentences that an answer may quote.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bessemer.retrieval.chunks import Span, sentences
from bessemer.retrieval.search import Hit
from bessemer.retrieval.store import Passage, Segment
from bessemer.retrieval.terms import compared_words

#: Share of a sentence's content words that its sources must have, and the least probability that one bears it out.
SUPPORT = ENTAILED = 0.5
#: How likely each source bears out its sentence, (N,), for pairs of both: `entailment.Entailment.probabilities`.
Entails = Callable[[Sequence[tuple[str, str]]], np.ndarray]
_CITATION = re.compile(r"\[([0-9]{1,4})\]")
#: Characters of the longest citation.
_LONGEST_MARK = len("[1234]")
#: Characters before a citation in which its sentence begins.
_SENTENCE_CHARACTERS = 2_000
#: What ends a sentence; its citation stands before.
_ENDS = ".!?:;,。！？｡।॥؟۔"
#: Characters of the shortest text that is a quote.
_SHORTEST_QUOTE = 8
#: Blanks of a sentence that says something: four words. Pairs of characters that do where no blanks are written.
_FEWEST_BLANKS, _FEWEST_PAIRS = 3, 6
#: Opening and closing marks: English and straight ones, German, French, Chinese and Japanese.
_MARKS = [("“", "”"), ('"', '"'), ("„", "“"), ("„", "”"), ("«", "»"), ("»", "«"), ("「", "」"), ("『", "』")]
_WITHOUT_MARKS = str.maketrans("", "", "".join(sorted({mark for pair in _MARKS for mark in pair})))
_QUOTED = re.compile("|".join(rf"{a}(?P<q{n}>[^{a}{b}]{{{_SHORTEST_QUOTE},}}){b}" for n, (a, b) in enumerate(_MARKS)))
#: Citations behind the end of a sentence.
_BEHIND = re.compile(rf"\s*(?:{_CITATION.pattern}\s*)+[{_ENDS}]?")


@dataclass(frozen=True)
class Statement:
    """A sentence of an answer. cited: numbers of its sources, from 1. support: share of its content words in them, or, where it
    cites none, in any; None for a sentence without content words. entailment: how likely the likeliest of these sources bears
    it out (`entailment.py`), which then decides; None where nobody was asked."""

    text: str
    cited: tuple[int, ...]
    support: float | None
    entailment: float | None = None

    @property
    def is_supported(self) -> bool:
        if self.entailment is not None:
            return self.entailment >= ENTAILED
        return self.support is None or self.support >= SUPPORT


@dataclass(frozen=True)
class Quote:
    """A quoted text that a source has. start, end: bytes in the document."""

    text: str
    source: int
    start: int
    end: int


@dataclass(frozen=True)
class Citation:
    """A citation in a text. number: of the source, from 1. index: of its first character in the text. quote: the sentence of
    the source that shares most words with the sentence before the citation; start, end: its bytes in the document."""

    number: int
    index: int
    quote: str
    start: int
    end: int


def citing(count: int) -> str:
    """A regular expression for texts whose brackets hold only the numbers 1 to `count`; with 0, for texts without brackets."""
    if count == 0:
        return r"[^\[\]]*"
    numbers = "|".join(str(number) for number in range(1, count + 1))
    return rf"([^\[\]]|\[({numbers})\])*"


def without_citations(text: str) -> str:
    """A source's text with its numbers in brackets changed, so that none looks like a citation."""
    return _CITATION.sub(r"(\1)", text)


def has_citation(text: str) -> bool:
    """Whether a text cites anything."""
    return _CITATION.search(text) is not None


class CitationReader:
    """Finds the citations of sources in a text that grows. Numbers of no source are none."""

    def __init__(self, sources: Sequence[Hit]) -> None:
        self._sources = sources
        self._text = ""
        #: Characters in which no citation begins that is yet to be found.
        self._searched = 0

    @property
    def text(self) -> str:
        return self._text

    def feed(self, text: str) -> list[Citation]:
        """The citations that this text completes."""
        self._text += text
        found = []
        for match in _CITATION.finditer(self._text, self._searched):
            self._searched = match.end()
            if 0 < (number := int(match[1])) <= len(self._sources):
                found.append(self._citation(number, match.start()))
        opened = self._text.rfind("[", max(self._searched, len(self._text) - _LONGEST_MARK))
        self._searched = len(self._text) if opened < 0 else opened
        return found

    def _citation(self, number: int, index: int) -> Citation:
        passage = self._sources[number - 1].passage
        before = _CITATION.sub("", self._text[max(0, index - _SENTENCE_CHARACTERS) : index])
        said = [before[span.start : span.end] for span in sentences(before)]
        span = nearest_sentence(next((one for one in reversed(said) if one.strip()), ""), passage.text, passage.parts)
        return Citation(number, index, passage.text[span.start : span.end], *_bytes_of(passage, span))


def nearest_sentence(statement: str, text: str, parts: Sequence[Segment] = ()) -> Span:
    """The sentence of a text that has most content words of a statement; the whole text where none has any. parts: of the text,
    outside which no sentence is looked for."""
    wanted = set(compared_words(statement))
    best, most = Span(0, len(text)), 0
    within = [Span(part.text_start, part.text_end) for part in parts] or [Span(0, len(text))]
    for span in (span for part in within for span in sentences(text, part)):
        shared = len(wanted.intersection(compared_words(text[span.start : span.end])))
        if shared > most:
            best, most = span, shared
    sentence = text[best.start : best.end]
    start = best.start + len(sentence) - len(sentence.lstrip())
    return Span(start, start + len(sentence.strip()))


def checked_statements(text: str, sources: Sequence[Hit], entails: Entails | None = None) -> list[Statement]:
    """The sentences of an answer, with their citations and how far the sources support each. entails: judges this besides."""
    words = [set(compared_words(hit.passage.shown)) for hit in sources]
    everything = set().union(*words)
    statements = []
    for sentence in _cited_sentences(text):
        cited = tuple(dict.fromkeys(int(number) for number in _CITATION.findall(sentence) if 0 < int(number) <= len(sources)))
        own = compared_words(_CITATION.sub("", sentence))
        known = set().union(*(words[number - 1] for number in cited)) if cited else everything
        support = sum(word in known for word in own) / len(own) if own else None
        statements.append(Statement(sentence, cited, support))
    return statements if entails is None or not sources else [_judged(one, sources, entails) for one in statements]


def _judged(statement: Statement, sources: Sequence[Hit], entails: Entails) -> Statement:
    """A statement with the probability that the likeliest of its sources bears it out; without content words as it is."""
    if statement.support is None:
        return statement
    said = re.sub(rf"\s*{_CITATION.pattern}", "", statement.text).translate(_WITHOUT_MARKS)
    among = [sources[number - 1] for number in statement.cited] or sources
    return replace(statement, entailment=float(entails([(said, hit.passage.shown) for hit in among]).max()))


def _cited_sentences(text: str) -> list[str]:
    """The sentences of an answer. Citations behind the end of one that has none are its own: `It rusts. [1]`."""
    found: list[str] = []
    for span in sentences(text):
        sentence = text[span.start : span.end]
        behind = _BEHIND.match(sentence)
        if found and behind and not _CITATION.search(found[-1]):
            found[-1] = f"{found[-1]} {behind[0].strip()}"
            sentence = sentence[behind.end() :]
        if sentence.strip():
            found.append(sentence.strip())
    return found


def attributed(text: str, sources: Sequence[Hit], among: Sequence[int]) -> str:
    """A text whose sentences are cited by what bears them out. Each cites that source, of the numbers `among`, which has most
    of its content words, the first of equal ones, if it has at least the share `SUPPORT` of them. Other citations are left
    out."""
    words = {number: set(compared_words(sources[number - 1].passage.shown)) for number in among}
    parts = []
    for span in sentences(text):
        sentence = re.sub(rf"\s*{_CITATION.pattern}", "", text[span.start : span.end])
        own = compared_words(sentence)
        shares = {number: sum(word in known for word in own) / len(own) for number, known in words.items()} if own else {}
        best = max(shares, key=lambda number: (shares[number], -number), default=0)
        said = sentence.rstrip()
        if best and shares[best] >= SUPPORT:
            end = len(said.rstrip(_ENDS))
            parts += [said[:end], f" [{best}]", said[end:], sentence[len(said) :]]
        else:
            parts.append(sentence)
    return "".join(parts)


def quotable(sources: Sequence[Hit]) -> list[str]:
    """Answers that quote a sentence of a source, without what ends it, with its citation. A source without a sentence that can
    stand between quotation marks gives its name, unquoted."""
    answers = []
    for number, hit in enumerate(sources, start=1):
        parts = [hit.passage.text[part.text_start : part.text_end] for part in hit.passage.parts]
        found = [" ".join(one.split()).rstrip(_ENDS) for part in parts for one in _unwrapped(part)]
        fitting = [one for one in found if len(one) >= _SHORTEST_QUOTE and not set("“”[]") & set(one)]
        # a name or a label alone says little
        quoted = [one for one in fitting if _says_something(one)] or fitting
        answers += [f"“{one}” [{number}]." for one in quoted] or [f"See {without_citations(hit.passage.title)} [{number}]."]
    return list(dict.fromkeys(answers))


def _says_something(sentence: str) -> bool:
    pairs = sum(not word.isascii() for word in compared_words(sentence))
    return sentence.count(" ") >= _FEWEST_BLANKS or pairs >= _FEWEST_PAIRS


def _unwrapped(text: str) -> Iterator[str]:
    """The sentences of a text, also over lines that were wrapped."""
    begun = ""
    for span in sentences(text):
        begun += text[span.start : span.end]
        if begun.endswith("\n\n") or not begun.endswith("\n") or begun.rstrip().endswith(tuple(".!?:")):
            yield begun
            begun = ""
    if begun:
        yield begun


def quotes_in(text: str, sources: Sequence[Hit]) -> Iterator[Quote]:
    """The quotes in an answer that a source holds word for word, as it has them: with its line breaks."""
    for match in _QUOTED.finditer(text):
        if not (words := match[match.lastgroup or 0].split()):
            continue
        form = re.compile(r"\s+".join(map(re.escape, words)))
        for number, hit in enumerate(sources, start=1):
            # within one part: what is joined of two stands nowhere in the document
            places = (form.search(hit.passage.text, part.text_start, part.text_end) for part in hit.passage.parts)
            if found := next(filter(None, places), None):
                yield Quote(found[0], number, *_bytes_of(hit.passage, Span(*found.span())))
                break


def _bytes_of(passage: Passage, span: Span) -> tuple[int, int]:
    """The place of a part of a passage, in bytes of its document: from where its first character stands there to where its last
    does."""
    parts = [part for part in passage.parts if part.text_start < span.end and span.start < part.text_end] or passage.parts[:1]
    first, last = parts[0], parts[-1]
    before = passage.text[first.text_start : max(first.text_start, span.start)]
    start = first.start + len(before.encode())
    return start, last.start + len(passage.text[last.text_start : min(last.text_end, span.end)].encode())
