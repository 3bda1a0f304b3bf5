"""Asynchronous scheduling: the next step is scheduled and launched while the device computes the current one.

The host hands a GPU a step and is free, so the step after is prepared meanwhile. Its tokens are those of the current step,
which the host does not know yet: they stay on the device, where the next step reads them, and the scheduler goes on with
placeholders. A request that turns out to have ended at the current step has one token too many under way, which is thrown
away. The device computes one step after the other, so blocks that change hands between two hold what their reader expects.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from bessemer.core.errors import RequestError
from bessemer.inference.engine_core import EngineCore, generating
from bessemer.inference.execution.batch import TokensToHost
from bessemer.inference.request import Request, ScheduledRequest
from bessemer.inference.sampling.device_sampler import SampledRows, token_problem
from bessemer.inference.sampling.sampler import Sampled, SamplingState
from bessemer.inference.scheduling.sequence import ScheduledChunk

# Shapes: W rows that a token is sampled from, V vocabulary.


@dataclass
class _LaunchedStep:
    """A step that the device computes. places: of each chunk, its token's place among those sampled; None: it gives none."""

    chunks: Sequence[ScheduledChunk]
    requests: Sequence[ScheduledRequest]
    places: Sequence[int | None]
    tokens: TokensToHost
    computed_tokens: int
    started: float
    is_committed: bool = False


class AsyncEngineCore(EngineCore):
    """In-flight requests, of whose steps one is under way when `step` returns, while all of them can be computed so.

    A request cannot whose tokens are chosen on the host (a grammar, a processor, log-probabilities, `typical_p`), that captures
    or wants logits, or whose siblings begin when its prompt has been read. While one runs or waits, steps are computed one
    after the other; on the device are then sampled the tokens of those requests that allow it.
    """

    _launched: _LaunchedStep | None = None
    #: Whether the chunk being handed over was committed ahead.
    _is_ahead = False
    _handed_over_at = 0.0

    def step(self) -> None:
        """Hand over the tokens of the step under way, or of a first one, and leave the next one under way."""
        step, self._launched = self._launched, None
        if step is None:
            if self._needs_host:
                super().step()
                return
            step = self._launch(None)
        try:
            if step is not None and not self._needs_host:
                self._launched = self._launch(step)
        finally:
            if step is not None:
                self._hand_over(step)
        if not self.busy:
            # nobody waits for the tokens that are one too many
            self._launched = None

    def finish_step(self) -> None:
        step, self._launched = self._launched, None
        if step is not None:
            self._hand_over(step)

    @property
    def _needs_host(self) -> bool:
        return any(not _is_plain(request) for request in self._requests.values())

    def _launch(self, current: _LaunchedStep | None) -> _LaunchedStep | None:
        """Schedule a step, behind the one under way where there is one, and hand it to the device; None: there is none."""
        started = time.perf_counter()
        pending: dict[int, int] = {}
        if current is not None:
            for chunk, place in zip(current.chunks, current.places, strict=True):
                self.scheduler.commit_ahead(chunk)
                if place is not None:
                    pending[chunk.sequence.identity] = place
            current.is_committed = True
        output = self.scheduler.schedule()
        if not output.chunks:
            assert current is not None or not self.busy or output.preempted, "requests wait and nothing is scheduled"
            return None
        self._prepare_blocks(output)
        requests = [self._requests[chunk.sequence.identity] for chunk in output.chunks]
        self._begin_step(requests, started)
        batch, _ = self._batch(output.chunks, requests, pending)
        places: list[int | None] = []
        sampled: list[Request] = []
        for chunk, request in zip(output.chunks, requests, strict=True):
            places.append(len(sampled) if chunk.num_logits else None)
            if chunk.num_logits:
                sampled.append(generating(request))
        try:
            unknown = {
                row: pending[identity]
                for row, request in enumerate(sampled)
                if (identity := request.sequence.identity) in pending
            }
            rows = SampledRows([request.sampling for request in sampled], unknown)
            tokens = self.runner.sample(batch, rows)
        except Exception as error:
            self._fail_step(requests, error)
            return None
        return _LaunchedStep(output.chunks, requests, places, tokens, len(batch.tokens), started)

    def _hand_over(self, step: _LaunchedStep) -> None:
        """Read the tokens of a step and give them to the requests that are still there."""
        tokens = step.tokens.read()
        for chunk, request, place in zip(step.chunks, step.requests, step.places, strict=True):
            self.scheduler.take_back(chunk.sequence)
            if self._requests.get(chunk.sequence.identity) is not request:
                continue
            if place is None:
                if not step.is_committed:
                    self.scheduler.commit(chunk, [])
                continue
            self._is_ahead = step.is_committed
            self._commit(chunk, request, _taken(generating(request).sampling, tokens[place]))
        self._is_ahead = False
        now = time.perf_counter()
        # steps overlap: the time of one is that since the one before
        self._count_step(step.computed_tokens, now - max(step.started, self._handed_over_at))
        self._handed_over_at = now

    def _record_tokens(self, chunk: ScheduledChunk, tokens: Sequence[int]) -> None:
        if self._is_ahead:
            self.scheduler.commit_token(chunk.sequence, *tokens)
        else:
            super()._record_tokens(chunk, tokens)

    def _sample_rows(
        self, chunks: Sequence[ScheduledChunk], requests: Sequence[Request], logits_WV: Tensor
    ) -> Sequence[list[Sampled] | RequestError]:
        """As of a step on the host, but for rows that can be sampled on the device."""
        own = [row for row, request in enumerate(requests) if request.sampling.on_device]
        if not own:
            return super()._sample_rows(chunks, requests, logits_WV)
        states = [requests[row].sampling for row in own]
        is_whole = len(own) == len(requests)
        tokens = self.runner.sample_logits(logits_WV if is_whole else logits_WV[own], SampledRows(states))
        of_row: dict[int, list[Sampled] | RequestError] = {}
        others = [row for row in range(len(requests)) if row not in set(own)]
        if others:
            on_host = super()._sample_rows(
                [chunks[row] for row in others], [requests[row] for row in others], logits_WV[others]
            )
            of_row |= zip(others, on_host, strict=True)
        of_row |= {row: _taken(state, token) for row, state, token in zip(own, states, tokens.read(), strict=True)}
        return [of_row[row] for row in range(len(requests))]


def _taken(state: SamplingState, token: int) -> list[Sampled] | RequestError:
    """A token read from the device, added to its request's answer; or why there is none."""
    problem = token_problem(token)
    if problem is not None:
        return problem
    state.advance(token)
    return [Sampled(token)]


def _is_plain(request: ScheduledRequest) -> bool:
    """Whether all that a step does for a request is to compute its tokens and to sample the next one on the device."""
    if not isinstance(request, Request) or not request.samples or request.recorder is not None or request.reads_prompt:
        return False
    begins = len(request.sequence.tokens) == request.sequence.prompt_length
    return request.sampling.on_device and not (begins and request.siblings)
