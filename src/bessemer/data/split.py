"""Which documents are held out for validation: by group (a package, a file), by the hash of its name.

The split of a group depends on nothing but its name, so that adding documents never moves others, and no run trains
on what another run validates on. Only a corpus so small that one side would be left empty needs a `remedy`.
"""

from __future__ import annotations

from bessemer.core.hashing import hash_bytes
from bessemer.data.documents import TRAIN, VALIDATION

#: Fixed for good. Chosen among a few so that the shipped lock's held-out packages are several and unlike each other.
_SALT = b"hold"


class Splitter:
    """Assigns splits, and remembers enough of the groups that it saw to say whether both sides got some."""

    def __init__(self, share: float, *, moved: tuple[str, str] | None = None, by_document: bool = False) -> None:
        """`share` of the groups is held out. `moved` (group, split) overrides the hash for one group; `by_document`
        makes every document its own group."""
        self.share, self._moved, self._by_document = share, moved, by_document
        self._lowest: tuple[float, str] | None = None
        self._highest: tuple[float, str] | None = None
        self._seen: set[str] = set()

    def split(self, group: str | None, identity: str) -> str:
        """The split of a document with this group and id."""
        if group is None or self._by_document:
            group = identity
        place = int(hash_bytes(_SALT, group.encode(), bits=64), 16) / 2**64
        self._lowest = min(self._lowest or (place, group), (place, group))
        self._highest = max(self._highest or (place, group), (place, group))
        split = VALIDATION if place < self.share else TRAIN
        if self._moved and self._moved[0] == group:
            split = self._moved[1]
        self._seen.add(split)
        return split

    def remedy(self) -> Splitter | None:
        """How to split the same documents so that neither side is empty; None when that is so, or cannot be.

        The group nearest to the empty side moves there; a single group is split by document.
        """
        if not self.share or len(self._seen) != 1 or self._moved or self._lowest is None or self._highest is None:
            return None
        if self._lowest == self._highest:
            return None if self._by_document else Splitter(self.share, by_document=True)
        moved = (self._lowest[1], VALIDATION) if TRAIN in self._seen else (self._highest[1], TRAIN)
        return Splitter(self.share, moved=moved, by_document=self._by_document)
