"""Metrics of a text against a reference: exact match, ROUGE-L."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


def exact_match(answer: str, reference: str) -> bool:
    """Whether two texts are equal up to white space: runs count as one space, none at the ends."""
    return answer.split() == reference.split()


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L (Lin 2004, section 3) as F1 over lower-case words, 0 to 1.

    Precision and recall are the length of the longest common subsequence over the number of the answer's and of the reference's
    words; a word is a run of letters, digits and underscores. 0 when either text has none.
    """
    answer_words, reference_words = _WORD.findall(answer.lower()), _WORD.findall(reference.lower())
    common = longest_common_subsequence(answer_words, reference_words)
    return 2 * common / (len(answer_words) + len(reference_words)) if common else 0.0


def longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(other) + 1)
    for item in one:
        diagonal = 0
        for index, candidate in enumerate(other, start=1):
            above = lengths[index]
            lengths[index] = diagonal + 1 if item == candidate else max(above, lengths[index - 1])
            diagonal = above
    return lengths[-1]
