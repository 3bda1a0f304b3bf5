"""Pairs of a preferred and a rejected answer: those of files, and those that stages above have made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bessemer.posttraining.dataset import read_examples
from bessemer.posttraining.formats import Pair, as_pair
from bessemer.posttraining.made import MISMATCHED, data_path
from bessemer.posttraining.mismatched import mismatched_pairs
from bessemer.posttraining.splits import opening, split_examples


def gather_pairs(
    names: Sequence[str], folder: Path, made: Mapping[str, Path], share: float, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs of all data that are named: of rows, `share` of the prompts are held out; of `made/mismatched`
    what the conversations were.

    made: what stages above have made, by name. Raises SourceError or ArtefactError for pairs that are missing or malformed.
    """
    mismatched: tuple[list[Pair], list[Pair]] = ([], [])
    if MISMATCHED in names:
        mismatched = mismatched_pairs(data_path(MISMATCHED, folder, made), seed)
    rows = [pair for name in names if name != MISMATCHED for pair in read_examples(data_path(name, folder, made), as_pair)]
    training, held_out = split_examples(rows, lambda pair: opening(pair.prompt), share, seed)
    return [*mismatched[0], *training], [*mismatched[1], *held_out]
