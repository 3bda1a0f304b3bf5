"""Speculative decode step: a proposer drafts tokens before it, and the sampler verifies them after it."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from torch import Tensor

from bessemer.core.errors import RequestError
from bessemer.inference.execution.runner import Runner
from bessemer.inference.execution.steps.plain import PlainSteps, StepTokens
from bessemer.inference.request import Request, ScheduledRequest
from bessemer.inference.sampling.sampler import Sampled
from bessemer.inference.scheduling.scheduler import Scheduler
from bessemer.inference.scheduling.sequence import ScheduledChunk, SchedulerOutput
from bessemer.inference.speculation.proposer import Draft, Proposer
from bessemer.inference.speculation.verification import verify_rows

# Shapes: W rows that tokens are sampled from, V vocabulary.


class SpeculativeSteps(PlainSteps):
    """Computes draft tokens together with the next token of each request, and keeps those that are accepted."""

    def __init__(self, runner: Runner, proposer: Proposer) -> None:
        super().__init__(runner)
        self.proposer = proposer
        #: Of the coming step, by the identity of the sequence.
        self._drafts: dict[int, Draft] = {}
        self._started = 0.0

    def prepare(self, scheduler: Scheduler, requests: Collection[ScheduledRequest]) -> None:
        """Draft for the requests whose next token is sampled in the coming step."""
        self.proposer.crowded = scheduler.waiting > 0
        decoding = [request for request in requests if isinstance(request, Request) and request.sequence.is_decoding]
        for request, draft in zip(decoding, self.proposer.propose(decoding), strict=True):
            request.sequence.draft = list(draft.tokens)
            self._drafts[request.sequence.identity] = draft
        self._started = time.perf_counter()

    def compute(self, output: SchedulerOutput, requests: Sequence[ScheduledRequest]) -> StepTokens:
        tokens = super().compute(output, requests)
        # states of linear attention go back to after the accepted tokens
        kept = [
            (chunk.sequence.state_slot, len(own))
            for chunk, own in zip(output.chunks, tokens.read(), strict=True)
            if chunk.drafts and chunk.sequence.state_slot is not None and isinstance(own, list)
        ]
        if kept:
            self.runner.keep_states(kept)
        return tokens

    def committed(self, chunks: Sequence[ScheduledChunk], requests: Sequence[ScheduledRequest], computed: int) -> None:
        """Report the step to the proposer, and its time where it read no prompt.

        The time includes scheduling, sampling and text, which take longer with drafts too.
        """
        self.proposer.computed(chunks, requests)
        drafts = sum(chunk.drafts for chunk in chunks)
        if computed == len(chunks) + drafts:
            self.proposer.measured(len(chunks), drafts, time.perf_counter() - self._started)

    def forget(self, request: ScheduledRequest) -> None:
        self._drafts.pop(request.sequence.identity, None)
        self.proposer.forget(request)

    def _sample_rows(
        self, chunks: Sequence[ScheduledChunk], requests: Sequence[Request], logits_WV: Tensor
    ) -> Sequence[list[Sampled] | RequestError]:
        """The accepted draft tokens of each chunk and one more, as `verify_rows`."""
        if not any(chunk.drafts for chunk in chunks):
            return super()._sample_rows(chunks, requests, logits_WV)
        drafts = [self._drafts[chunk.sequence.identity].first(chunk.drafts) if chunk.drafts else Draft() for chunk in chunks]
        sampled = verify_rows(logits_WV, [request.sampling for request in requests], drafts)
        for request, draft, tokens in zip(requests, drafts, sampled, strict=True):
            if draft.tokens and not isinstance(tokens, RequestError):
                self._count_accepted(request, draft, tokens)
        return sampled

    def _count_accepted(self, request: Request, draft: Draft, tokens: list[Sampled]) -> None:
        """Count the accepted tokens of a draft. After an end token no further one follows."""
        proposed = len(draft.tokens)
        accepted = sum(one.token == token for one, token in zip(tokens, draft.tokens, strict=False))
        self.counts.add(proposed, accepted)
        self.proposer.learn(request, proposed, accepted)
