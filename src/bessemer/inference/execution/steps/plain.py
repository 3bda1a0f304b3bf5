"""Plain and multi-token decode steps. The other strategies are subclasses of the plain one.

An engine has one strategy for its lifetime (`inference/build.py`). In each step the engine core calls `prepare`, lets the
scheduler decide what is computed, calls `compute`, and, once the requests have their tokens, `committed`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from bessemer.core.errors import BessemerError, RequestError
from bessemer.inference.execution.batch import Batch
from bessemer.inference.execution.runner import Runner
from bessemer.inference.request import Request, ScheduledRequest
from bessemer.inference.sampling.distribution import LogProbs
from bessemer.inference.sampling.sampler import NOT_FINITE, Sampled, SamplingState, sample_rows
from bessemer.inference.scheduling.scheduler import PLACEHOLDER, Scheduler
from bessemer.inference.scheduling.sequence import ScheduledChunk, SchedulerOutput
from bessemer.inference.statistics import DraftCounts

# Shapes: R wanted rows, W those that a token is sampled from, V vocabulary.

#: Tokens of a chunk, none where it ends inside a prompt; or the error that ends its request.
ChunkTokens = list[Sampled] | BessemerError


class StepTokens:
    """Tokens of a step. computed: positions that the model computed for them."""

    def __init__(self, of_chunks: Sequence[ChunkTokens], computed: int) -> None:
        self._of_chunks = of_chunks
        self.computed = computed

    def read(self) -> Sequence[ChunkTokens]:
        """The tokens of each chunk. Waits where the device is still computing them."""
        return self._of_chunks


class PlainSteps:
    """Computes a batch and samples the next token of each request from its logits."""

    #: Whether the next step may be launched before the tokens of the last one are read; `prepare` decides.
    runs_ahead = False

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        #: Of draft tokens, which only `SpeculativeSteps` has.
        self.counts = DraftCounts()

    def prepare(self, scheduler: Scheduler, requests: Collection[ScheduledRequest]) -> None:
        """Get ready for the step that is scheduled next. requests: all in flight, waiting ones included."""

    def compute(self, output: SchedulerOutput, requests: Sequence[ScheduledRequest]) -> StepTokens:
        """Compute a scheduled step. requests: one for each chunk.

        An exception means that the step has failed for all of them.
        """
        batch, rows = self._batch(output.chunks, requests)
        logits_RV = self.runner.forward(batch)
        if batch.states or batch.routings:
            for chunk, request in zip(output.chunks, requests, strict=True):
                if request.recorder is not None:
                    request.recorder.collect(chunk, self.runner.observed, self.runner, request.adapter)
        return StepTokens(self._sample(output.chunks, requests, rows, logits_RV), len(batch.tokens))

    def committed(self, chunks: Sequence[ScheduledChunk], requests: Sequence[ScheduledRequest], computed: int) -> None:
        """The tokens of a step now belong to the requests. computed: of `StepTokens`."""

    def forget(self, request: ScheduledRequest) -> None:
        """Drop what is kept of a request, which has ended."""

    # -- inside

    def _batch(self, chunks: Sequence[ScheduledChunk], requests: Sequence[ScheduledRequest]) -> tuple[Batch, list[slice]]:
        """The runner's input, and which of its wanted rows belong to each chunk."""
        batch, rows = Batch.empty(len(self.runner.memory.groups)), []
        for chunk, request in zip(chunks, requests, strict=True):
            rows.append(batch.append(chunk, request))
            if request.recorder is not None:
                request.recorder.mark_rows(chunk, batch)
        return batch, rows

    def _sample(
        self, chunks: Sequence[ScheduledChunk], requests: Sequence[ScheduledRequest], rows: Sequence[slice], logits_RV: Tensor
    ) -> list[ChunkTokens]:
        """Sample the tokens of each chunk. Logits that nothing is sampled from go to the requests that want them."""
        of_chunks: list[ChunkTokens] = [[] for _ in chunks]
        sampling: list[int] = []
        wanted: list[int] = []
        reading: list[int] = []
        for index, (chunk, request, own) in enumerate(zip(chunks, requests, rows, strict=True)):
            count = chunk.num_logits if request.samples else 0
            if own.stop - own.start > count:
                reading.append(index)
            if count:
                sampling.append(index)
                wanted += range(own.stop - count, own.stop)
        # in most steps a token is sampled from every row
        is_whole = len(wanted) == len(logits_RV)
        is_argmax = is_whole and all(_takes_argmax(chunks[index], requests[index]) for index in sampling)
        with nullcontext() if is_argmax else self.runner.limited_torch_threads():
            if sampling:
                logits_WV = logits_RV if is_whole else logits_RV[wanted]
                sampled = self._sample_rows(
                    [chunks[index] for index in sampling], [completing(requests[index]) for index in sampling], logits_WV
                )
                for index, tokens in zip(sampling, sampled, strict=True):
                    of_chunks[index] = tokens
            for index in reading:
                try:
                    requests[index].take_logits(chunks[index], logits_RV[rows[index]])
                except RequestError as error:
                    of_chunks[index] = error
        return of_chunks

    def _sample_rows(
        self, chunks: Sequence[ScheduledChunk], requests: Sequence[Request], logits_WV: Tensor
    ) -> Sequence[list[Sampled] | RequestError]:
        """The tokens of each chunk, all of whose rows are given; an error for one that gets none."""
        sampled = sample_rows(logits_WV, [request.sampling for request in requests])
        return [one if isinstance(one, RequestError) else [one] for one in sampled]


