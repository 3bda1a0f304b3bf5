"""Log-probabilities of tokens: by the model's own logits, or by the distribution that the sampler draws from."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bessemer.inference.sampling.params import SamplingParams
from bessemer.inference.sampling.truncation import Candidates, largest

# Shapes: R rows, B batch, V vocabulary, K likeliest.

_ROWS = 16


class LogProbs(NamedTuple):
    """A token's log-probability (natural logarithm), and the likeliest tokens with theirs in falling order."""

    token: float
    top: tuple[tuple[int, float], ...] = ()


def log_probs(logits_RV: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[LogProbs]:
    """Log-probabilities of a token in each row by the model's own logits (`raw`), before temperature, penalties and truncation,
    with those of the row's `counts[r]` likeliest tokens.

    Of a prompt, row r is the logits after token r and `tokens[r]` the prompt's token r + 1. Of equally likely tokens the
    one with the smaller id comes first.
    """
    found = []
    # few rows at a time: a whole prompt's log-probabilities of a whole vocabulary would fill the memory
    for start in range(0, len(tokens), _ROWS):
        some = slice(start, start + _ROWS)
        found += _log_probs(logits_RV[some].float().log_softmax(-1).cpu(), tokens[some], counts[some])
    return found


def sampler_log_probs(
    logits_BV: Tensor, temperatures_B: Tensor, found: Candidates, tokens: Sequence[int], params: Sequence[SamplingParams]
) -> dict[int, LogProbs]:
    """Log-probabilities of the tokens of those rows that want them of the sampler's distribution, by row.

    logits_BV: after biases, penalties and bans, on the host. found: what the tokens were drawn from; a token is -1 where none
    was. `temperature`: log softmax(logits / temperature), before truncation. `sampled`: truncated and renormalised, and the
    likeliest are those of the tokens that stay.

    Of weights that are there already. A softmax over the vocabulary is computed for `temperature` beside top-k, and for the
    likeliest tokens.
    """
    alike: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for row, (token, own) in enumerate(zip(tokens, params, strict=True)):
        if token >= 0 and own.wants_sampler_log_probs:
            alike[own.logprobs_mode, bool(own.logprobs)].append(row)
    result: dict[int, LogProbs] = {}
    for (mode, has_likeliest), rows in alike.items():
        part, chosen = found.part(rows), [tokens[row] for row in rows]
        if has_likeliest or (mode == "temperature" and not part.is_softmax):
            if mode == "temperature":
                log_probs_RV = (logits_BV[rows] / temperatures_B[rows, None]).log_softmax(-1)
            else:
                log_probs_RV = part.dense(logits_BV.shape[-1]).log()
            of_rows = _log_probs(log_probs_RV, chosen, [params[row].logprobs or 0 for row in rows])
            of_rows = [LogProbs(own, tuple(pair for pair in top if pair[1] > -torch.inf)) for own, top in of_rows]
        else:
            weights = part.weights_of(torch.tensor(chosen)).tolist()
            totals = [1.0] * len(rows) if mode == "temperature" else part.totals().tolist()
            of_rows = [LogProbs(math.log(weight / total)) for weight, total in zip(weights, totals, strict=True)]
        result |= zip(rows, of_rows, strict=True)
    return result


def certain(token: int, params: SamplingParams) -> LogProbs:
    """The log-probability of a token that was not drawn, at temperature 0: the limit of softmax(logits / temperature)."""
    return LogProbs(0.0, ((token, 0.0),) if params.logprobs else ())


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
