"""Speculative decoding in the engine core: draft tokens proposed before a step and verified after it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bessemer.core.errors import RequestError
from bessemer.inference.request import Request, ScheduledRequest
from bessemer.inference.sampling.sampler import Sampled
from bessemer.inference.scheduling.schedule import ScheduledChunk
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
