"""Score `urls`: addresses on lists of domains, or with words that tell what the page is.

The scorer's texts are the addresses; a document without one has the empty string and scores 0. A domain stands for its
subdomains too. One hard word is enough; of soft words, which harmless pages have as well, it takes two of one category.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bessemer.core.errors import ConfigError
from bessemer.data.text.compiled import compiled, compiled_allocating, fnv_hash, slot_of, table_of
from bessemer.data.text.texts import Texts
from bessemer.data.word_lists.term_matcher import Category, TermMatcher, packaged_list

_KEYS = {"meaning", "domains", "hard", "soft"}
_HASH, _DOT, _SLASH, _COLON, _QUERY, _AT = (ord(sign) for sign in "#./:?@")
#: How many soft words are as bad as a hard one.
_SOFT_WORDS = 2


@dataclass(frozen=True)
class Blocklist:
    """Domains with their category's number, and the matcher of hard and soft words: two of its categories for each of ours."""

    categories: tuple[str, ...]
    domains: Mapping[str, int]
    words: TermMatcher
    table: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, entries: Mapping[str, Mapping[str, Iterable[str]]]) -> Blocklist:
        """From lists of `domains`, `hard` and `soft` words by category. A domain gets the first category naming it."""
        domains: dict[str, int] = {}
        for number, entry in enumerate(entries.values()):
            for domain in entry.get("domains") or ():
                domains.setdefault(domain.strip().lower().strip("."), number)
        words = [
            Category(f"{name} {strength}", terms=dict.fromkeys(entry.get(strength) or (), 1.0))
            for name, entry in entries.items()
            for strength in ("hard", "soft")
        ]
        table = table_of({domain.encode(): number + 1 for domain, number in domains.items() if domain})
        return cls(tuple(entries), domains, TermMatcher(words), table)


def urls(texts: Texts, blocklist: Blocklist | None = None) -> dict[str, pa.Array]:
    """The score of each address, and the category that decided it. The texts are addresses."""
    blocklist = blocklist or packaged_blocklist()
    lowered = Texts.from_arrow(pc.ascii_lower(texts.array))
    listed = _listed(lowered.data, lowered.offsets, *blocklist.table)
    hits, _ = blocklist.words.count(lowered)
    # (texts, categories)
    scores = np.minimum(hits[:, 0::2] + hits[:, 1::2] / _SOFT_WORDS, 1.0)
    on_list = np.flatnonzero(listed)
    # a listed domain decides before any word
    scores[on_list, listed[on_list] - 1] = 2.0
    best = scores.argmax(1) if scores.shape[1] else np.zeros(len(texts), np.int64)
    score = np.minimum(scores.max(1, initial=0.0), 1.0)
    names = pa.array(["", *blocklist.categories], pa.string())
    return {
        "urls_score": pa.array(score),
        "urls_category": names.take(pa.array(np.where(score > 0, best + 1, 0))),
    }


@cache
def packaged_blocklist() -> Blocklist:
    """The list that travels with Bessemer."""
    return read_blocklist(packaged_list("urls"))


def read_blocklist(path: Path) -> Blocklist:
    """A user's own list: YAML as `word_lists/urls.yaml`, a text file of domains, or a folder of files `CATEGORY/domains`.

    Raises ConfigError when it cannot be read.
    """
    try:
        if path.is_dir():
            files = sorted(path.glob("*/domains"))
            if not files:
                raise ConfigError(f"{path}: a folder of blocklists holds a file CATEGORY/domains for each category")
            return Blocklist.of({file.parent.name: {"domains": _lines(file)} for file in files})
        if path.suffix not in (".yaml", ".yml"):
            return Blocklist.of({path.stem: {"domains": _lines(path)}})
        return Blocklist.of(_from_yaml(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: this blocklist cannot be read ({error})") from None


def _lines(path: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def _from_yaml(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        entries = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise ConfigError(f"{path}: this is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) and set(entry) <= _KEYS for entry in entries.values()):
        raise ConfigError(f"{path}: a blocklist maps categories to {', '.join(sorted(_KEYS))}")
    return {str(name): {key: value for key, value in entry.items() if key != "meaning"} for name, entry in entries.items()}


@compiled_allocating
def _listed(data: np.ndarray, offsets: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """For each address the value of the longest end of its host, at a dot, that the table has; 0 for none."""
    values_found = np.zeros(len(offsets) - 1, np.int64)
    for text in range(len(offsets) - 1):
        at, end = _host(data, offsets[text], offsets[text + 1])
        while at < end and values_found[text] == 0:
            values_found[text] = values[slot_of(keys, fnv_hash(data, at, end))]
            while at < end and data[at] != _DOT:
                at += 1
            at += 1
    return values_found


@compiled
def _host(data: np.ndarray, first: int, last: int) -> tuple[int, int]:
    """Begin and end of an address's host: behind `//` and `user:password@`, before the port and the path."""
    start = first
    for at in range(first, last - 1):
        if data[at] == _SLASH and data[at + 1] == _SLASH:
            start = at + 2
            break
        # the path begins, so there was no scheme
        if data[at] == _SLASH or data[at] == _QUERY:
            break
    end = start
    while end < last and data[end] != _SLASH and data[end] != _QUERY and data[end] != _HASH and data[end] > 32:
        if data[end] == _AT:
            start = end + 1
        end += 1
    for at in range(start, end):
        if data[at] == _COLON:
            end = at
            break
    while end > start and data[end - 1] == _DOT:
        end -= 1
    return start, end
