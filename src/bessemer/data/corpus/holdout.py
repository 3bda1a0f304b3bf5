"""Validation split: documents are held out by group (a package, a file), by the hash of its name.

The split of a group depends on nothing but its name, so that adding documents never moves others, and no run trains
on what another run validates on. Only a corpus so small that one side would be left empty needs a `remedy`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bessemer.core.hashing import hash_bytes
from bessemer.data.corpus.reader import TRAIN, VALIDATION

#: Fixed for good. Chosen among a few so that the shipped lock's held-out packages are several and unlike each other.
_SALT = b"hold"


@dataclass(frozen=True)
class Splitter:
    """The rule: `share` of the groups is held out.

    `moved` (group, split) overrides the hash for one group; `by_document` makes every document its own group.
    """

    share: float
    moved: tuple[str, str] | None = None
    by_document: bool = False

    def split(self, group: str | None, identity: str) -> str:
        """The split of a document with this group and id."""
        group = self.group(group, identity)
        if self.moved and self.moved[0] == group:
            return self.moved[1]
        return VALIDATION if place_of(group) < self.share else TRAIN

    def group(self, group: str | None, identity: str) -> str:
        """What is held out or not as one."""
        return identity if group is None or self.by_document else group

    def remedy(self, groups: Groups) -> Splitter | None:
        """How to split the same documents so that neither side is empty; None when that is so, or cannot be.

        The group nearest to the empty side moves there; a single group is split by document.
        """
        if not self.share or self.moved or groups.lowest is None or groups.highest is None:
            return None
        splits = {self.split(group, group) for _, group in (groups.lowest, groups.highest)}
        if len(splits) == 2:
            return None
        if groups.lowest == groups.highest:
            return None if self.by_document else Splitter(self.share, by_document=True)
        moved = (groups.lowest[1], VALIDATION) if splits == {TRAIN} else (groups.highest[1], TRAIN)
        return Splitter(self.share, moved=moved, by_document=self.by_document)


@dataclass
class Groups:
    """The two groups of a corpus that lie nearest to either side: (place of the hash, name). Enough to find a remedy."""

    lowest: tuple[float, str] | None = None
    highest: tuple[float, str] | None = None

    def add(self, groups: Iterable[str]) -> None:
        """Take notice of some groups."""
        for group in set(groups):
            self._take((place_of(group), group))

    def merge(self, other: Groups) -> None:
        """Take notice of what another has seen."""
        for group in (other.lowest, other.highest):
            if group is not None:
                self._take(group)

    def _take(self, group: tuple[float, str]) -> None:
        self.lowest = min(self.lowest or group, group)
        self.highest = max(self.highest or group, group)


def place_of(group: str) -> float:
    """Where a group's hash lies between 0 and 1."""
    return int(hash_bytes(_SALT, group.encode(), bits=64), 16) / 2**64
