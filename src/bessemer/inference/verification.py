"""Speculation: which proposed tokens are kept, so that the answer has the distribution it would have without them.

A draft of d tokens is computed in one step with the token before it, which gives logits at 1 + d positions. Each proposed
token is accepted or replaced by another, after which the rest of the draft is void; if all are accepted, the last position
gives one more. So a step makes 1 to 1 + d tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bessemer.core.errors import RequestError
from bessemer.inference.drawing import uniform
from bessemer.inference.logprobs import log_probs
from bessemer.inference.sampling import Sampled, SamplingState, likeliest, no_token
from bessemer.inference.truncation import Candidates, candidates

# Shapes: P positions (1 + d), d drafted tokens, V vocabulary, N candidates, R rows.


def verify(
    logits_PV: Tensor, state: SamplingState, draft: Sequence[int], draft_probabilities_dV: Tensor | None = None
) -> list[Sampled]:
    """The accepted tokens of a draft and one new one, added to the request's answer.

    logits_PV: float32; row i follows the answer and draft[:i]. draft_probabilities_dV: the distributions that the draft was
    drawn from; None for a draft that is no matter of chance, such as an n-gram's continuation.

    Each position has the distribution that the request's settings give it after what is accepted before it. A token x drawn
    from q is accepted with probability min(1, p(x)/q(x)), else replaced by one of max(0, p - q), normalised (Leviathan et
    al. 2023, algorithm 1). Without q this is to draw from p and go on while the draft says the same, so such an answer is,
    number by number, that of the same seed without speculation. At temperature 0: accepted while the likeliest.

    Ends early at an accepted end token, and where the grammar is complete. Raises RequestError when the first position gives
    no token (its logits are not finite, or nothing may be chosen); where a later one gives none, what is accepted stays.
    """
    assert len(logits_PV) == len(draft) + 1, (len(logits_PV), len(draft))
    positions = _Positions(logits_PV.detach(), state)
    tokens: list[int] = []
    for place, proposed in enumerate((*draft, None)):
        try:
            if proposed is None or draft_probabilities_dV is None or state.params.greedy:
                token = positions.token(place)
            else:
                token = positions.accept_or_replace(place, proposed, draft_probabilities_dV[place].cpu())
        except RequestError:
            if not tokens:
                raise
            break
        state.advance(token)
        tokens.append(token)
        if token != proposed or state.ends(token) or state.finished:
            break
    if state.params.logprobs is None:
        return [Sampled(token) for token in tokens]
    of_tokens = log_probs(logits_PV[: len(tokens)], tokens, [state.params.logprobs] * len(tokens))
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
        if state.params.greedy:
            token, distribution_V = likeliest(logits_1V)[0], None
        else:
            found = _distribution(logits_1V, state)[0]
            token, distribution_V = _draw(found, uniform(state.generator)), found.dense(logits_RV.shape[-1])[0]
        # a draft is only a guess: one without a token is as good as any
        tokens.append(max(token, 0))
        distributions.append(None if token < 0 else distribution_V)
    return tokens, distributions


class _Positions:
    """The distribution of each position, all computed at once where what is accepted does not change the later ones."""

    def __init__(self, logits_PV: Tensor, state: SamplingState) -> None:
        self._state = state
        self._together = not state.depends_on_answer
        self._logits_PV = self._adjusted(logits_PV) if self._together else logits_PV
        if not self._together:
            return
        if state.params.greedy:
            self._likeliest = likeliest(self._logits_PV)
        else:
            self._distributions = _distribution(self._logits_PV, state)

    def _adjusted(self, logits_PV: Tensor) -> Tensor:
        if self._state.adjusts:
            logits_PV = logits_PV.to("cpu", copy=True)
            for logits_V in logits_PV:
                self._state.adjust(logits_V.numpy())
        return logits_PV

    def token(self, place: int) -> int:
        """The likeliest token at temperature 0, else one drawn with the request's next number. Raises RequestError."""
        if self._state.params.greedy:
            if self._together:
                return self._checked(self._likeliest[place], self._logits_PV[place])
            logits_1V = self._adjusted(self._logits_PV[place : place + 1])
            return self._checked(likeliest(logits_1V)[0], logits_1V[0])
        found, logits_V = self._at(place)
        return self._checked(_draw(found, uniform(self._state.generator)), logits_V)

    def accept_or_replace(self, place: int, proposed: int, draft_V: Tensor) -> int:
        """A token drawn from `draft_V`, or what replaces it. Raises RequestError."""
        found, logits_V = self._at(place)
        target_V = found.dense(len(logits_V))[0]
        number = uniform(self._state.generator)
        accepted = target_V[proposed].item() / max(draft_V[proposed].item(), 1e-300)
        if number < accepted:
            return proposed
        # above its threshold the number is uniform again, so that one is enough
        number = min((number - accepted) / (1 - accepted), 1 - 2**-53)
        token = _draw(Candidates((target_V - draft_V).clamp(min=0)[None], None), number)
        # where rounding leaves no rest, the two distributions are one
        return self._checked(_draw(Candidates(target_V[None], None), number) if token < 0 else token, logits_V)

    def _at(self, place: int) -> tuple[Candidates, Tensor]:
        if self._together:
            return self._distributions[place], self._logits_PV[place]
        logits_1V = self._adjusted(self._logits_PV[place : place + 1])
        return _distribution(logits_1V, self._state)[0], logits_1V[0]

    def _checked(self, token: int, logits_V: Tensor) -> int:
        if token < 0:
            raise no_token(logits_V)
        return token


def _distribution(logits_RV: Tensor, state: SamplingState) -> list[Candidates]:
    """The candidates of each row by the settings of one request."""
    temperatures_R = torch.full((len(logits_RV),), state.params.temperature)
    found: dict[int, Candidates] = {}
    for rows, (weights_BN, tokens_BN) in candidates(logits_RV.cpu(), temperatures_R, state.truncation):
        for place, row in enumerate(rows):
            here = slice(place, place + 1)
            found[row] = Candidates(weights_BN[here], None if tokens_BN is None else tokens_BN[here])
    return [found[row] for row in range(len(logits_RV))]


def _draw(found: Candidates, number: float) -> int:
    return found.draw(torch.tensor([number], dtype=torch.float64))[0]
