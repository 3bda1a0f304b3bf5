"""Admission: whether a waiting sequence should start beside the running ones."""

from __future__ import annotations

from collections.abc import Iterable

from bessemer.inference.scheduling.block_tables import BlockTables
from bessemer.inference.scheduling.sequence import TokenSequence


def kept_back(running: Iterable[TokenSequence], tables: BlockTables, chunk: int) -> list[int]:
    """Per group: the blocks that running prompts have yet to take, and one for every running sequence to grow into.

    A sequence that took these would be admitted only to be preempted. The sum of those of each sequence.
    """
    needs = [tables.outstanding(sequence, chunk) for sequence in running]
    return [len(needs) + sum(missing) for missing in zip(*needs, strict=True)] if needs else [0] * len(tables.groups)


def is_coming(sequence: TokenSequence, hit: int, running: list[TokenSequence], tables: BlockTables) -> bool:
    """Whether a running prompt is about to compute at least half of what a waiting sequence lacks: then it pays to wait.

    Requests that share a long prefix often arrive together. The running sequence advances, or is preempted, which ends the
    wait. The position where the two part is added to its `partings`, so that it keeps its state there.
    """
    size = tables.block_size
    if len(sequence.chain) < 2:  # shorter than a block, it shares none
        return False
    lacks = len(sequence.tokens) - hit * size
    for other in running:
        if len(other.tokens) - other.computed > 1:
            common = tables.common(sequence, other) * size
            if common > other.computed and 2 * (common - hit * size) >= lacks:
                other.partings.add(common)
                return True
    return False
