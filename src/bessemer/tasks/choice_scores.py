"""By what the log-likelihoods of choices are compared, since longer choices are less likely."""

from __future__ import annotations

from collections.abc import Sequence

from bessemer.tasks.questions import ContinuationScore


def choice_scores(
    scores: Sequence[ContinuationScore], choices: Sequence[str], alone: Sequence[ContinuationScore] | None = None
) -> dict[str, list[float]]:
    """Of each normalisation, a number for each choice, of which the greatest is chosen. In nats, or nats per unit.

    alone: the choices' scores without the question. `characters` is acc_norm of lm-evaluation-harness, `bytes` its acc_bytes,
    `unconditional` its acc_mutual_info (Brown et al. 2020, section 2.4, as a difference of logarithms). `distinct_tokens`
    leaves out the tokens that all choices begin with (CORE).
    """
    totals = [score.total for score in scores]
    common = _common_tokens([score.token_ids for score in scores])
    compared = {
        "raw": totals,
        "tokens": [total / len(score.token_ids) for total, score in zip(totals, scores, strict=True)],
        "characters": [total / len(choice) for total, choice in zip(totals, choices, strict=True)],
        "bytes": [total / len(choice.encode()) for total, choice in zip(totals, choices, strict=True)],
        "distinct_tokens": [sum(score.log_probs[common:]) / (len(score.log_probs) - common) for score in scores],
    }
    if alone is not None:
        compared["unconditional"] = [total - score.total for total, score in zip(totals, alone, strict=True)]
    return compared


def _common_tokens(token_ids: Sequence[Sequence[int]]) -> int:
    """How many tokens all begin with, and at most all but one of the shortest."""
    shortest = min(map(len, token_ids))
    return next((place for place in range(shortest - 1) if len({ids[place] for ids in token_ids}) > 1), shortest - 1)


def greatest(values: Sequence[float]) -> int:
    """Where the greatest value stands; of equal ones the first."""
    return max(range(len(values)), key=values.__getitem__)
