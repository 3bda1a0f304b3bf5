"""The sampler on the device: a token for each row of logits, without a copy of the logits to the host.

Sampling parameters are put into arrays that are copied with the numbers of the step. All rows go through the same operations;
one that no row needs is left out. Nothing here waits for the device: no shape and no branch depends on the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from bessemer.core.errors import RequestError
from bessemer.inference.sampling.distribution import draw, uniform
from bessemer.inference.sampling.sampler import NO_TOKEN_LEFT, NOT_FINITE, SamplingState

# Shapes: R rows, V vocabulary, P rows with penalties, A rows with allowed tokens, E entries (a row and a token each).

#: In place of a token: the logits are not finite; they leave none.
_NOT_FINITE, _NONE_LEFT = -1, -2

#: Puts numbers into the inputs of a step (`StepInputs.put`).
Put = Callable[[ArrayLike, torch.dtype], Tensor]


def token_problem(token: int) -> RequestError | None:
    """What is wrong where a row gives no token; None where it gives one."""
    if token >= 0:
        return None
    return RequestError(NO_TOKEN_LEFT if token == _NONE_LEFT else NOT_FINITE)


@dataclass
class _Entries:
    """Numbers of some tokens of some rows."""

    rows: list[np.ndarray] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)

    def add(self, row: int, tokens: np.ndarray, values: np.ndarray | None = None) -> None:
        if len(tokens):
            self.rows.append(np.full(len(tokens), row))
            self.tokens.append(tokens)
            if values is not None:
                self.values.append(values)

    def place(self, put: Put) -> tuple[Tensor, Tensor] | None:
        """Rows and tokens, (2, E), and the values, (E,); None where there are no entries."""
        if not self.rows:
            return None
        pairs_2E = put([np.concatenate(self.rows), np.concatenate(self.tokens)], torch.int64)
        return pairs_2E, put(np.concatenate(self.values) if self.values else [], torch.float32)


class _Penalties(NamedTuple):
    """Of P rows: which, their penalties, (P, 1), the tokens of prompt and answer that are known, and which row's last token is
    among those sampled in the step before: (2, …), places in P and places among those tokens."""

    rows_P: Tensor
    repetition_P1: Tensor
    presence_P1: Tensor
    frequency_P1: Tensor
    in_prompt: tuple[Tensor, Tensor] | None
    made: tuple[Tensor, Tensor] | None
    pending: Tensor | None


class _Changes(NamedTuple):
    """Changes of the logits, in the order in which they are made."""

    bias: tuple[Tensor, Tensor] | None
    penalties: _Penalties | None
    banned: tuple[Tensor, Tensor] | None
    #: The rows with allowed tokens, (A,), and the entries that are allowed, (2, E): a place among the A rows and a token each.
    allowed: tuple[Tensor, tuple[Tensor, Tensor]] | None
    #: End tokens that may not come yet.
    early: tuple[Tensor, Tensor] | None


class _Draws(NamedTuple):
    """Of all rows, (R,) or (R, 1): whether the likeliest is taken, and how else a token is drawn. None: no row asks for it."""

    greedy_R: Tensor
    uniforms_R: Tensor
    temperatures_R1: Tensor
    top_k_R1: Tensor | None
    most_k: int
    top_p_R1: Tensor | None
    min_p_R1: Tensor | None


class SampledRows:
    """The rows that a step samples from; all of requests that are `SamplingState.on_device`.

    Each takes a number of its request's generator, as `sample_rows` does, and gets the same token, but for how sums are
    rounded. The requests' answers stay as they are: `SamplingState.advance` adds the token when the host has read it.
    """

    def __init__(self, states: Sequence[SamplingState], pending: Mapping[int, int] | None = None) -> None:
        """pending: of rows whose request has a token that the host does not know yet, its place among those sampled in the
        step before."""
        self._states = states
        self._pending = pending or {}
        self._numbers = [0.0 if state.greedy else uniform(state.generator) for state in states]
        #: Whether the rows' numbers are in the inputs of a step.
        self.placed = False
        self._changes: _Changes | None = None
        self._draws: _Draws | None = None

    def place(self, put: Put) -> None:
        """Put the rows' numbers into the inputs of a step, before they are copied."""
        self.placed = True
        self._changes = self._put_changes(put)
        if not all(state.greedy for state in self._states):
            self._draws = self._put_draws(put)

    def draw(self, logits_RV: Tensor, sampled: Tensor) -> Tensor:
        """A token of each row, (R,) int64; below 0 where it gives none (`token_problem`).

        logits_RV: float32, on the device; they stay as they are. sampled: the tokens of the step before.
        """
        assert self.placed
        if self._changes is not None:
            logits_RV = _changed(logits_RV, self._changes, sampled)
        best_R1 = logits_RV.argmax(-1, keepdim=True)
        largest_R1 = logits_RV.gather(-1, best_R1)
        tokens_R = torch.where(largest_R1.isfinite(), best_R1, _NOT_FINITE)[:, 0]
        if self._draws is not None:
            drawn_R = _drawn(logits_RV, self._draws)
            tokens_R = torch.where(self._draws.greedy_R, tokens_R, drawn_R)
        return torch.where((tokens_R < 0) & (largest_R1[:, 0] == -torch.inf), _NONE_LEFT, tokens_R)

    def _put_draws(self, put: Put) -> _Draws:
        params = [state.params for state in self._states]
        # as many as there are leave none out
        top_k = [own.top_k if own.top_k < state.vocab_size else 0 for own, state in zip(params, self._states, strict=True)]
        return _Draws(
            put([state.greedy for state in self._states], torch.bool),
            put(self._numbers, torch.float64),
            put([[1.0 if own.greedy else own.temperature] for own in params], torch.float32),
            put([[k] for k in top_k], torch.int64) if any(top_k) else None,
            max(top_k),
            put([[own.top_p] for own in params], torch.float64) if any(own.top_p < 1 for own in params) else None,
            put([[own.min_p] for own in params], torch.float32) if any(own.min_p > 0 for own in params) else None,
        )

    def _put_changes(self, put: Put) -> _Changes | None:
        bias, banned, early, allowed = _Entries(), _Entries(), _Entries(), _Entries()
        allowing: list[int] = []
        penalised: list[int] = []
        for row, state in enumerate(self._states):
            length = len(state.answer) + (row in self._pending)
            if not state.adjusts_after(length):
                continue
            bias.add(row, *state.rules.bias)
            banned.add(row, state.rules.banned)
            if state.rules.allowed is not None:
                allowed.add(len(allowing), state.rules.allowed)
                allowing.append(row)
            if length < state.params.min_tokens:
                early.add(row, state.ends_array)
            if state.penalises:
                penalised.append(row)
        allowed_entries = allowed.place(put)
        changes = _Changes(
            bias.place(put),
            self._put_penalties(penalised, put) if penalised else None,
            banned.place(put),
            None if allowed_entries is None else (put(allowing, torch.int64), allowed_entries),
            early.place(put),
        )
        return changes if any(change is not None for change in changes) else None

    def _put_penalties(self, penalised: Sequence[int], put: Put) -> _Penalties:
        in_prompt, made = _Entries(), _Entries()
        for place, row in enumerate(penalised):
            counts = self._states[row].counts
            in_prompt.add(place, counts.in_prompt)
            made.add(place, *counts.made)
        params = [self._states[row].params for row in penalised]
        pending = [(place, self._pending[row]) for place, row in enumerate(penalised) if row in self._pending]
        return _Penalties(
            put(penalised, torch.int64),
            put([[own.repetition_penalty] for own in params], torch.float32),
            put([[own.presence_penalty] for own in params], torch.float32),
            put([[own.frequency_penalty] for own in params], torch.float32),
            in_prompt.place(put),
            made.place(put),
            put([*zip(*pending, strict=True)], torch.int64) if pending else None,
        )


