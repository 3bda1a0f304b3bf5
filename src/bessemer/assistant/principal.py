"""In whose name a turn is made."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Principal:
    """A user with the groups that they are in. key: the name of the key that they came with, never the key itself."""

    user: str
    groups: frozenset[str] = frozenset()
    key: str = ""

    def is_in_any(self, groups: Collection[str] | None) -> bool:
        """Whether they are in one of the groups; None is everybody."""
        return groups is None or not self.groups.isdisjoint(groups)


#: Somebody at this machine's terminal, or a program of theirs.
LOCAL = Principal("local")