def completing(request: ScheduledRequest) -> Request:
    """A request that tokens are sampled for."""
    assert isinstance(request, Request), "tokens are sampled for completions only"
    return request


def _takes_argmax(chunk: ScheduledChunk, request: ScheduledRequest) -> bool:
    """Whether a chunk's token is the largest of its logits as they are: that needs none of PyTorch's threads."""
    return not chunk.drafts and isinstance(request, Request) and request.sampling.takes_argmax


# Shapes: R requests, S tokens of each.

#: Most tokens of a request in a call: other requests begin, and others end, between two calls.
MOST_TOKENS = 8


class MultiTokenSteps(PlainSteps):
    """Several tokens of each request in one call of the kernels, where all allow it and no other could begin; else one.

    A token of a small model takes less time to compute than Python takes to schedule it, sample it and hand it over. Requests
    whose reader waits for the end, and whose tokens are drawn from the plain softmax, need none of that in between: the kernels
    draw a token of each, compute the next step with it, and so on. Tokens behind the end of a request are thrown away. Each
    token is the one that plain steps give, to the last bit of its log-probability. To the scheduler the further tokens are
    draft tokens that are all accepted: their blocks are taken before the step.
    """

    def __init__(self, runner: Runner) -> None:
        super().__init__(runner)
        #: Whether the coming step has blocks for several tokens of each request.
        self._is_reserved = False

    def prepare(self, scheduler: Scheduler, requests: Collection[ScheduledRequest]) -> None:
        self._is_reserved = not any(request.streams for request in requests) and _reserve_tokens(scheduler, requests)

    def compute(self, output: SchedulerOutput, requests: Sequence[ScheduledRequest]) -> StepTokens:
        """Compute as many tokens of each request as all have blocks for."""
        if not self._is_reserved:
            return super().compute(output, requests)
        count = 1 + min(chunk.drafts for chunk in output.chunks)
        states = [completing(request).sampling for request in requests]
        batch, _ = self._batch([replace(chunk, count=1, drafts=0, num_logits=1) for chunk in output.chunks], requests)
        tokens_RS, log_probs_RS = self.runner.generate(batch, *draws_of(states, count))
        of_chunks = _sampled(states, tokens_RS, log_probs_RS)
        for chunk, tokens in zip(output.chunks, of_chunks, strict=True):
            if not isinstance(tokens, RequestError):
                chunk.sequence.draft = [one.token for one in tokens]
        return StepTokens(of_chunks, count * len(requests))


def _reserve_tokens(scheduler: Scheduler, requests: Collection[ScheduledRequest]) -> bool:
    """Let the scheduler take blocks for several tokens of each running sequence. False where one does not allow it."""
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
    return (
        isinstance(request, Request)
        and request.samples
        and request.adapter is None
        and request.recorder is None
        and (request.images is None or not request.images.turns)
        and request.sequence.is_decoding
        and request.sampling.draws_from_softmax
    )


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


def _sampled(states: Sequence[SamplingState], tokens_RS: Tensor, log_probs_RS: Tensor) -> list[list[Sampled] | RequestError]:
    """The tokens of each request up to the first end token, added to its answer; an error where there is none."""
    of_requests: list[list[Sampled] | RequestError] = []
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
        of_requests.append(sampled or RequestError(NOT_FINITE))
    return of_requests