def _changed(logits_RV: Tensor, changes: _Changes, sampled: Tensor) -> Tensor:
    """Logits with the rows' changes, as `SamplingState.adjust`; a copy."""
    logits_RV = logits_RV.clone()
    if changes.bias is not None:
        (rows_E, tokens_E), values_E = changes.bias
        logits_RV[rows_E, tokens_E] += values_E
    if changes.penalties is not None:
        rows_P = changes.penalties.rows_P
        logits_RV.index_copy_(0, rows_P, _penalised(logits_RV[rows_P], changes.penalties, sampled))
    _forbid(logits_RV, changes.banned)
    if changes.allowed is not None:
        rows_A, ((places_E, tokens_E), _) = changes.allowed
        kept_AV = torch.full_like(logits_RV[rows_A], -torch.inf)
        kept_AV[places_E, tokens_E] = logits_RV[rows_A[places_E], tokens_E]
        logits_RV.index_copy_(0, rows_A, kept_AV)
    _forbid(logits_RV, changes.early)
    return logits_RV


def _forbid(logits_RV: Tensor, entries: tuple[Tensor, Tensor] | None) -> None:
    if entries is not None:
        (rows_E, tokens_E), _ = entries
        logits_RV.view(-1).index_fill_(0, rows_E * logits_RV.shape[-1] + tokens_E, -torch.inf)


