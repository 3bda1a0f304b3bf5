"""The distribution that a token is drawn from: its truncation, log-probabilities, and inverse-CDF sampling.

Top-k, top-p, min-p and typical sampling each cut what the ones before leave. One uniform number gives one token.
Log-probabilities are by the model's own logits, or by the truncated distribution.

No function of the truncation lets a row's bits depend on the other rows of the batch: what is computed over whole rows is
computed row by row in a fixed order.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bessemer.inference.sampling.params import SamplingParams

# Shapes: B batch, N candidates, U partial sums of candidates.

#: Candidates that are summed at once: only the sum that the number falls in is looked into.
_SUMMED = 256


def draw(weights_BN: Tensor, uniforms_B: Tensor) -> Tensor:
    """For each row the first place whose cumulative share of the weights exceeds the row's number; int64 (B,).

    weights_BN: float32, at least 0, not normalised. uniforms_B: float64 in [0, 1). Never a place of weight 0. A row whose
    weights are all 0 or not finite gets -1.
    """
    size = weights_BN.shape[-1]
    cumulative_BU = _cumulative_sums(weights_BN)
    total_B = cumulative_BU[:, -1]
    usable_B = total_B.isfinite() & (total_B > 0)
    target_B1 = (uniforms_B * total_B)[:, None]
    sum_B1 = _first_above(cumulative_BU, target_B1)
    below_B1 = torch.where(sum_B1 > 0, cumulative_BU.gather(-1, (sum_B1 - 1).clamp(min=0)), 0.0)

    places_BN = sum_B1 * _SUMMED + torch.arange(min(_SUMMED, size), device=weights_BN.device)
    inside_BN = weights_BN.gather(-1, places_BN.clamp(max=size - 1)) * (places_BN < size)
    place_B1 = sum_B1 * _SUMMED + _first_above(inside_BN.double().cumsum(-1), target_B1 - below_B1)
    return torch.where(usable_B, place_B1[:, 0], -1)


def total_weights(weights_BN: Tensor) -> Tensor:
    """The sum of each row's weights as `draw` has it, float64 (B,)."""
    return _cumulative_sums(weights_BN)[:, -1]


def _cumulative_sums(weights_BN: Tensor) -> Tensor:
    """The sums of `_SUMMED` weights each, the last one of fewer, added up; float64 (B, U)."""
    size = weights_BN.shape[-1]
    main = size // _SUMMED * _SUMMED
    sums = [weights_BN[:, :main].unflatten(-1, (-1, _SUMMED)).sum(-1)] if main else []
    if main < size:
        sums.append(weights_BN[:, main:].sum(-1, keepdim=True))
    return torch.cat(sums, -1).double().cumsum(-1)


def _first_above(cumulative_BN: Tensor, target_B1: Tensor) -> Tensor:
    """The first place whose cumulative weight exceeds the target; where rounding leaves none, the last that has a weight."""
    last_B1 = torch.searchsorted(cumulative_BN, cumulative_BN[:, -1:].contiguous())
    found_B1 = torch.searchsorted(cumulative_BN, target_B1.contiguous(), right=True)
    return torch.minimum(found_B1, last_B1).clamp(max=cumulative_BN.shape[-1] - 1)


def uniform(generator: torch.Generator) -> float:
    """The next number of a request's own generator, in [0, 1)."""
    return torch.rand(1, dtype=torch.float64, generator=generator).item()


class RewindableUniforms:
    """The next numbers of a request's own generator, which can be rewound to behind the first few."""

    def __init__(self, generator: torch.Generator, count: int) -> None:
        self._generator = generator
        self._before = generator.get_state()
        self.numbers: list[float] = torch.rand(count, dtype=torch.float64, generator=generator).tolist()

    def use(self, count: int) -> None:
        """Rewind the generator to behind the first `count` numbers."""
        if count < len(self.numbers):
            self._generator.set_state(self._before)
            torch.rand(count, dtype=torch.float64, generator=self._generator)


