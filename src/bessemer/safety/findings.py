"""What a guard's rails find in texts, and what a rail is."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from bessemer.core.policy import SurfaceName
from bessemer.safety.normalise import Reading

#: Surfaces at which a guard looks at texts.
SURFACES: tuple[SurfaceName, ...] = ("prompt", "answer", "document", "tool", "call")


@dataclass(frozen=True)
class Finding:
    """Something that a rail found.

    category: of the policy, or of `RULE_KINDS`. score: in [0, 1]. rule: what found it, in words. reading: the disguise that was
    taken off, `plain` for none. start, end: its characters in the text; None where it is the text as a whole.
    """

    category: str
    score: float
    rail: str
    rule: str
    reading: str = "plain"
    start: int | None = None
    end: int | None = None


class Rail(Protocol):
    """Looks at texts. A package of one's own adds one under the entry points `bessemer.rails`."""

    @property
    def categories(self) -> Collection[str]:
        """The categories and kinds of rules that it can find."""

    @property
    def takes_long(self) -> bool:
        """Whether a check waits for something, as a model behind an API; a growing answer is then checked once, when
        complete."""

    def check(self, text: str, found_readings: Sequence[Reading], surface: SurfaceName) -> Sequence[Finding]:
        """What is in a text; below the limit too, so that a decision shows what came close."""
