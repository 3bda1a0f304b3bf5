"""Admission: whether a waiting sequence should start beside the running ones."""

from __future__ import annotations

from bessemer.inference.scheduling.block_tables import BlockTables
from bessemer.inference.scheduling.sequence import TokenSequence


def fits(sequence: TokenSequence, hit: int, running: list[TokenSequence], tables: BlockTables, chunk: int) -> bool:
    """Whether the known tokens of a waiting sequence fit beside the running ones, with `hit` blocks found.

    Kept back are the blocks that running prompts have yet to take, and one for every running sequence to grow into; otherwise
    a sequence would be admitted only to be preempted. Alone, a sequence always fits: the scheduler refused it otherwise.
    """
    if not running:
        return True
    needs = [tables.outstanding(other, chunk) for other in running]
    kept_back = [len(needs) + sum(missing) for missing in zip(*needs, strict=True)]
    return tables.fits(sequence, hit, chunk, kept_back)


def is_coming(sequence: TokenSequence, hit: int, running: list[TokenSequence], tables: BlockTables) -> bool:
    """Whether a running prompt is about to compute at least half of what a waiting sequence lacks: then it pays to wait.

    Requests that share a long prefix often arrive together. The running sequence advances, or is preempted, which ends the
    wait. The position where the two part is added to its `partings`, so that it keeps its state there.
    """
    size = tables.block_size
    lacks = len(sequence.tokens) - hit * size
    for other in running:
        if len(other.tokens) - other.computed > 1:
            common = tables.common(sequence, other) * size
            if common > other.computed and 2 * (common - hit * size) >= lacks:
                other.partings.add(common)
                return True
    return False
