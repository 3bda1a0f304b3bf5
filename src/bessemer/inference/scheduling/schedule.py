"""One scheduled step: what the scheduler decides and the engine core carries out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from bessemer.inference.scheduling.sequence import TokenSequence

#: (group, from block, to block), copied before anything is computed.
Copies = list[tuple[int, int, int]]


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Tokens of a sequence that a step computes: `(tokens + draft)[start : start + count]`.

    drafts: how many of the last of them are draft tokens. num_logits: logits that are wanted, of the last tokens of the
    chunk: 1 + drafts, or 0 where more known tokens follow.
    """

    sequence: TokenSequence
    start: int
    count: int
    drafts: int
    num_logits: int


class SchedulerOutput(NamedTuple):
    """One step. copies, (group, from block, to block), and then restored, (snapshot, state slot), come before the
    computation. States are saved in each sequence's `snapshots` while it runs."""

    chunks: list[ScheduledChunk]
    copies: Copies
    preempted: list[TokenSequence]
    restored: list[tuple[int, int]]
