"""Log-probabilities of tokens by the model's own logits: before temperature, penalties and truncation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.inference.sampling.truncation import largest

# Shapes: R rows, V vocabulary, K likeliest.

_ROWS = 16


class LogProbs(NamedTuple):
    """A token's log-probability (natural logarithm), and the likeliest tokens with theirs in falling order."""

    token: float
    top: tuple[tuple[int, float], ...] = ()


def log_probs(logits_RV: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[LogProbs]:
    """Log-probabilities of a token in each row, with those of the row's `counts[r]` likeliest tokens.

    Of a prompt, row r is the logits after token r and `tokens[r]` the prompt's token r + 1. Of equally likely tokens the
    one with the smaller id comes first.
    """
    found = []
    # few rows at a time: a whole prompt's log-probabilities of a whole vocabulary would fill the memory
    for start in range(0, len(tokens), _ROWS):
        some = slice(start, start + _ROWS)
        found += _log_probs(logits_RV[some].float().log_softmax(-1).cpu(), tokens[some], counts[some])
    return found


def _log_probs(log_probs_RV: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[LogProbs]:
    own = log_probs_RV.gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()
    most = min(max(counts), log_probs_RV.shape[-1])
    if most == 0:
        return [LogProbs(value) for value in own]
    values_RK, ids_RK = largest(log_probs_RV, most)
    return [
        LogProbs(value, tuple(sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))[:count]))
        for value, ids, values, count in zip(own, ids_RK.tolist(), values_RK.tolist(), counts, strict=True)
    ]
