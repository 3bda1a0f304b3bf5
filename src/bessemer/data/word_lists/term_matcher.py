"""Word and pattern files, and the term matcher: counts of hits by category for the terms and patterns of one or more lists.

A YAML file holds a mapping from category to

    meaning: what a hit says, in one line
    terms: [idiot, "total moron", "moron*", "you {insults}"]   or a mapping from term to weight
    patterns: ['(?i)f[*]+ck']                                  RE2 regular expressions
    weight: 1.0                                                of each term that states none of its own

and may define sets of words under the key `sets`, for which `{name}` in a term stands: one term for each word. A plain text
file holds one term a line, `# …` for remarks, and optionally `[category]` above the terms of each.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import pyarrow.lib

from bessemer.core.errors import ConfigError
from bessemer.data.text.texts import Texts
from bessemer.data.word_lists.automaton import FoldedTerms

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_KEYS = ("meaning", "terms", "patterns", "weight")


@dataclass(frozen=True)
class Category:
    """One category of a list: its terms with their weights, and patterns of RE2, each a hit of weight `weight`."""

    name: str
    meaning: str = ""
    terms: Mapping[str, float] = field(default_factory=dict)
    patterns: tuple[str, ...] = ()
    weight: float = 1.0


def packaged_list(name: str) -> Path:
    """The path of a list that comes with Bessemer."""
    return Path(str(resources.files("bessemer.data.word_lists") / f"{name}.yaml"))


def read_list(path: Path) -> dict[str, Category]:
    """The categories of a list, by name, in the file's order. Raises ConfigError, naming the file and the place, for a file
    that cannot be read or has another form."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: this word list cannot be read ({error})") from None
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(content, path)
    return _from_lines(content, path)


def _from_lines(content: str, path: Path) -> dict[str, Category]:
    terms: dict[str, dict[str, float]] = {}
    name = path.stem
    for line in content.splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("[") and line.endswith("]"):
            name = line[1:-1].strip()
        elif line:
            terms.setdefault(name, {})[line] = 1.0
    return {name: Category(name, terms=of_category) for name, of_category in terms.items()}


def _from_yaml(content: str, path: Path) -> dict[str, Category]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        loaded = YAML(typ="safe").load(content)
    except YAMLError as error:
        raise ConfigError(f"{path}: this is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: a word list maps categories to their terms, got {type(loaded).__name__}")
    sets = {str(key): [str(word) for word in words] for key, words in (loaded.pop("sets", None) or {}).items()}
    return {str(name): _category(str(name), entry, sets, path) for name, entry in loaded.items()}


def _category(name: str, entry: Any, sets: Mapping[str, list[str]], path: Path) -> Category:
    if isinstance(entry, list):
        entry = {"terms": entry}
    if not isinstance(entry, dict) or not set(entry) <= set(_KEYS):
        raise ConfigError(f"{path}: category {name!r} is a list of terms or has the keys {', '.join(_KEYS)}")
    weight = float(entry.get("weight", 1.0))
    stated = entry.get("terms") or []
    weights = {str(term): float(own) for term, own in stated.items()} if isinstance(stated, dict) else {}
    terms = weights or {str(term): weight for term in stated}
    expanded = {spelt: own for term, own in terms.items() for spelt in _expanded(term, sets, path)}
    patterns = tuple(str(pattern) for pattern in entry.get("patterns") or [])
    return Category(name, str(entry.get("meaning", "")), expanded, patterns, weight)


def _expanded(term: str, sets: Mapping[str, list[str]], path: Path) -> Iterator[str]:
    """The term with every `{name}` replaced by each word of that set in turn."""
    fixed, names = _PLACEHOLDER.split(term)[::2], _PLACEHOLDER.findall(term)
    for name in names:
        if name not in sets:
            raise ConfigError(f"{path}: the term {term!r} names a set {name!r} that the file does not define")
    for words in itertools.product(*(sets[name] for name in names)):
        yield "".join(itertools.chain.from_iterable(zip(fixed, [*words, ""], strict=True)))


class Hit(NamedTuple):
    """One term or pattern of a category, and how often a text has it."""

    category: str
    term: str
    times: int


class TermMatcher:
    """The terms and patterns of some categories, ready to be looked for in batches of texts."""

    def __init__(self, categories: Iterable[Category]) -> None:
        """Raises ConfigError for a term without letters or digits, or a pattern that RE2 does not accept."""
        self.categories: Mapping[str, Category] = {category.name: category for category in categories}
        self.names = tuple(self.categories)
        listed = [
            (number, term, weight)
            for number, category in enumerate(self.categories.values())
            for term, weight in category.terms.items()
        ]
        self._columns = np.array([number for number, _, _ in listed], np.int64)
        self._terms = [term for _, term, _ in listed]
        self._weights = np.array([weight for _, _, weight in listed], np.float64)
        try:
            self._automaton = FoldedTerms(self._terms) if listed else None
        except ValueError as error:
            raise ConfigError(str(error)) from None
        for category in self.categories.values():
            for pattern in category.patterns:
                try:
                    pc.match_substring_regex(pyarrow.array([""]), pattern)
                except pyarrow.lib.ArrowInvalid as error:
                    raise ConfigError(f"category {category.name!r}: the pattern {pattern!r} is not RE2's ({error})") from None

    def count(self, texts: Texts) -> tuple[np.ndarray, np.ndarray]:
        """What each text holds of each category, as weights: of every occurrence, and of each term once. Both (texts,
        categories) float64, in the order of `names`."""
        occurrences, distinct = self.count_terms(texts.data, texts.offsets)
        for number, category in enumerate(self.categories.values()):
            for pattern in category.patterns:
                times = np.asarray(pc.count_substring_regex(texts.array, pattern)).astype(np.float64)
                occurrences[:, number] += times * category.weight
                distinct[:, number] += (times > 0) * category.weight
        return occurrences, distinct

    def count_terms(self, data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `count`, of the terms alone, in spans of UTF-8 bytes that begin at `offsets`: lines, for example."""
        width = len(self.names)
        if self._automaton is None:
            return np.zeros((len(offsets) - 1, width)), np.zeros((len(offsets) - 1, width))
        return self._automaton.count(data, offsets, self._columns, self._weights, width)

    def hits(self, text: str) -> list[Hit]:
        """The hits in one text, by category in their order, the most frequent first."""
        texts, hits = Texts.of([text]), []
        if self._automaton is not None:
            each = np.arange(len(self._terms))
            counts, _ = self._automaton.count(texts.data, texts.offsets, each, np.ones(len(each)), len(each))
            hits = [Hit(self.names[self._columns[n]], self._terms[n], int(counts[0, n])) for n in np.flatnonzero(counts[0])]
        for category in self.categories.values():
            for pattern in category.patterns:
                if times := pc.count_substring_regex(texts.array, pattern)[0].as_py():
                    hits.append(Hit(category.name, pattern, times))
        return sorted(hits, key=lambda hit: (self.names.index(hit.category), -hit.times, hit.term))


@cache
def packaged_term_matcher(name: str) -> TermMatcher:
    """The matcher of a list that travels with Bessemer."""
    return TermMatcher(read_list(packaged_list(name)).values())


def term_matcher_of(path: Path) -> TermMatcher:
    """The matcher of a user's own list. Raises ConfigError when it cannot be read."""
    return TermMatcher(read_list(path).values())
