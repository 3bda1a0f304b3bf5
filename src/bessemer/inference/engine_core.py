"""Engine core: schedules a step, computes it by its strategy and hands the tokens to the requests.

`EngineCore.step` is one step, read from top to bottom: `_launch` schedules and computes it, `_hand_over` gives each request its
tokens. The strategy (`execution/steps/`) computes the step and chooses its tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from bessemer.core.errors import BessemerError, RequestError
from bessemer.inference.execution.runner import Runner
from bessemer.inference.execution.steps.plain import ChunkTokens, PlainSteps, StepTokens
from bessemer.inference.execution.weights import LoadedAdapter
from bessemer.inference.prefix_store import PrefixStore
from bessemer.inference.request import ScheduledRequest
from bessemer.inference.scheduling.scheduler import Scheduler
from bessemer.inference.scheduling.sequence import ScheduledChunk
from bessemer.inference.statistics import EngineStatistics, StatisticsRecorder
from bessemer.model.adapters import Adapter


@dataclass(eq=False, slots=True)
class _Step:
    """A computed step, or one that the device computes. is_committed: the scheduler has it already, with placeholders."""

    chunks: Sequence[ScheduledChunk]
    requests: Sequence[ScheduledRequest]
    tokens: StepTokens
    started: float
    is_committed: bool = False


class EngineCore:
    """In-flight requests of one model; `step()` advances all. Nothing in it waits or locks."""

    def __init__(
        self, scheduler: Scheduler, runner: Runner, strategy: PlainSteps, prefix_store: PrefixStore | None = None
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.strategy = strategy
        self.prefix_store = prefix_store
        self._requests: dict[int, ScheduledRequest] = {}
        self._recorder = StatisticsRecorder()
        #: As of `Engine.weight_version`.
        self.weight_version = 0
        #: The step in flight between two calls of `step`; only strategies that run ahead leave one.
        self._launched: _Step | None = None
        self._handed_over_at = 0.0

    @property
    def busy(self) -> bool:
        """Whether any request is in flight."""
        return bool(self._requests)

    @property
    def statistics(self) -> EngineStatistics:
        """Counts and times since the start, between two steps."""
        return self._recorder.read(self.scheduler, self.strategy.counts)

    def enqueue_request(self, request: ScheduledRequest) -> None:
        """Add a request to the waiting queue. Raises RequestError when it can never fit, or too many wait."""
        self.scheduler.enqueue(request.sequence)
        # keys that an adapter made have a name of this process alone
        if self.prefix_store is not None and request.adapter is None:
            self.prefix_store.fetch(request.sequence)
        self._requests[request.sequence.identity] = request
        self._recorder.request_began(request)

    def finish_step(self) -> None:
        """Hand over the tokens of the step in flight, before something changes that it was launched with."""
        step, self._launched = self._launched, None
        if step is not None:
            self._hand_over(step)

    def change_adapter(self, before: Adapter, after: LoadedAdapter) -> None:
        """Replace an adapter in all in-flight requests that use it."""
        self.finish_step()
        for request in self._requests.values():
            if request.adapter is before:
                self.use_adapter(request, after)

    def use_adapter(self, request: ScheduledRequest, loaded: LoadedAdapter) -> None:
        """Continue a request and its siblings with another adapter, in any state; their keys are computed again."""
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
        step, self._launched = self._launched or self._launch(), None
        if step is None:
            return
        try:
            if self.strategy.runs_ahead:
                self._launched = self._launch(step)
        finally:
            self._hand_over(step)
        if not self._requests:
            # the step in flight computes tokens of ended requests only
            self._launched = None

    def _launch(self, current: _Step | None = None) -> _Step | None:
        """Schedule and compute a step; None where there is nothing to compute, or it failed.

        current: a step in flight on the device, whose tokens the host does not know; the new one runs after it.
        """
        started = time.perf_counter()
        self.strategy.prepare(self.scheduler, self._requests.values())
        if current is not None:
            if not self.strategy.runs_ahead:
                return None
            for chunk in current.chunks:
                self.scheduler.commit_ahead(chunk)
            current.is_committed = True
        output = self.scheduler.schedule()
        if not output.chunks:
            assert current is not None or not self.busy or output.preempted, "requests wait and nothing is scheduled"
            return None
        if output.copies:
            self.runner.copy_blocks(output.copies)
        if output.restored:
            self.runner.restore_states(output.restored)
        requests = [self._requests[chunk.sequence.identity] for chunk in output.chunks]
        for request in requests:
            if not request.scheduled_at:
                request.scheduled_at = started
                if self.prefix_store is not None and request.adapter is None:
                    self.prefix_store.keep(request.sequence)
        try:
            tokens = self.strategy.compute(output, requests)
        except Exception as error:
            self._fail_step(requests, error)
            return None
        return _Step(output.chunks, requests, tokens, started)

    def _hand_over(self, step: _Step) -> None:
        """Give the tokens of a step to the requests that are still there."""
        for chunk, request, tokens in zip(step.chunks, step.requests, step.tokens.read(), strict=True):
            if step.is_committed:
                self.scheduler.take_back(chunk.sequence)
            if self._requests.get(chunk.sequence.identity) is request:
                self._commit(step, chunk, request, tokens)
        computed = step.tokens.computed
        self.strategy.committed(step.chunks, step.requests, computed)
        for request in step.requests:
            if request.sequence.overflow and request.sequence.must_shift:
                self.scheduler.shift(request.sequence)
                self.strategy.forget(request)
        now = time.perf_counter()
        self._recorder.computed_tokens += computed
        # steps may overlap: the time of one is that since the one before
        self._recorder.steps.append((computed, now - max(step.started, self._handed_over_at)))
        self._handed_over_at = now

    def _commit(self, step: _Step, chunk: ScheduledChunk, request: ScheduledRequest, tokens: ChunkTokens) -> None:
        if isinstance(tokens, BessemerError):
            self._end(request, tokens)
            return
        if not chunk.num_logits:
            if not step.is_committed:
                self.scheduler.commit(chunk, [])
            return
        begins = len(chunk.sequence.tokens) == chunk.sequence.prompt_length and not chunk.sequence.shifts
        try:
            made = request.take(tokens, self.weight_version)
        except RequestError as error:
            # a token that the tokenizer does not have, where the model has more
            self._end(request, error)
            return
        if step.is_committed:
            self.scheduler.commit_token(chunk.sequence, *made)
        else:
            self.scheduler.commit(chunk, made)
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

    def _fail_step(self, requests: Sequence[ScheduledRequest], error: Exception) -> None:
        """Fail all requests of a step, so that none of it stays scheduled. Re-raises an internal error."""
        failure = error if isinstance(error, BessemerError) else RequestError(f"the step failed: {error}")
        for request in requests:
            self._end(request, failure)
        if failure is not error:
            raise error

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
            # siblings that have not started never will
            for sibling in request.siblings:
                if sibling.sequence.identity not in self._requests and not sibling.done:
                    sibling.fail(error)
        del self._requests[request.sequence.identity]
        self._requests |= {each.sequence.identity: each for each in successors}
        self.scheduler.finish(request.sequence, [each.sequence for each in successors])
        self._forget(request)

    def _forget(self, request: ScheduledRequest) -> None:
        self._recorder.request_ended(request)
        self.strategy.forget(request)
