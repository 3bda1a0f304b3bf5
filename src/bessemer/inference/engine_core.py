"""Engine core: schedules a step, computes it, samples tokens and hands them to their requests."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

from torch import Tensor

from bessemer.core.errors import BessemerError, RequestError
from bessemer.inference.execution.batch import Batch
from bessemer.inference.execution.runner import Runner
from bessemer.inference.execution.steps import SpeculativeDecoder, draws_of, reserve_tokens, taken
from bessemer.inference.execution.weights import LoadedAdapter
from bessemer.inference.request import Request, ScheduledRequest
from bessemer.inference.sampling.sampler import Sampled, sample_rows
from bessemer.inference.scheduling.scheduler import Scheduler
from bessemer.inference.scheduling.sequence import ScheduledChunk, SchedulerOutput
from bessemer.inference.statistics import EngineStatistics, StatisticsRecorder
from bessemer.model.adapters import Adapter

# Shapes: R wanted rows, W those that a token is sampled from, V vocabulary.


class EngineCore:
    """In-flight requests of one model; `step()` advances all. Nothing in it waits or locks.

    speculation: proposes and verifies draft tokens; None: every step makes one token of each request.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, speculation: SpeculativeDecoder | None = None) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.speculation = speculation
        self._requests: dict[int, ScheduledRequest] = {}
        self._recorder = StatisticsRecorder()
        #: Of the weights, as `Engine.weight_version`.
        self.weight_version = 0

    @property
    def busy(self) -> bool:
        """Whether any request is in flight."""
        return bool(self._requests)

    @property
    def statistics(self) -> EngineStatistics:
        """Counts and times since the start, between two steps."""
        return self._recorder.read(self.scheduler, self.speculation)

    def enqueue_request(self, request: ScheduledRequest) -> None:
        """Add a request to the waiting queue. Raises RequestError when it can never fit, or too many wait."""
        self.scheduler.enqueue(request.sequence)
        self._requests[request.sequence.identity] = request
        self._recorder.request_began(request)

    def finish_step(self) -> None:
        """Hand over the tokens of a step that is being computed: what runs is about to change. Here none is between steps."""

    def change_adapter(self, before: Adapter, after: LoadedAdapter) -> None:
        """Let the in-flight requests of one adapter go on with another."""
        self.finish_step()
        for request in self._requests.values():
            if request.adapter is before:
                self.use_adapter(request, after)

    def use_adapter(self, request: ScheduledRequest, loaded: LoadedAdapter) -> None:
        """Let a request and its siblings go on with another adapter, in any state; their keys are computed again."""
        self.finish_step()
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
        started = begun = time.perf_counter()
        several = False
        if self.speculation is not None:
            self.speculation.propose(self._decoding(), crowded=self.scheduler.waiting > 0)
            begun = time.perf_counter()
        elif self.runner.generates and not any(request.streams for request in self._requests.values()):
            several = reserve_tokens(self.scheduler, self._requests.values())
        output = self.scheduler.schedule()
        if several:
            for sequence in output.preempted:
                sequence.draft = []
        if not output.chunks:
            assert not self.busy or output.preempted, "requests wait and nothing is scheduled"
            return
        self._prepare_blocks(output)
        requests = [self._requests[chunk.sequence.identity] for chunk in output.chunks]
        self._begin_step(requests, started)
        if several:
            self._generate(output, requests, started)
            return
        batch, rows = self._batch(output.chunks, requests)
        try:
            logits_RV = self.runner.forward(batch)
            if batch.states or batch.routings:
                self._record(output.chunks, requests)
        except Exception as error:
            self._fail_step(requests, error)
            return
        sampled = self._sample(output.chunks, requests, rows, logits_RV)
        if self.speculation is not None:
            self._keep_states(output.chunks, sampled)
        for chunk, request, tokens in zip(output.chunks, requests, sampled, strict=True):
            self._commit(chunk, request, tokens)
        if self.speculation is not None:
            # all that drafts make longer: blocks for them, more rows, more to sample, more text
            self.speculation.computed(output.chunks, requests, len(batch.tokens), time.perf_counter() - begun)
        self._count_step(len(batch.tokens), time.perf_counter() - started)

    def _generate(self, output: SchedulerOutput, requests: Sequence[ScheduledRequest], started: float) -> None:
        """Compute several tokens of each request in one call, as many as all have blocks for."""
        count = 1 + min(chunk.drafts for chunk in output.chunks)
        states = [generating(request).sampling for request in requests]
        firsts = [replace(chunk, count=1, drafts=0, num_logits=1) for chunk in output.chunks]
        batch, _ = self._batch(firsts, requests)
        try:
            tokens_RS, log_probs_RS = self.runner.generate(batch, *draws_of(states, count))
        except Exception as error:
            self._fail_step(requests, error)
            return
        for chunk, request, sampled in zip(output.chunks, requests, taken(states, tokens_RS, log_probs_RS), strict=True):
            if not isinstance(sampled, RequestError):
                chunk.sequence.draft = [one.token for one in sampled]
            self._commit(chunk, request, sampled)
        self._count_step(count * len(requests), time.perf_counter() - started)

    def _prepare_blocks(self, output: SchedulerOutput) -> None:
        """Copy the blocks and states that a step goes on from."""
        if output.copies:
            self.runner.copy_blocks(output.copies)
        if output.restored:
            self.runner.restore_states(output.restored)

    def _fail_step(self, requests: Sequence[ScheduledRequest], error: Exception) -> None:
        """A step fails as a whole: every request in it is told, and none of it stays scheduled. Raises what is no user's."""
        told = error if isinstance(error, BessemerError) else RequestError(f"the step failed: {error}")
        for request in requests:
            self._end(request, told)
        if told is not error:
            raise error

    def _begin_step(self, requests: Sequence[ScheduledRequest], started: float) -> None:
        for request in requests:
            if not request.scheduled_at:
                request.scheduled_at = started

    def _count_step(self, tokens: int, seconds: float) -> None:
        self._recorder.computed_tokens += tokens
        self._recorder.steps.append((tokens, seconds))

    def _decoding(self) -> list[Request]:
        """Running requests whose next token is to be sampled in the coming step."""
        return [
            request
            for request in self._requests.values()
            if isinstance(request, Request)
            and request.sequence.status == "running"
            and len(request.sequence.tokens) - request.sequence.computed == 1
        ]

    def _batch(
        self, chunks: Sequence[ScheduledChunk], requests: Sequence[ScheduledRequest], pending: Mapping[int, int] | None = None
    ) -> tuple[Batch, list[slice]]:
        """The runner's input, and which of its wanted rows belong to each chunk.

        pending: by the identity of a sequence whose last token is a placeholder, the token's place among those sampled.
        """
        batch = Batch.empty(len(self.scheduler.groups))
        rows = []
        for chunk, request in zip(chunks, requests, strict=True):
            sequence, count = chunk.sequence, chunk.count
            tokens = sequence.tokens[chunk.start : chunk.start + count - chunk.drafts]
            if chunk.drafts:
                tokens += sequence.draft[: chunk.drafts]
            rows.append(
                batch.append(
                    tokens,
                    chunk.start,
                    sequence.tables,
                    wanted=request.wanted_rows(chunk),
                    drafts=chunk.drafts,
                    prompt_length=sequence.prompt_length,
                    adapter=request.adapter,
                    slot=sequence.state_slot,
                    snapshots=sequence.snapshots,
                    pending=None if pending is None else pending.get(sequence.identity),
                )
            )
            if request.recorder is not None:
                request.recorder.ask(chunk, batch)
        return batch, rows

    def _record(self, chunks: Sequence[ScheduledChunk], requests: Sequence[ScheduledRequest]) -> None:
        """Hand what the step kept to the requests that capture it."""
        for chunk, request in zip(chunks, requests, strict=True):
            if request.recorder is not None:
                request.recorder.take(chunk, self.runner.observed, self.runner, request.adapter)

    def _sample(
        self,
        chunks: Sequence[ScheduledChunk],
        requests: Sequence[ScheduledRequest],
        rows: Sequence[slice],
        logits_RV: Tensor,
    ) -> list[list[Sampled] | BessemerError]:
        """The tokens that each chunk gives, none where it ends inside a prompt; or why it can give none.

        Logits that nothing is sampled from go to the requests that want them.
        """
        sampled: list[list[Sampled] | BessemerError] = [[] for _ in chunks]
        sampling: list[int] = []
        wanted: list[int] = []
        taking: list[int] = []
        for index, (chunk, request, place) in enumerate(zip(chunks, requests, rows, strict=True)):
            count = chunk.num_logits if request.samples else 0
            if place.stop - place.start > count:
                taking.append(index)
            if count:
                sampling.append(index)
                wanted += range(place.stop - count, place.stop)
        # in the usual step every row is sampled from, and nothing of it is a PyTorch operation
        is_whole = len(wanted) == len(logits_RV)
        plain = is_whole and all(_is_plain(chunks[index], requests[index]) for index in sampling)
        with nullcontext() if plain else self.runner.beside_own_threads():
            if sampling:
                logits_WV = logits_RV if is_whole else logits_RV[wanted]
                of_chunks = self._sample_rows(
                    [chunks[index] for index in sampling], [generating(requests[index]) for index in sampling], logits_WV
                )
                for index, tokens in zip(sampling, of_chunks, strict=True):
                    sampled[index] = tokens
            for index in taking:
                try:
                    requests[index].take_logits(chunks[index], logits_RV[rows[index]])
                except RequestError as error:
                    sampled[index] = error
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
            self.runner.keep_states(kept)

    def _commit(self, chunk: ScheduledChunk, request: ScheduledRequest, sampled: list[Sampled] | BessemerError) -> None:
        if isinstance(sampled, BessemerError):
            self._end(request, sampled)
            return
        if not chunk.num_logits:
            self.scheduler.commit(chunk, [])
            return
        begins = len(chunk.sequence.tokens) == chunk.sequence.prompt_length
        try:
            made = request.take(sampled, self.weight_version)
        except RequestError as error:
            # a token that the tokenizer does not have, where the model has more
            self._end(request, error)
            return
        self._record_tokens(chunk, made)
        if request.samples:
            self._recorder.generated_tokens += len(made)
            if begins:
                self._recorder.first_token_came(request)
            else:
                now = time.perf_counter()
                self._recorder.gaps.append(now - request.last_token_at)
                request.last_token_at = now
        if begins and request.siblings:
            self._fork(request)
        if request.ended:
            if request.recorder is not None:
                request.recorder.complete(request.sequence, self.runner, request.adapter)
            self._end(request, None)

    def _record_tokens(self, chunk: ScheduledChunk, tokens: Sequence[int]) -> None:
        self.scheduler.commit(chunk, tokens)

    def _fork(self, request: ScheduledRequest) -> None:
        """Start the siblings of a request whose prompt has been read, on the same blocks."""
        for sibling in request.siblings:
            # a sibling that failed may have ended this one before it began
            if not sibling.done:
                self.scheduler.fork(request.sequence, sibling.sequence)
                self._requests[sibling.sequence.identity] = sibling
                sibling.began_at, sibling.scheduled_at = request.began_at, request.scheduled_at

    def _end(self, request: ScheduledRequest, error: BessemerError | None) -> None:
        successors: Sequence[ScheduledRequest] = ()
        if error is None:
            successors = request.successors(1 + self.scheduler.empty_places)
        else:
            request.fail(error)
            # those that have not begun never will
            for sibling in request.siblings:
                if sibling.sequence.identity not in self._requests and not sibling.done:
                    sibling.fail(error)
        del self._requests[request.sequence.identity]
        self._requests |= {each.sequence.identity: each for each in successors}
        self.scheduler.finish(request.sequence, [each.sequence for each in successors])
        self._forget(request)

    def _forget(self, request: ScheduledRequest) -> None:
        self._recorder.request_ended(request)
        if self.speculation is not None:
            self.speculation.forget(request)


def generating(request: ScheduledRequest) -> Request:
    """A request that tokens are sampled for."""
    assert isinstance(request, Request), "tokens are sampled for completions only"
    return request


def _is_plain(chunk: ScheduledChunk, request: ScheduledRequest) -> bool:
    """Whether a chunk's token is the largest of its logits as they are: that needs none of PyTorch's threads."""
    return not chunk.drafts and isinstance(request, Request) and request.sampling.takes_argmax
