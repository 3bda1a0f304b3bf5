"""Asynchronous decode step: the next step is scheduled and launched while the device computes the current one.

The host hands a GPU a step and is free, so the step after is prepared meanwhile. Its tokens are those of the current step,
which the host does not know yet: they stay on the device, where the next step reads them, and the scheduler goes on with
placeholders. A request that turns out to have ended at the current step has one token too many under way, which is thrown
away. The device computes one step after the other, so blocks that change hands between two hold what their reader expects.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from bessemer.core.errors import RequestError
from bessemer.inference.execution.batch import TokensToHost
from bessemer.inference.execution.runner import Runner
from bessemer.inference.execution.steps.plain import ChunkTokens, PlainSteps, StepTokens, completing
from bessemer.inference.request import Request, ScheduledRequest
from bessemer.inference.sampling.device_sampler import SampledRows, token_problem
from bessemer.inference.sampling.sampler import Sampled, SamplingState
from bessemer.inference.scheduling.scheduler import Scheduler
from bessemer.inference.scheduling.sequence import ScheduledChunk, SchedulerOutput

# Shapes: W rows that a token is sampled from, V vocabulary.


class AsyncSteps(PlainSteps):
    """Samples on the device, and lets the engine core keep one step in flight there.

    Not while a request is in flight whose tokens are chosen on the host (a grammar, a processor, log-probabilities,
    `typical_p`), that captures or wants logits, or whose siblings begin when its prompt has been read. Then a step is a plain
    one, and only the requests that allow it are sampled on the device.
    """

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner)
        #: By the identity of a sequence in the last launched step, its token's place among those sampled.
        self._places: dict[int, int] = {}

    def prepare(self, scheduler: Scheduler, requests: Collection[ScheduledRequest]) -> None:
        self.runs_ahead = all(_runs_on_device(request) for request in requests)

    def compute(self, output: SchedulerOutput, requests: Sequence[ScheduledRequest]) -> StepTokens:
        """Hand the step to the device. Its tokens can be read when the device is done."""
        if not self.runs_ahead:
            return super().compute(output, requests)
        batch, _ = self._batch(output.chunks, requests)
        states: list[SamplingState] = []
        places: list[int | None] = []
        pending: dict[int, int] = {}
        for chunk, request, end in zip(output.chunks, requests, batch.starts[1:], strict=True):
            if chunk.sequence.ahead:
                batch.pending[end - 1] = pending[len(states)] = self._places[chunk.sequence.identity]
            places.append(len(states) if chunk.num_logits else None)
            if chunk.num_logits:
                states.append(completing(request).sampling)
        tokens = self.runner.sample(batch, SampledRows(states, pending))
        of_chunks = zip(output.chunks, places, strict=True)
        self._places = {chunk.sequence.identity: place for chunk, place in of_chunks if place is not None}
        return _LaunchedTokens(tokens, [None if place is None else states[place] for place in places], len(batch.tokens))

    def _sample_rows(
        self, chunks: Sequence[ScheduledChunk], requests: Sequence[Request], logits_WV: Tensor
    ) -> Sequence[list[Sampled] | RequestError]:
        """As a plain step, but for rows that can be sampled on the device."""
        on_device = [row for row, request in enumerate(requests) if request.sampling.on_device]
        if not on_device:
            return super()._sample_rows(chunks, requests, logits_WV)
        states = [requests[row].sampling for row in on_device]
        is_whole = len(on_device) == len(requests)
        tokens = self.runner.sample_logits(logits_WV if is_whole else logits_WV[on_device], SampledRows(states))
        of_row: dict[int, list[Sampled] | RequestError] = {}
        on_host = sorted(set(range(len(requests))) - set(on_device))
        if on_host:
            sampled = super()._sample_rows(
                [chunks[row] for row in on_host], [requests[row] for row in on_host], logits_WV[on_host]
            )
            of_row |= zip(on_host, sampled, strict=True)
        of_row |= {row: _sampled(state, token) for row, state, token in zip(on_device, states, tokens.read(), strict=True)}
        return [of_row[row] for row in range(len(requests))]


class _LaunchedTokens(StepTokens):
    """Tokens that the device samples. states: of each chunk; None where it gives no token."""

    def __init__(self, tokens: TokensToHost, states: Sequence[SamplingState | None], computed: int) -> None:
        super().__init__([], computed)
        self._tokens = tokens
        self._states = states

    def read(self) -> list[ChunkTokens]:
        tokens = iter(self._tokens.read())
        return [[] if state is None else _sampled(state, next(tokens)) for state in self._states]


def _sampled(state: SamplingState, token: int) -> list[Sampled] | RequestError:
    """A token read from the device, added to its request's answer; or why there is none."""
    problem = token_problem(token)
    if problem is not None:
        return problem
    state.advance(token)
    return [Sampled(token)]


def _runs_on_device(request: ScheduledRequest) -> bool:
    """Whether all that a step does for a request is to compute its tokens and to sample the next one on the device."""
    if not isinstance(request, Request) or not request.samples or request.recorder is not None or request.reads_prompt:
        return False
    begins = len(request.sequence.tokens) == request.sequence.prompt_length
    return request.sampling.on_device and not (begins and request.siblings)
