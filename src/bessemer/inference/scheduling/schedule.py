"""What a step computes, as the scheduler plans it and the loop carries it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from bessemer.inference.scheduling.sequence import TokenSequence


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Compute (tokens + draft)[start : start + count] of a sequence; the last `drafts` of them are proposals."""

    sequence: TokenSequence
    start: int
    count: int
    drafts: int

    @property
    def wants(self) -> int:
        """Logits wanted, of the last so many tokens: 1 + drafts, or 0 where more known tokens follow. Asked before commit."""
        known_end = self.start + self.count - self.drafts
        return 0 if known_end < len(self.sequence.tokens) else 1 + self.drafts


class SchedulerOutput(NamedTuple):
    """One step. Before anything is computed, in this order: copies, (group, from block, to block), and restored, (snapshot,
    state slot). While it is computed, states are saved in each sequence's `snapshots`."""

    works: list[ScheduledChunk]
    copies: list[tuple[int, int, int]]
    preempted: list[TokenSequence]
    restored: list[tuple[int, int]]
