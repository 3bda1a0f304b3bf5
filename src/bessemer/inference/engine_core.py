"""Engine core: schedules a step, computes it, samples tokens and hands them to their requests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext

from torch import Tensor

from bessemer.core.errors import BessemerError, RequestError
from bessemer.inference.adapters import LoadedAdapter
from bessemer.inference.execution.batch import Batch, Executor
from bessemer.inference.execution.threads import one_thread
from bessemer.inference.request import LogitsRequest, Request, ScheduledRequest
from bessemer.inference.sampling.logprobs import log_probs
from bessemer.inference.sampling.sampler import Sampled, sample_rows
from bessemer.inference.scheduling.schedule import ScheduledChunk
from bessemer.inference.scheduling.scheduler import Scheduler
from bessemer.inference.speculation.decoder import SpeculativeDecoder
from bessemer.model.adapters import Adapter

# Shapes: R wanted rows, W those that a token is sampled from, N tokens of a prompt, V vocabulary.

#: Ends the sequence of a `LogitsRequest`, whose last token is never read.
_PLACEHOLDER = 0


class EngineCore:
    """In-flight requests of one model; `step()` advances all. Nothing in it waits or locks.

    speculation: proposes and verifies draft tokens; None: every step makes one token of each request.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor, speculation: SpeculativeDecoder | None = None) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.speculation = speculation
        self._requests: dict[int, ScheduledRequest] = {}
        #: Of the weights, as `Engine.weight_version`.
        self.weight_version = 0
        #: Steps since the start.
        self.steps = 0
        #: Tokens computed since the start.
        self.tokens = 0

    @property
    def busy(self) -> bool:
        """Whether any request is in flight."""
        return bool(self._requests)

    def enqueue_request(self, request: ScheduledRequest) -> None:
        """Add a request to the waiting queue. Raises RequestError when it can never fit, or too many wait."""
        self.scheduler.enqueue(request.sequence)
        self._requests[request.sequence.identity] = request

    def change_adapter(self, before: Adapter, after: LoadedAdapter) -> None:
        """Let the in-flight requests of one adapter go on with another."""
        for request in self._requests.values():
            if request.adapter is before:
                self.use_adapter(request, after)

    def use_adapter(self, request: ScheduledRequest, loaded: LoadedAdapter) -> None:
        """Let a request and its siblings go on with another adapter, in any state; their keys are computed again."""
        for each in (request, *request.siblings):
            if not each.done and each.adapter is not loaded.adapter:
                each.adapter = loaded.adapter
                if each.sequence.status == "running":
                    self.scheduler.preempt(each.sequence)
                each.sequence.change_salt(f"{each.sequence.salt} then {loaded.salt}")

    def abort(self, request: ScheduledRequest) -> None:
        """Stop a request and its siblings, in any state; their blocks are free at once."""
        for each in (request, *request.siblings):
            if self._requests.pop(each.sequence.identity, None) is not None:
                self.scheduler.abort(each.sequence)
                self._forget(each)

    def step(self) -> None:
        """Compute one step of all in-flight requests."""
        if self.speculation is not None:
            self.speculation.propose(self._decoding(), crowded=self.scheduler.waiting > 0)
        begun = time.perf_counter()
        output = self.scheduler.schedule()
        if not output.chunks:
            assert not self.busy or output.preempted, "requests wait and nothing is scheduled"
            return
        if output.copies:
            self.executor.copy_blocks(output.copies)
        if output.restored:
            self.executor.restore_states(output.restored)
        requests = [self._requests[chunk.sequence.identity] for chunk in output.chunks]
        batch, rows = self._batch(output.chunks, requests)
        self.steps += 1
        self.tokens += len(batch.tokens)
        try:
            logits_RV = self.executor.forward(batch)
        except Exception as error:
            # the step fails as a whole: every request in it is told, and none of it stays scheduled
            told = error if isinstance(error, BessemerError) else RequestError(f"the step failed: {error}")
            for request in requests:
                self._end(request, told)
            if told is not error:
                raise
            return
        sampled = self._sample(output.chunks, requests, rows, logits_RV)
        if self.speculation is not None:
            self._keep_states(output.chunks, sampled)
        for chunk, request, tokens in zip(output.chunks, requests, sampled, strict=True):
            self._commit(chunk, request, tokens)
        if self.speculation is not None:
            # all that drafts make longer: blocks for them, more rows, more to sample, more text
            seconds = time.perf_counter() - begun
            self.speculation.computed(output.chunks, requests, len(batch.tokens), seconds)

    def _decoding(self) -> list[Request]:
        """Running requests whose next token is to be sampled in the coming step."""
        return [
            request
            for request in self._requests.values()
            if isinstance(request, Request)
            and request.sequence.status == "running"
            and len(request.sequence.tokens) - request.sequence.computed == 1
        ]

    def _batch(self, chunks: Sequence[ScheduledChunk], requests: Sequence[ScheduledRequest]) -> tuple[Batch, list[slice]]:
        """The executor's input, and which of its wanted rows belong to each chunk."""
        batch = Batch.empty(len(self.scheduler.groups))
        rows = []
        for chunk, request in zip(chunks, requests, strict=True):
            sequence, count = chunk.sequence, chunk.count
            tokens = sequence.tokens[chunk.start : chunk.start + count - chunk.drafts]
            if chunk.drafts:
                tokens += sequence.draft[: chunk.drafts]
            # log-probabilities of the prompt need the logits of all its tokens
            num_logits = count if _reads_prompt(chunk, request) else chunk.num_logits
            rows.append(
                batch.append(
                    tokens,
                    chunk.start,
                    sequence.tables,
                    wanted=range(count - num_logits, count),
                    drafts=chunk.drafts,
                    prompt_length=sequence.prompt_length,
                    adapter=request.adapter,
                    slot=sequence.state_slot,
                    snapshots=sequence.snapshots,
                )
            )
        return batch, rows

    def _sample(
        self,
        chunks: Sequence[ScheduledChunk],
        requests: Sequence[ScheduledRequest],
        rows: Sequence[slice],
        logits_RV: Tensor,
    ) -> list[list[Sampled] | BessemerError]:
        """The tokens that each chunk gives, none where it ends inside a prompt; or why it can give none."""
        sampled: list[list[Sampled] | BessemerError] = [[] for _ in chunks]
        sampling: list[int] = []
        wanted: list[int] = []
        of_prompts: list[int] = []
        asked: list[tuple[LogitsRequest, int]] = []
        for index, (chunk, request, place) in enumerate(zip(chunks, requests, rows, strict=True)):
            if isinstance(request, LogitsRequest):
                if chunk.num_logits:
                    asked.append((request, place.stop - 1))
                continue
            if _reads_prompt(chunk, request):
                of_prompts.append(index)
            if chunk.num_logits:
                sampling.append(index)
                wanted += range(place.stop - chunk.num_logits, place.stop)
        # in the usual step every row is sampled from, and nothing of it is a PyTorch operation
        is_whole = len(wanted) == len(logits_RV)
        plain = is_whole and not of_prompts and all(_is_plain(chunks[index], requests[index]) for index in sampling)
        with one_thread() if self.executor.own_threads and not plain else nullcontext():
            for logits_request, row in asked:
                logits_request.logits_V = logits_RV[row].clone()
            for index in of_prompts:
                _note_prompt(chunks[index], requests[index], logits_RV[rows[index]])
            if sampling:
                logits_WV = logits_RV if is_whole else logits_RV[wanted]
                of_chunks = self._sample_rows(
                    [chunks[index] for index in sampling], [_generating(requests[index]) for index in sampling], logits_WV
                )
                for index, tokens in zip(sampling, of_chunks, strict=True):
                    sampled[index] = tokens
        return sampled

    def _sample_rows(
        self, chunks: Sequence[ScheduledChunk], requests: Sequence[Request], logits_WV: Tensor
    ) -> Sequence[list[Sampled] | RequestError]:
        """The tokens of each chunk, all of whose rows are given; an error for one that gets none."""
        if any(chunk.drafts for chunk in chunks):
            assert self.speculation is not None
            return self.speculation.verify(chunks, requests, logits_WV)
        sampled = sample_rows(logits_WV, [request.sampling for request in requests])
        return [one if isinstance(one, RequestError) else [one] for one in sampled]

    def _keep_states(self, chunks: Sequence[ScheduledChunk], sampled: Sequence[list[Sampled] | BessemerError]) -> None:
        """Take the states of linear attention back to after the accepted tokens."""
        kept = [
            (chunk.sequence.state_slot, len(tokens))
            for chunk, tokens in zip(chunks, sampled, strict=True)
            if chunk.drafts and chunk.sequence.state_slot is not None and not isinstance(tokens, BessemerError)
        ]
        if kept:
            self.executor.keep_states(kept)

    def _commit(self, chunk: ScheduledChunk, request: ScheduledRequest, sampled: list[Sampled] | BessemerError) -> None:
        if isinstance(sampled, BessemerError):
            self._end(request, sampled)
            return
        if isinstance(request, LogitsRequest) and request.done:
            self.scheduler.commit(chunk, [_PLACEHOLDER])
            self._end(request, None)
            return
        if not sampled:
            self.scheduler.commit(chunk, [])
            return
        request = _generating(request)
        begins = not request.token_ids
        try:
            made = request.take(sampled, self.weight_version)
        except RequestError as error:
            # a token that the tokenizer does not have, where the model has more
            self._end(request, error)
            return
        self.scheduler.commit(chunk, made)
        if begins and request.siblings:
            self._fork(request)
        if request.done:
            self._end(request, None)

    def _fork(self, request: Request) -> None:
        """Start the siblings of a request whose prompt has been read, on the same blocks."""
        for sibling in request.siblings:
            # a sibling that failed may have ended this one before it began
            if not sibling.done:
                self.scheduler.fork(request.sequence, sibling.sequence)
                self._requests[sibling.sequence.identity] = sibling

    def _end(self, request: ScheduledRequest, error: BessemerError | None) -> None:
        if error is not None:
            request.fail(error)
            # those that have not begun never will
            for sibling in request.siblings:
                if sibling.sequence.identity not in self._requests and not sibling.done:
                    sibling.fail(error)
        del self._requests[request.sequence.identity]
        self.scheduler.abort(request.sequence)
        self._forget(request)

    def _forget(self, request: ScheduledRequest) -> None:
        if self.speculation is not None:
            self.speculation.forget(request)


