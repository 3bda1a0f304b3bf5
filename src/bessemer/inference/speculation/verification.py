"""Verification of draft tokens: the completion keeps the distribution that it has without them.

A draft of d tokens is computed in one step with the token before it, which gives logits at 1 + d positions. Each draft token
is accepted or replaced by another, after which the rest of the draft is void; if all are accepted, the last position gives
one more. So a step makes 1 to 1 + d tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bessemer.core.errors import RequestError
from bessemer.inference.sampling.distribution import (
    Candidates,
    LogProbs,
    RewindableUniforms,
    candidates,
    log_probs,
    sampler_log_probs,
    uniform,
)
from bessemer.inference.sampling.sampler import (
    Sampled,
    SamplingState,
    choose,
    chosen_log_probs,
    likeliest,
    no_token,
    sample_rows,
)
from bessemer.inference.speculation.proposer import Draft

# Shapes: P positions (1 + d), d draft tokens, V vocabulary, N candidates, R rows.


def verify_rows(
    logits_RV: Tensor, states: Sequence[SamplingState], drafts: Sequence[Draft]
) -> list[list[Sampled] | RequestError]:
    """`verify` for several requests, computed together; an error in the place of one that gets no token.

    logits_RV: float32; 1 + d rows of each request, one request after the other. A request without a draft gets what
    `sample_rows` gives it.
    """
    assert len(logits_RV) == sum(1 + len(draft.tokens) for draft in drafts)
    logits_RV = logits_RV.detach()
    firsts, row = [], 0
    for draft in drafts:
        firsts.append(row)
        row += 1 + len(draft.tokens)
    of_requests: list[list[Sampled] | RequestError] = [[] for _ in states]
    at_once, in_turn = [], []
    for index, (state, draft) in enumerate(zip(states, drafts, strict=True)):
        if draft.tokens and draft.probabilities_dV is not None and not state.greedy and state.watermark is None:
            rows = slice(firsts[index], firsts[index] + 1 + len(draft.tokens))
            of_requests[index] = _replacing(logits_RV[rows], state, draft.tokens, draft.probabilities_dV)
        elif draft.tokens and state.depends_on_answer:
            in_turn.append(index)
        else:
            at_once.append(index)
    for way, indices in ((_at_once, at_once), (_in_turn, in_turn)):
        if indices:
            given = [states[index] for index in indices], [drafts[index] for index in indices]
            for index, one in zip(indices, way(logits_RV, *given, [firsts[index] for index in indices]), strict=True):
                of_requests[index] = one
    return of_requests


def verify(
    logits_PV: Tensor, state: SamplingState, draft: Sequence[int], draft_probabilities_dV: Tensor | None = None
) -> list[Sampled]:
    """The accepted draft tokens and one new token, added to the request's completion.

    logits_PV: float32; row i follows the completion and draft[:i]. draft_probabilities_dV: the distributions that the draft
    was sampled from; None for a draft that was not sampled, such as an n-gram's continuation.

    Each position has the distribution that the request's parameters give it after the tokens accepted before it. A token x
    sampled from q is accepted with probability min(1, p(x)/q(x)), else replaced by one of max(0, p - q), normalised
    (Leviathan et al. 2023, algorithm 1). Without q, a token is sampled from p, and the draft goes on while it agrees: the
    completion is then that of the same seed without speculation. At temperature 0: accepted while the likeliest.

    Ends early at an accepted end token, and where the grammar is complete. Raises RequestError when the first position gives
    no token (its logits are not finite, or nothing may be chosen); where a later one gives none, what is accepted stays.
    """
    (sampled,) = verify_rows(logits_PV, [state], [Draft(draft, draft_probabilities_dV)])
    if isinstance(sampled, RequestError):
        raise sampled
    return sampled


def _at_once(
    logits_RV: Tensor, states: Sequence[SamplingState], drafts: Sequence[Draft], firsts: Sequence[int]
) -> list[list[Sampled] | RequestError]:
    """Sample all rows at once, which costs little more than one row; rows behind a rejected token are not used."""
    rows: list[int] = []
    of_rows: list[SamplingState] = []
    numbers: list[float] = []
    drawn_ahead: list[RewindableUniforms | None] = []
    for state, draft, first in zip(states, drafts, firsts, strict=True):
        count = 1 + len(draft.tokens)
        rows += range(first, first + count)
        of_rows += [state] * count
        uniforms = None if state.greedy else RewindableUniforms(state.generator, count)
        numbers += [0.0] * count if uniforms is None else uniforms.numbers
        drawn_ahead.append(uniforms)
    part_RV = logits_RV if len(rows) == len(logits_RV) else logits_RV[rows]
    choice = choose(part_RV, of_rows, numbers)
    tokens, problems = choice.tokens, choice.problems
    kept: list[list[int]] = []
    row = 0
    for state, draft, uniforms in zip(states, drafts, drawn_ahead, strict=True):
        made: list[int] = []
        for place, proposed in enumerate((*draft.tokens, None), start=row):
            if place in problems:
                break
            state.advance(tokens[place])
            made.append(place)
            if tokens[place] != proposed or state.ends(tokens[place]):
                break
        if uniforms is not None:
            uniforms.use(max(1, len(made)))
        kept.append(made)
        row += 1 + len(draft.tokens)
    of_places = chosen_log_probs(part_RV, choice, of_rows, [place for made in kept for place in made])
    of_requests: list[list[Sampled] | RequestError] = []
    row = 0
    for draft, made in zip(drafts, kept, strict=True):
        of_requests.append([Sampled(tokens[place], of_places.get(place)) for place in made] or problems[row])
        row += 1 + len(draft.tokens)
    return of_requests


def _in_turn(
    logits_RV: Tensor, states: Sequence[SamplingState], drafts: Sequence[Draft], firsts: Sequence[int]
) -> list[list[Sampled] | RequestError]:
    """Sample one position after the other, where a token changes how the next ones are sampled."""
    of_requests: list[list[Sampled] | RequestError] = [[] for _ in states]
    going, place = list(range(len(states))), 0
    while going:
        rows = [firsts[index] + place for index in going]
        on = []
        for index, one in zip(going, sample_rows(logits_RV[rows], [states[index] for index in going]), strict=True):
            made, state, draft = of_requests[index], states[index], drafts[index].tokens
            assert isinstance(made, list), "a request that has failed does not go on"
            if isinstance(one, RequestError):
                of_requests[index] = made or one
                continue
            made.append(one)
            if place < len(draft) and one.token == draft[place] and not state.ends(one.token) and not state.finished:
                on.append(index)
        going, place = on, place + 1
    return of_requests


def _replacing(
    logits_PV: Tensor, state: SamplingState, draft: Sequence[int], draft_probabilities_dV: Tensor
) -> list[Sampled] | RequestError:
    """Accept or replace draft tokens that were sampled from a distribution."""
    positions = _Positions(logits_PV, state)
    tokens: list[int] = []
    of_sampler: list[LogProbs] = []
    for place, proposed in enumerate((*draft, None)):
        try:
            if proposed is None:
                token = positions.token(place)
            else:
                token = positions.accept_or_replace(place, proposed, draft_probabilities_dV[place].cpu())
        except RequestError as error:
            if not tokens:
                return error
            break
        if state.wants_sampler_log_probs:
            of_sampler.append(positions.log_probs(place, token))
        state.advance(token)
        tokens.append(token)
        if token != proposed or state.ends(token) or state.finished:
            break
    if state.params.logprobs is None:
        return [Sampled(token) for token in tokens]
    of_tokens = of_sampler or log_probs(logits_PV[: len(tokens)], tokens, [state.params.logprobs] * len(tokens))
    return [Sampled(token, of_token) for token, of_token in zip(tokens, of_tokens, strict=True)]


def propose(logits_RV: Tensor, states: Sequence[SamplingState]) -> tuple[list[int], list[Tensor | None]]:
    """A draft model's next token for each request, and the distribution it is drawn from, (V,), for `verify`.

    By the request's temperature and truncation, which makes it more often right; not by its penalties and grammar, which
    `verify` sees to. At temperature 0 the likeliest, and no distribution.
    """
    tokens: list[int] = []
    distributions: list[Tensor | None] = []
    for row, state in enumerate(states):
        logits_1V = logits_RV[row : row + 1].detach()
        if state.greedy:
            token, distribution_V = likeliest(logits_1V)[0], None
        else:
            distribution = _distribution(logits_1V, state)[0]
            token, distribution_V = _draw(distribution, uniform(state.generator)), distribution.dense(logits_RV.shape[-1])[0]
        # where logits are not finite, any draft token will do: it is verified
        tokens.append(max(token, 0))
        distributions.append(None if token < 0 else distribution_V)
    return tokens, distributions


class _Positions:
    """The distribution of each position, all computed at once where what is accepted does not change the later ones."""

    def __init__(self, logits_PV: Tensor, state: SamplingState) -> None:
        self._state = state
        self._together = not state.depends_on_answer
        self._logits_PV = self._adjusted(logits_PV) if self._together else logits_PV
        if self._together:
            self._distributions = _distribution(self._logits_PV, state)
        self._last: tuple[int, Candidates, Tensor] | None = None

    def _adjusted(self, logits_PV: Tensor) -> Tensor:
        if self._state.adjusts:
            logits_PV = logits_PV.to("cpu", copy=True)
            for logits_V in logits_PV:
                self._state.adjust(logits_V.numpy())
        return logits_PV

    def token(self, place: int) -> int:
        """A token drawn with the request's next number. Raises RequestError."""
        distribution, logits_V = self._at(place)
        return self._checked(_draw(distribution, uniform(self._state.generator)), logits_V)

    def accept_or_replace(self, place: int, proposed: int, draft_V: Tensor) -> int:
        """A token drawn from `draft_V`, or what replaces it. Raises RequestError."""
        distribution, logits_V = self._at(place)
        target_V = distribution.dense(len(logits_V))[0]
        number = uniform(self._state.generator)
        accepted = target_V[proposed].item() / max(draft_V[proposed].item(), 1e-300)
        if number < accepted:
            return proposed
        # above its threshold the number is uniform again, so that one is enough
        number = min((number - accepted) / (1 - accepted), 1 - 2**-53)
        token = _draw(Candidates((target_V - draft_V).clamp(min=0)[None], None), number)
        # where rounding leaves no rest, the two distributions are one
        return self._checked(_draw(Candidates(target_V[None], None), number) if token < 0 else token, logits_V)

    def log_probs(self, place: int, token: int) -> LogProbs:
        """Log-probabilities of a position's token, drawn or accepted, by the distribution that it has here."""
        distribution, logits_V = self._at(place)
        params = self._state.params
        return sampler_log_probs(logits_V[None].cpu(), torch.tensor([params.temperature]), distribution, [token], [params])[0]

    def _at(self, place: int) -> tuple[Candidates, Tensor]:
        if self._together:
            return self._distributions[place], self._logits_PV[place]
        if self._last is None or self._last[0] != place:
            # kept, so that a user's processor sees every position once
            logits_1V = self._adjusted(self._logits_PV[place : place + 1])
            self._last = (place, _distribution(logits_1V, self._state)[0], logits_1V[0])
        return self._last[1:]

    def _checked(self, token: int, logits_V: Tensor) -> int:
        if token < 0:
            raise no_token(logits_V)
        return token


def _distribution(logits_RV: Tensor, state: SamplingState) -> list[Candidates]:
    """The candidates of each row by the settings of one request."""
    temperatures_R = torch.full((len(logits_RV),), state.params.temperature)
    of_rows: dict[int, Candidates] = {}
    for rows, part in candidates(logits_RV.cpu(), temperatures_R, state.truncation):
        for place, row in enumerate(rows):
            of_rows[row] = part.part([place])
    return [of_rows[row] for row in range(len(logits_RV))]


def _draw(distribution: Candidates, number: float) -> int:
    return distribution.draw(torch.tensor([number], dtype=torch.float64))[0]
