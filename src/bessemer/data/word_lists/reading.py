"""Reader of word and pattern files: categories, each with its meaning, its terms and its patterns.

A YAML file holds a mapping from category to

    meaning: what a hit says, in one line
    terms: [idiot, "total moron", "moron*", "you {insults}"]   or a mapping from term to weight
    patterns: ['(?i)f[*]+ck']                                  RE2 regular expressions
    weight: 1.0                                                of each term that states none of its own

and may define sets of words under the key `sets`, which `{name}` in a term stands for: one term for each word. A
plain text file holds one term a line, `# …` for remarks, and optionally `[category]` above the terms of each.

Terms know neither case nor punctuation: `How-To` finds "how to" and "HOW TO". A term matches whole words; a star at
an end lets the word go on there.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from bessemer.core.errors import ConfigError

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
    """Where the list of that name that travels with Bessemer lies."""
    return Path(str(resources.files("bessemer.data.word_lists") / f"{name}.yaml"))


def read_list(path: Path) -> dict[str, Category]:
    """The categories of a list, by name, in the file's order.

    Raises ConfigError, naming the file and the place, for a file that cannot be read or has another form.
    """
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
    return {name: Category(name, terms=found) for name, found in terms.items()}


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