def _generating(request: ScheduledRequest) -> Request:
    assert isinstance(request, Request), "tokens are sampled for completions only"
    return request


def _is_plain(chunk: ScheduledChunk, request: ScheduledRequest) -> bool:
    """Whether a chunk's token is the largest of its logits as they are: that needs none of PyTorch's threads."""
    return not chunk.drafts and isinstance(request, Request) and request.sampling.takes_argmax


def _reads_prompt(chunk: ScheduledChunk, request: ScheduledRequest) -> bool:
    """Whether a chunk computes tokens of a prompt whose log-probabilities are wanted, and not known from before."""
    return (
        isinstance(request, Request)
        and request.params.prompt_logprobs is not None
        and chunk.start < request.sequence.prompt_length
        and len(request.prompt_log_probs) < request.sequence.prompt_length - 1
    )


def _note_prompt(chunk: ScheduledChunk, request: ScheduledRequest, logits_NV: Tensor) -> None:
    """Add log-probabilities of the prompt's tokens that follow a chunk's; those computed again after a preemption only once."""
    request = _generating(request)
    sequence, known = request.sequence, len(request.prompt_log_probs)
    first = max(chunk.start, known)
    end = min(chunk.start + chunk.count, sequence.prompt_length - 1)
    if first >= end:
        return
    following = sequence.tokens[first + 1 : end + 1]
    count = request.params.prompt_logprobs or 0
    found = log_probs(logits_NV[first - chunk.start : end - chunk.start], following, [count] * len(following))
    request.prompt_log_probs += [Sampled(token, one) for token, one in zip(following, found, strict=True)]
