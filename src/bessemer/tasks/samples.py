"""Figures of several samples of one item."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from math import comb


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that at least one of k samples is right: 1 − C(n − c, k) / C(n, k), unbiased (Chen et al. 2021, eq. 1).

    samples: n, of which `right`, c, are right. Raises ValueError for k outside 1 … n or c outside 0 … n.
    """
    if not (1 <= k <= samples and 0 <= right <= samples):
        raise ValueError(f"pass@{k} of {samples} samples, {right} right: k must be 1 to n, and c at most n")
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def pass_at_powers(samples: int, right: int) -> dict[str, float]:
    """`pass@k` for k of 2, 4, 8 … and all samples; empty for a single sample, whose pass@1 is its score."""
    if samples == 1:
        return {}
    sizes = [size for power in range(1, samples.bit_length()) if (size := 1 << power) < samples]
    return {f"pass@{k}": pass_at_k(samples, right, k) for k in [*sizes, samples]}


def majority(answers: Sequence[Hashable | None]) -> int | None:
    """Where the commonest answer stands first; of equally common ones the first, None where there is no answer at all.

    None is a sample without an answer, which has no vote (Wang et al. 2022, section 2).
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return answers.index(votes.most_common(1)[0][0]) if votes else None