# Shapes: B batch, V vocabulary, K kept by top-k, N candidates (V or K).

#: Top-k looks for the largest in columns of this length: one pass over their maxima leaves few to sort.
_COLUMN = 64


class Truncation(NamedTuple):
    """The settings that leave tokens out. Rows with equal settings are computed together."""

    top_k: int
    top_p: float
    min_p: float
    typical_p: float

    @classmethod
    def of(cls, params: SamplingParams) -> Truncation:
        """The truncation of a request."""
        return cls(params.top_k, params.top_p, params.min_p, params.typical_p)


#: Every token may be drawn.
NO_TRUNCATION = Truncation(0, 1.0, 0.0, 1.0)


class Candidates(NamedTuple):
    """The distribution to draw from: weights of candidate tokens (not normalised), float32 (B, N).

    `tokens_BN` are their ids in ascending order, None where they are the whole vocabulary. is_softmax: whether a weight above 0
    is the token's share of the whole vocabulary, which top-k does not compute.
    """

    weights_BN: Tensor
    tokens_BN: Tensor | None
    is_softmax: bool = False

    def part(self, rows: Sequence[int]) -> Candidates:
        """Some of the rows; the same tensors where these are all."""
        if len(rows) == len(self.weights_BN):
            return self
        return self._replace(
            weights_BN=self.weights_BN[rows], tokens_BN=None if self.tokens_BN is None else self.tokens_BN[rows]
        )

    def draw(self, uniforms_B: Tensor) -> list[int]:
        """A token for each row by a number in [0, 1), as `inverse_cdf.draw`; -1 where the weights are not finite or all 0."""
        places_B = draw(self.weights_BN, uniforms_B)
        if self.tokens_BN is not None:
            tokens_B = self.tokens_BN.gather(-1, places_B.clamp(min=0)[:, None])[:, 0]
            places_B = torch.where(places_B < 0, -1, tokens_B)
        return places_B.tolist()

    def weights_of(self, tokens_B: Tensor) -> Tensor:
        """The weight of a candidate of each row, (B,)."""
        tokens_B1 = tokens_B[:, None]
        places_B1 = tokens_B1 if self.tokens_BN is None else torch.searchsorted(self.tokens_BN, tokens_B1)
        return self.weights_BN.gather(-1, places_B1)[:, 0]

    def totals(self) -> Tensor:
        """The sum of each row's weights, float64 (B,)."""
        return total_weights(self.weights_BN)

    def dense(self, vocab_size: int) -> Tensor:
        """Probabilities of the whole vocabulary, float32 (B, V)."""
        probabilities_BN = self.weights_BN / self.weights_BN.double().sum(-1, keepdim=True).float()
        if self.tokens_BN is None:
            return probabilities_BN
        return probabilities_BN.new_zeros(len(probabilities_BN), vocab_size).scatter_(-1, self.tokens_BN, probabilities_BN)