def _penalised(logits_PV: Tensor, penalties: _Penalties, sampled: Tensor) -> Tensor:
    """As `change_logits`, with the tokens that the host does not know yet."""
    counts_PV = torch.zeros_like(logits_PV)
    if penalties.made is not None:
        (places_E, tokens_E), values_E = penalties.made
        counts_PV[places_E, tokens_E] = values_E
    if penalties.pending is not None:
        places_E, sources_E = penalties.pending
        tokens_E = sampled[sources_E].clamp(min=0)
        counts_PV[places_E, tokens_E] += 1
    is_made_PV = counts_PV > 0
    is_present_PV = is_made_PV
    if penalties.in_prompt is not None:
        (places_E, tokens_E), _ = penalties.in_prompt
        is_present_PV = is_made_PV.clone()
        is_present_PV.view(-1).index_fill_(0, places_E * logits_PV.shape[-1] + tokens_E, True)
    repeated_PV = torch.where(logits_PV < 0, logits_PV * penalties.repetition_P1, logits_PV / penalties.repetition_P1)
    logits_PV = torch.where(is_present_PV, repeated_PV, logits_PV)
    taken_PV = penalties.frequency_P1 * counts_PV + penalties.presence_P1
    return torch.where(is_made_PV, logits_PV - taken_PV, logits_PV)


def _drawn(logits_RV: Tensor, draws: _Draws) -> Tensor:
    """Draw by inverse CDF from the softmax of `truncated_logits`, (R,); -1 where the weights are not finite."""
    if draws.top_k_R1 is not None:
        falling_RK = logits_RV.topk(draws.most_k).values
        edge_R1 = falling_RK.gather(-1, (draws.top_k_R1 - 1).clamp(min=0))
        logits_RV = torch.where((draws.top_k_R1 > 0) & (logits_RV < edge_R1), -torch.inf, logits_RV)
    weights_RV = (logits_RV / draws.temperatures_R1).softmax(-1)
    kept_RV = None
    if draws.top_p_R1 is not None:
        kept_RV = _nucleus(weights_RV, draws.top_p_R1)
    if draws.min_p_R1 is not None:
        likely_RV = weights_RV >= draws.min_p_R1 * weights_RV.amax(-1, keepdim=True)
        kept_RV = likely_RV if kept_RV is None else kept_RV & likely_RV
    return draw(weights_RV if kept_RV is None else weights_RV * kept_RV, draws.uniforms_R)


def _nucleus(weights_RV: Tensor, top_p_R1: Tensor) -> Tensor:
    """Which tokens have less than top_p in those likelier than they; of equal ones, the later count as the likelier."""
    rising_RV, order_RV = weights_RV.sort(dim=-1, stable=True)
    likelier_RV = rising_RV.flip(-1).double().cumsum(-1)[:, :-1] < top_p_R1
    # the likeliest always stays
    kept_RV = torch.nn.functional.pad(likelier_RV, (1, 0), value=True).flip(-1) | (top_p_R1 >= 1)
    return torch.empty_like(kept_RV).scatter_(-1, order_RV, kept_RV)
