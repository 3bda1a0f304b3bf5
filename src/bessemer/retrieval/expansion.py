"""Query expansion: a language model writes headings that may answer a query, and passages below such headings are found.

A question in words of one's own often shares none with the passage that answers it, and its vector is no nearer than others
("How do I go through two lists side by side?", `zip`). A language model that has read such documents knows what the answer is
called. As in HyDE (Gao et al. 2023) it writes what a result may look like, and this is searched for; here only headings, as in
generative retrieval (De Cao et al. 2021): they take a dozen tokens, and compare with the headings that the index has.

Two headings are similar by the words that they share, each by its rarity among the headings of the index (a weighted Dice
coefficient): 1 where all are the same. Unlike scores of BM25 that has a scale: where nothing similar is there, the documents
may not answer the query.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import log
from threading import Lock
from typing import Protocol

import pyarrow as pa

from bessemer.core.hashing import hash_value
from bessemer.inference.engine import Engine
from bessemer.inference.sampling.params import SamplingParams
from bessemer.retrieval.store import EVERYTHING, Filter, Found, LanceStore, Passage
from bessemer.retrieval.terms import searched_words

_TASK = (
    "You know the documentation by heart. Name the headings of the documentation that answer the question, the best first, at "
    "most four, separated by commas. Headings look like these: {examples}."
)
#: Questions with headings, which show the form.
_SHOWN = (
    ("How do I write a text in capitals?", "str.upper, str.capitalize, str.swapcase, str.title"),
    ("Who may work from home?", "Home office, Working hours, Remote work"),
    ("How do I get the current folder?", "os.getcwd, pathlib.Path.cwd, os.getcwdb"),
    ("How do I change who may read and write a file?", "os.chmod, pathlib.Path.chmod, os.umask, stat.filemode"),
)
#: Headings of the index that the model is shown, and characters of the longest.
_EXAMPLES, _EXAMPLE_CHARACTERS = 12, 60
#: Characters of a query that the model reads, tokens that it writes, and headings that are taken of them.
_QUERY_CHARACTERS, _TOKENS, _MOST = 2000, 40, 6
#: Weight of a written heading beside that of the one before it.
_DECAY = 0.9
#: Passages that are compared with a written heading, and the least similarity that counts.
_COMPARED, _LEAST = 200, 0.2


class Expander(Protocol):
    """Writes headings that may answer a query, the best first. examples: headings of the documents."""

    def headings(self, query: str, examples: Sequence[str]) -> list[str]: ...


class HeadingWriter:
    """The headings that a language model writes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        # a server searches in several threads, and an engine computes in one at a time
        self._lock = Lock()

    def headings(self, query: str, examples: Sequence[str]) -> list[str]:
        return self.headings_of_each([query], examples)[0]

    def headings_of_each(self, queries: Sequence[str], examples: Sequence[str]) -> list[list[str]]:
        """The headings for each of several queries, written beside one another."""
        prompts = [self._prompt(query[:_QUERY_CHARACTERS], examples) for query in queries]
        params = SamplingParams(temperature=0, max_tokens=_TOKENS, stop=["\n"])
        with self._lock:
            completions = self._engine.generate(prompts, params)
        return [_names_in(completion.text) for completion in completions]

    def _prompt(self, query: str, examples: Sequence[str]) -> list[int]:
        task, tokenizer = _TASK.format(examples=", ".join(examples)), self._engine.tokenizer
        if tokenizer.chat_template is None:
            shown = "".join(f"Question: {question}\nHeadings: {headings}\n\n" for question, headings in _SHOWN)
            return tokenizer.encode(f"{task}\n\n{shown}Question: {query}\nHeadings: ")
        messages = [{"role": "system", "content": task}]
        for question, headings in (*_SHOWN, (query, "")):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": headings}]
        return tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)


def _names_in(text: str) -> list[str]:
    """The headings in what a model wrote, without parameters, each once."""
    names = (name.strip(" `'\"()[].").partition("(")[0] for name in text.split(","))
    return list(dict.fromkeys(filter(None, names)))[:_MOST]


@dataclass(frozen=True)
class Headings:
    """The headings of an index: examples of them, and how rare their words are."""

    store: LanceStore

    @cached_property
    def _counts(self) -> Mapping[str, int]:
        found = (heading for batch in self.store.batches(["title", "headings"]) for heading in _of_batch(batch))
        return Counter(filter(None, found))

    @cached_property
    def examples(self) -> list[str]:
        """Some headings of documents that everybody may see, drawn by their hashes, so that they are the same every time."""
        open_to_all = {
            heading
            for batch in self.store.batches(["title", "headings", "groups"])
            for heading, groups in zip(_of_batch(batch), batch["groups"].to_pylist(), strict=True)
            if not groups
        }
        short = (heading for heading in open_to_all if 0 < len(heading) <= _EXAMPLE_CHARACTERS)
        return sorted(short, key=hash_value)[:_EXAMPLES]

    @cached_property
    def _frequencies(self) -> Mapping[str, int]:
        return Counter(word for heading in self._counts for word in words_of(heading))

    def rarity(self, word: str) -> float:
        """The inverse document frequency of a word among headings, as BM25 has it."""
        total, own = len(self._counts), self._frequencies.get(word, 0)
        return log(1 + (total - own + 0.5) / (own + 0.5))

    def similarity(self, first: str, second: str) -> float:
        """How much two headings say the same, from 0 to 1: twice the weight of the words that both have, as a share of the
        weight of the words of each."""
        one, other = words_of(first), words_of(second)
        total = sum(map(self.rarity, one)) + sum(map(self.rarity, other))
        return 2 * sum(map(self.rarity, one & other)) / total if total else 0.0

    def find(self, written: Sequence[str], where: Filter = EVERYTHING) -> list[Found]:
        """Passages whose headings are similar to written ones, the most similar first; earlier ones count more."""
        found: dict[str, tuple[float, Passage]] = {}
        for place, heading in enumerate(written):
            for one in self.store.by_words(heading, _COMPARED, where):
                own = headings_of(one.passage.title, one.passage.headings)
                score = _DECAY**place * max((self.similarity(heading, form) for form in own), default=0.0)
                if score >= _LEAST and score > found.get(one.passage.id, (0.0, None))[0]:
                    found[one.passage.id] = score, one.passage
        ordered = sorted(found.values(), key=lambda each: (-each[0], each[1].number, each[1].id))
        return [
            Found(passage, {"headings": rank}, {"headings": score}) for rank, (score, passage) in enumerate(ordered, start=1)
        ]


def headings_of(title: str, headings: str) -> list[str]:
    """What a passage may be called: its title with the headings below it, and the innermost of these. Parameters of functions,
    and what kind of object it is, are left out."""
    title = re.sub(r"^(class|module|def) ", "", title.partition("(")[0]).strip()
    whole = " › ".join(filter(None, (title, headings)))
    return list(dict.fromkeys(filter(None, (whole, headings.rpartition(" › ")[2]))))


def words_of(heading: str) -> frozenset[str]:
    """The words of a heading, and the parts of names, in small letters."""
    return frozenset(searched_words(heading).lower().split())


def _of_batch(batch: pa.RecordBatch) -> list[str]:
    """The innermost heading of each passage; empty where it has none."""
    rows = zip(batch["title"].to_pylist(), batch["headings"].to_pylist(), strict=True)
    return [["", *headings_of(title, headings)][-1] for title, headings in rows]