def truncated_logits(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    """Logits whose softmax is the distribution to sample from; -inf for tokens that are left out. As `transformers`' warpers.

    Divided by the temperature (above 0); then left out, in this order: all below the k-th largest (ties with it stay); the
    least likely that together have at most 1 - top_p (Holtzman et al. 2020); those less likely than min_p times the
    likeliest (Nguyen et al. 2024); those farthest from the expected surprise (Meister et al. 2022). One always stays.
    """
    scaled_BV = logits_BV / logits_BV.new_tensor(params.temperature)
    if 0 < params.top_k < logits_BV.shape[-1]:
        scaled_BV = scaled_BV.masked_fill(scaled_BV < scaled_BV.topk(params.top_k).values[..., -1:], -torch.inf)
    kept_BV = _kept(scaled_BV, scaled_BV.softmax(-1), Truncation.of(params))
    return scaled_BV if kept_BV is None else scaled_BV.masked_fill(~kept_BV, -torch.inf)


def candidates(logits_BV: Tensor, temperatures_B: Tensor, truncation: Truncation) -> list[tuple[list[int], Candidates]]:
    """The softmax of `truncated_logits`, of rows with one truncation and each its own temperature: in parts, with their rows.

    With top-k only its candidates are computed with; rows in which more than k stay, because of a tie at the edge, are
    computed whole, so that is a part of its own. `logits_BV`: float32, on the host.
    """
    every = list(range(len(logits_BV)))
    if not 0 < truncation.top_k < logits_BV.shape[-1]:
        return [(every, _softmax(logits_BV, temperatures_B, truncation, None)._replace(is_softmax=True))]
    values_BK, tokens_BK = largest(logits_BV, truncation.top_k + 1)
    edge_B1, next_B1 = values_BK[:, -2:-1], values_BK[:, -1:]
    tied_B = (edge_B1 == next_B1)[:, 0].tolist()
    parts = []
    if rows := [row for row in every if not tied_B[row]]:
        chosen = slice(None) if len(rows) == len(every) else rows
        tokens_BN = tokens_BK[chosen, :-1].sort(-1).values
        some_BN = logits_BV[chosen].gather(-1, tokens_BN)
        parts.append((rows, _softmax(some_BN, temperatures_B[chosen], truncation, tokens_BN)))
    if rows := [row for row in every if tied_B[row]]:
        whole_BV = logits_BV[rows]
        whole_BV = whole_BV.masked_fill(whole_BV < edge_B1[rows], -torch.inf)
        parts.append((rows, _softmax(whole_BV, temperatures_B[rows], truncation, None)))
    return parts


def _softmax(logits_BN: Tensor, temperatures_B: Tensor, truncation: Truncation, tokens_BN: Tensor | None) -> Candidates:
    if truncation.typical_p < 1:
        scaled_BN = logits_BN / temperatures_B[:, None]
        weights_BN = scaled_BN.softmax(-1)
    elif (temperatures_B == 1).all():
        scaled_BN, weights_BN = logits_BN, logits_BN.softmax(-1)
    else:
        # in place: fresh memory for a whole vocabulary costs more than the softmax
        scaled_BN = logits_BN / temperatures_B[:, None]
        weights_BN = torch.softmax(scaled_BN, -1, out=scaled_BN)
    kept_BN = _kept(scaled_BN, weights_BN, truncation)
    return Candidates(weights_BN if kept_BN is None else weights_BN.mul_(kept_BN), tokens_BN)


def largest(logits_BV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest values of each row in falling order, (B, count), and where they are; of equal ones at the end, any."""
    vocab_size = logits_BV.shape[-1]
    columns = vocab_size // _COLUMN
    if 2 * count > columns:
        return logits_BV.topk(count)
    # column j holds the entries j, j + columns, j + 2 columns, …: the count largest lie in as many columns, those
    # with the largest maxima
    columns_BUC = logits_BV[:, : columns * _COLUMN].unflatten(-1, (_COLUMN, columns))
    chosen_BC = columns_BUC.amax(1).topk(count).indices
    places_BN = (chosen_BC[:, None] + torch.arange(0, columns * _COLUMN, columns)[:, None]).flatten(1)
    rest = torch.arange(columns * _COLUMN, vocab_size).expand(len(logits_BV), -1)
    places_BN = torch.cat([places_BN, rest], -1)
    values_BK, chosen_BK = logits_BV.gather(-1, places_BN).topk(count)
    return values_BK, places_BN.gather(-1, chosen_BK)


def _kept(scaled_BN: Tensor, probabilities_BN: Tensor, truncation: Truncation) -> Tensor | None:
    """Which candidates top-p, min-p and typical leave, bool (B, N); None: all."""
    kept_BN = None
    if truncation.top_p < 1:
        kept_BN = _rows(_nucleus, probabilities_BN, top_p=truncation.top_p)
    if truncation.min_p > 0:
        likely_BN = probabilities_BN >= truncation.min_p * probabilities_BN.amax(-1, keepdim=True)
        kept_BN = likely_BN if kept_BN is None else kept_BN & likely_BN
    if truncation.typical_p < 1:
        if kept_BN is not None:
            scaled_BN = scaled_BN.masked_fill(~kept_BN, -torch.inf)
        typical_BN = _rows(_typical, scaled_BN.softmax(-1), scaled_BN.log_softmax(-1), mass=truncation.typical_p)
        kept_BN = typical_BN if kept_BN is None else kept_BN & typical_BN
    return kept_BN


def _rows(function: Callable[..., np.ndarray], *tensors_BN: Tensor, **values: float) -> Tensor:
    """The results of a function of a row for each row, stacked."""
    arrays = [tensor_BN.numpy() for tensor_BN in tensors_BN]
    return torch.from_numpy(np.stack([function(*rows, **values) for rows in zip(*arrays, strict=True)]))


def _nucleus(probabilities_N: np.ndarray, top_p: float) -> np.ndarray:
    """Which tokens have less than top_p in those likelier than they; of equal ones, the later count as the likelier."""
    size = len(probabilities_N)
    # all below this share together have less than 1 - top_p, so none of them is in
    possible_N = probabilities_N >= (1 - top_p) / size
    # where they are many, selecting them costs more than sorting all
    some = probabilities_N if np.count_nonzero(possible_N) > size // 8 else probabilities_N[possible_N]
    if not len(some):
        # all probabilities are NaN, which no comparison selects; the draw finds no token
        return np.ones(size, np.bool_)
    falling = np.sort(some)[::-1]
    count = 1 + int(np.searchsorted(np.cumsum(falling[:-1], dtype=np.float64), top_p))
    edge = falling[count - 1]
    kept_N = probabilities_N >= edge
    surplus = np.count_nonzero(kept_N) - count
    if surplus:
        kept_N[np.flatnonzero(probabilities_N == edge)[:surplus]] = False
    return kept_N


def _typical(probabilities_N: np.ndarray, log_probs_N: np.ndarray, mass: float) -> np.ndarray:
    """Which tokens' surprise is nearest to the entropy, as many as reach `mass`, those equally near to the last included."""
    with np.errstate(invalid="ignore"):
        # 0 · -inf is 0 here
        entropy = -np.nansum(probabilities_N * log_probs_N)
    distances_N = np.abs(-log_probs_N - entropy)
    nearest_N = np.argsort(distances_N, kind="stable")
    count = int(np.count_nonzero(np.cumsum(probabilities_N[nearest_N], dtype=np.float64) < mass))
    return distances_N <= distances_N[nearest_N[min(count, len(nearest_N) - 1)]]


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
    of_rows = []
    # few rows at a time: a whole prompt's log-probabilities of a whole vocabulary would fill the memory
    for start in range(0, len(tokens), _ROWS):
        some = slice(start, start + _ROWS)
        of_rows += _log_probs(logits_RV[some].float().log_softmax(-1).cpu(), tokens[some], counts[some])
    return of_rows


def sampler_log_probs(
    logits_BV: Tensor, temperatures_B: Tensor, distribution: Candidates, tokens: Sequence[int], params: Sequence[SamplingParams]
) -> dict[int, LogProbs]:
    """Log-probabilities of the tokens of those rows that want them of the sampler's distribution, by row.

    logits_BV: after biases, penalties and bans, on the host. distribution: that the tokens were drawn from; -1 is no token.
    `temperature`: log softmax(logits / temperature), before truncation. `sampled`: truncated and renormalised, and the
    likeliest are those of the tokens that stay.

    They are read off the weights, except for the likeliest tokens, and for `temperature` with top-k: these need a softmax over
    the vocabulary.
    """
    alike: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for row, (token, own) in enumerate(zip(tokens, params, strict=True)):
        if token >= 0 and own.wants_sampler_log_probs:
            alike[own.logprobs_mode, bool(own.logprobs)].append(row)
    result: dict[int, LogProbs] = {}
    for (mode, has_likeliest), rows in alike.items():
        part, chosen = distribution.part(rows), [tokens[row] for row in rows]
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
