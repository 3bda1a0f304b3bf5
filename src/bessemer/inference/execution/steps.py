"""Decode steps that make more than one token of a request: speculative and multi-token.

`SpeculativeDecoder` proposes draft tokens before a step and verifies them after it.

Several tokens in one call of the runner: a token of a small model takes less time to compute than Python takes to schedule it,
sample it and hand it over. Requests whose reader waits for the end, and whose tokens are drawn from the plain softmax, need
none of that in between: the runner draws a token of each, computes the next step with it, and so on. Tokens behind the end of
a request are thrown away. Each token is the one that steps of one token give, to the last bit of its log-probability. To the
scheduler the further tokens are drafts, of which all are accepted: their blocks are taken before the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bessemer.core.errors import RequestError
from bessemer.inference.request import Request, ScheduledRequest
from bessemer.inference.sampling.distribution import LogProbs
from bessemer.inference.sampling.sampler import NOT_FINITE, Sampled, SamplingState
from bessemer.inference.scheduling.scheduler import PLACEHOLDER, Scheduler
from bessemer.inference.scheduling.sequence import ScheduledChunk
from bessemer.inference.speculation.proposer import Draft, Proposer
from bessemer.inference.speculation.verification import verify_rows

# Shapes: W rows that tokens are sampled from, V vocabulary.


class SpeculativeDecoder:
    """A proposer, the drafts of the coming step, and how many of its draft tokens were accepted."""

    def __init__(self, proposer: Proposer) -> None:
        self.proposer = proposer
        self._drafts: dict[int, Draft] = {}
        #: Drafts verified since the start.
        self.drafts = 0
        #: Draft tokens verified since the start.
        self.proposed = 0
        #: Those of them that were accepted.
        self.accepted = 0

    def propose(self, requests: Sequence[Request], crowded: bool) -> None:
        """Give these requests, whose next token is to be sampled, their drafts. crowded: whether others wait."""
        self.proposer.crowded = crowded
        for request, draft in zip(requests, self.proposer.propose(requests), strict=True):
            request.sequence.draft = list(draft.tokens)
            self._drafts[request.sequence.identity] = draft

    def verify(
        self, chunks: Sequence[ScheduledChunk], requests: Sequence[Request], logits_WV: Tensor
    ) -> list[list[Sampled] | RequestError]:
        """The accepted draft tokens of each chunk and one more, as `verify_rows`. logits_WV: all rows of these chunks."""
        drafts = [self._drafts[chunk.sequence.identity].first(chunk.drafts) if chunk.drafts else Draft() for chunk in chunks]
        sampled = verify_rows(logits_WV, [request.sampling for request in requests], drafts)
        for request, draft, tokens in zip(requests, drafts, sampled, strict=True):
            if draft.tokens and not isinstance(tokens, RequestError):
                self._learn(request, draft, tokens)
        return sampled

    def computed(
        self, chunks: Sequence[ScheduledChunk], requests: Sequence[ScheduledRequest], tokens: int, seconds: float
    ) -> None:
        """Report a computed step to the proposer, once its tokens belong to the requests. tokens: computed in it."""
        self.proposer.computed(chunks, requests)
        drafts = sum(chunk.drafts for chunk in chunks)
        # no prompt was read
        if tokens == len(chunks) + drafts:
            self.proposer.measured(len(chunks), drafts, seconds)

    def forget(self, request: ScheduledRequest) -> None:
        """A request has ended."""
        self._drafts.pop(request.sequence.identity, None)
        self.proposer.forget(request)

    def _learn(self, request: Request, draft: Draft, tokens: list[Sampled]) -> None:
        """Count what was accepted of a draft: an end token may be the last, with nothing behind it."""
        proposed = len(draft.tokens)
        accepted = sum(one.token == token for one, token in zip(tokens, draft.tokens, strict=False))
        request.proposed += proposed
        request.accepted += accepted
        self.drafts += 1
        self.proposed += proposed
        self.accepted += accepted
        self.proposer.learn(request, proposed, accepted)


# Shapes: R requests, S tokens of each.

#: Most tokens of a request in a call: other requests begin, and others end, between two calls.
MOST_TOKENS = 8


def reserve_tokens(scheduler: Scheduler, requests: Iterable[ScheduledRequest]) -> bool:
    """Ask for several tokens of each of the in-flight requests, none of which streams, where all allow it and no other could
    begin; whether it did."""
    if scheduler.may_admit:
        return False
    sequences = [request.sequence for request in requests if _allows_several(request)]
    if not sequences or len(sequences) < scheduler.running:
        return False
    most = min(MOST_TOKENS, scheduler.max_num_batched_tokens // len(sequences))
    for sequence in sequences:
        sequence.draft = [PLACEHOLDER] * (most - 1)
    return most > 1


def _allows_several(request: ScheduledRequest) -> bool:
    if not isinstance(request, Request) or not request.samples:
        return False
    if request.adapter is not None or request.recorder is not None or request.sequence.status != "running":
        return False
    return len(request.sequence.tokens) - request.sequence.computed == 1 and request.sampling.draws_from_softmax


def draws_of(states: Sequence[SamplingState], count: int) -> tuple[Tensor, Tensor]:
    """The next `count` numbers of each request's generator, float64 (R, S), and the temperatures, float32 (R,), 0 where the
    likeliest token is taken, for which no number is used."""
    uniforms = [
        torch.zeros(count, dtype=torch.float64)
        if state.greedy
        else torch.rand(count, dtype=torch.float64, generator=state.generator)
        for state in states
    ]
    return torch.stack(uniforms), torch.tensor([0.0 if state.greedy else state.params.temperature for state in states])


def taken(states: Sequence[SamplingState], tokens_RS: Tensor, log_probs_RS: Tensor) -> list[list[Sampled] | RequestError]:
    """The tokens of each request up to the first end token, added to its answer; an error where there is none."""
    found: list[list[Sampled] | RequestError] = []
    for state, tokens, log_probs in zip(states, tokens_RS.tolist(), log_probs_RS.tolist(), strict=True):
        sampled = []
        is_wanted = state.params.logprobs is not None
        for token, log_prob in zip(tokens, log_probs, strict=True):
            if token < 0:
                break
            state.advance(token)
            sampled.append(Sampled(token, LogProbs(log_prob) if is_wanted else None))
            if state.ends(token):
                break
        found.append(sampled or RequestError(NOT_FINITE))
    return found
