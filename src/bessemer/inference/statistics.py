"""Counts and times of an engine since its start.

A step adds to a few numbers (`StatisticsRecorder`); `EngineStatistics` is what they were at one moment, in the form that a
Prometheus exporter needs: counters only grow, and histograms have fixed bounds.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

from bessemer.inference.request import Request, ScheduledRequest
from bessemer.inference.scheduling.scheduler import Scheduler
from bessemer.inference.speculation.decoder import SpeculativeDecoder

# Seconds. Both have vLLM's bounds, so that its dashboards read them, and shorter ones for small models.

#: Of the first token.
_FIRST_TOKEN_BOUNDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
#: Of a step, and of each token after the first.
STEP_BOUNDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)


class Histogram(NamedTuple):
    """How many values lie in each bucket.

    bounds: the largest value of each bucket, ascending. counts: values in each bucket alone, with one more beyond the last
    bound. sum: of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def total(self) -> int:
        """How many values there are."""
        return sum(self.counts)

    @property
    def cumulative(self) -> tuple[int, ...]:
        """Values up to each bound, and all: Prometheus' `le` buckets, the last of which is `+Inf`."""
        return tuple(accumulate(self.counts))


class BlockUsage(NamedTuple):
    """KV blocks of a group of layers. used: those that a running sequence holds; cached prefixes that none holds are free."""

    total: int
    used: int


@dataclass(frozen=True)
class EngineStatistics:
    """An engine at one moment, and its counts since the start; whatever is not said to be of this moment only grows.

    running, waiting: sequences of this moment, of which n completions of a prompt are n. blocks: of this moment, by group of
    layers. prefix_cache_query_tokens: tokens that sequences had when they first ran; prefix_cache_hit_tokens: those of them
    found in the prefix cache. preemptions: times that a sequence gave up its blocks. drafts: drafts that were verified;
    draft_tokens_proposed, draft_tokens_accepted: their tokens. computed_tokens: positions that the model computed, drafts and
    repeated ones included. prompt_tokens: of all requests that began, once for each prompt. generated_tokens: of all
    completions. finished: completions that have ended, by `stop`, `length`, `abort` (stopped by their caller) and `error`.
    step_seconds: of the steps that did not fail. time_to_first_token_seconds: of a completion, from its request's beginning.
    time_per_output_token_seconds: the mean after the first token of each completion that ended by `stop` or `length`.
    """

    running: int
    waiting: int
    blocks: tuple[BlockUsage, ...]
    prefix_cache_query_tokens: int
    prefix_cache_hit_tokens: int
    preemptions: int
    drafts: int
    draft_tokens_proposed: int
    draft_tokens_accepted: int
    computed_tokens: int
    prompt_tokens: int
    generated_tokens: int
    finished: Mapping[str, int]
    step_seconds: Histogram
    time_to_first_token_seconds: Histogram
    time_per_output_token_seconds: Histogram

    @property
    def steps(self) -> int:
        """Steps that did not fail."""
        return self.step_seconds.total


class StatisticsRecorder:
    """What the engine core counts; in a step it adds to the attributes. Scheduler and speculative decoding keep their own."""

    def __init__(self) -> None:
        self.computed_tokens = 0
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.finished = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        #: Of steps: how many in each bucket of `STEP_BOUNDS`, and of all of them the sum.
        self.step_counts = [0] * (len(STEP_BOUNDS) + 1)
        self.step_seconds = 0.0
        self._first_token_seconds = _Counts(_FIRST_TOKEN_BOUNDS)
        self._token_seconds = _Counts(STEP_BOUNDS)

    def request_began(self, request: ScheduledRequest) -> None:
        """A request waits for its first step."""
        request.began_at = time.perf_counter()
        self.prompt_tokens += request.sequence.prompt_length

    def first_token_came(self, request: ScheduledRequest) -> None:
        """A completion has its first token."""
        request.first_token_at = time.perf_counter()
        self._first_token_seconds.observe(request.first_token_at - request.began_at)

    def request_ended(self, request: ScheduledRequest) -> None:
        """A request has ended; nothing is counted of one that asks for logits."""
        if not isinstance(request, Request):
            return
        self.finished["error" if request.error is not None else request.finish_reason or "abort"] += 1
        following = len(request.sequence.tokens) - request.sequence.prompt_length - 1
        if request.finish_reason is not None and following > 0:
            self._token_seconds.observe((time.perf_counter() - request.first_token_at) / following)

    def read(self, scheduler: Scheduler, speculation: SpeculativeDecoder | None) -> EngineStatistics:
        """The statistics at this moment, between two steps."""
        return EngineStatistics(
            running=scheduler.running,
            waiting=scheduler.waiting,
            blocks=tuple(BlockUsage(pool.total, pool.total - pool.free) for pool, _ in scheduler.groups),
            prefix_cache_query_tokens=scheduler.asked_tokens,
            prefix_cache_hit_tokens=scheduler.found_tokens,
            preemptions=scheduler.preemptions,
            drafts=0 if speculation is None else speculation.drafts,
            draft_tokens_proposed=0 if speculation is None else speculation.proposed,
            draft_tokens_accepted=0 if speculation is None else speculation.accepted,
            computed_tokens=self.computed_tokens,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            finished=MappingProxyType(dict(self.finished)),
            step_seconds=Histogram(STEP_BOUNDS, tuple(self.step_counts), self.step_seconds),
            time_to_first_token_seconds=self._first_token_seconds.read(),
            time_per_output_token_seconds=self._token_seconds.read(),
        )


class _Counts:
    """A histogram that grows."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def read(self) -> Histogram:
        return Histogram(self._bounds, tuple(self._counts), self._sum)
