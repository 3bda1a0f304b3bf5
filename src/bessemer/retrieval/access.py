"""Who may see which documents: rules of an access file, by patterns of the documents' places.

    hr/*: [hr, managers]
    hr/holidays.md: everybody

`*` stands for any characters. The last rule that fits a document holds for it; a document that no rule fits is for everybody,
so that a first rule `"*": [staff]` closes what no later one opens. The rules are kept in the index, and hold for its updates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from bessemer.core.errors import ArtefactError, ConfigError
from bessemer.core.store import read_json, write_json
from bessemer.core.yaml_file import read_yaml
from bessemer.retrieval.index import ACCESS, IndexedDocument

#: The value of a rule that opens documents.
EVERYBODY = "everybody"
_GROUP = re.compile(r"[\w.-]{1,128}")


class AccessRule(NamedTuple):
    """Documents whose place fits the pattern are seen by these groups; empty: by everybody."""

    pattern: str
    groups: tuple[str, ...]

    def fits(self, place: str) -> bool:
        """Whether it is about a document. Texts and records of a file are called FILE#NUMBER, and fit as their file does."""
        return any(fnmatchcase(name, self.pattern) for name in (place, place.rpartition("#")[0] or place))


def read_access(path: Path) -> tuple[AccessRule, ...]:
    """The rules of a file, in order. Raises ConfigError, with the line, for what is no rule."""
    placed = read_yaml(path)
    rules = []
    for pattern, value in placed.values.items():
        groups: Any = [] if value == EVERYBODY else [value] if isinstance(value, str) else value
        is_list = isinstance(groups, list) and all(isinstance(one, str) and _GROUP.fullmatch(one) for one in groups)
        if not is_list or (not groups and value != EVERYBODY):
            raise ConfigError(f"{placed.place((pattern,))}: {pattern}: name groups, as [hr, managers], or {EVERYBODY}")
        rules.append(AccessRule(str(pattern), tuple(groups)))
    if not rules:
        raise ConfigError(f"{path}: no rule is here; one is a pattern of documents and their groups, as hr/*: [hr]")
    return tuple(rules)


def with_access(
    documents: Iterable[IndexedDocument], rules: Sequence[AccessRule], index: Path | None = None
) -> Iterator[IndexedDocument]:
    """Documents with the groups that the rules give them. index: the folder that is built of them, and keeps the rules from now
    on; None: nothing keeps them.

    Raises ConfigError in the end for a rule that fitted none: a pattern with a mistake would leave open what it should close.
    """
    if index is not None:
        # before the documents: an update that is killed goes on with these rules, not with the earlier ones
        write_json(index / ACCESS, [[rule.pattern, list(rule.groups)] for rule in rules])
    unused = set(rules)
    for document in documents:
        fitting = [rule for rule in rules if rule.fits(document.place)]
        unused.difference_update(fitting)
        yield replace(document, groups=fitting[-1].groups) if fitting else document
    for rule in rules:
        if rule in unused:
            raise ConfigError(f"access: the rule {rule.pattern} fits no document; correct it, or take it out")


def access_of(index: Path) -> tuple[AccessRule, ...]:
    """The rules that an index keeps; none for one without. Raises ArtefactError for a damaged file."""
    path = index / ACCESS
    if not path.exists():
        return ()
    rows: Any = read_json(path, "access rules")
    try:
        return tuple(AccessRule(str(pattern), tuple(map(str, groups))) for pattern, groups in rows)
    except (TypeError, ValueError):
        raise ArtefactError(f"{path}: these are no access rules; index the documents again with --access") from None
