"""Log-probabilities of given tokens, and whether each is the likeliest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bessemer.core.errors import RequestError
from bessemer.inference.sampling.sampler import NOT_FINITE, likeliest

# Shapes: R rows, V vocabulary, K tokens of a row.

#: Rows whose log-probabilities of the whole vocabulary are there at once.
_ROWS = 16


def token_scores(logits_RV: Tensor, tokens_RK: Sequence[Sequence[int]]) -> tuple[list[list[float]], list[list[bool]]]:
    """Of K tokens in each row: log-probabilities (natural logarithm) by the row's logits, and whether each is what greedy
    decoding takes, the likeliest, of equals the first.

    Raises RequestError where logits are not finite.
    """
    values_RK: list[list[float]] = []
    greedy_RK: list[list[bool]] = []
    for start in range(0, len(tokens_RK), _ROWS):
        logits_BV, tokens_BK = logits_RV[start : start + _ROWS], tokens_RK[start : start + _ROWS]
        best_B = likeliest(logits_BV)
        if min(best_B) < 0:
            raise RequestError(NOT_FINITE)
        ids_BK = torch.tensor(tokens_BK, device=logits_BV.device)
        values_RK += logits_BV.log_softmax(-1).gather(-1, ids_BK).tolist()
        greedy_RK += [[token == best for token in tokens] for tokens, best in zip(tokens_BK, best_B, strict=True)]
    return values_RK, greedy_RK
