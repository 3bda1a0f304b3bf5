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

# Seconds. Both have vLLM's bounds, so that its dashboards read them, and shorter ones for small models.

#: Bounds for the time to the first token.
_FIRST_TOKEN_BOUNDS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
#: Bounds for the time of a step, and of each token after the first.
STEP_BOUNDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)


#: Bounds for the time of a request, and of its parts.
_REQUEST_BOUNDS = (
    *(0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
#: Bounds for the tokens of a request, and of a step.
_REQUEST_TOKEN_BOUNDS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_STEP_TOKEN_BOUNDS = (1.0, *(float(2**power) for power in range(3, 15)))


#: Bounds of the histograms of `EngineStatistics`.
_BOUNDS = {
    "step_seconds": STEP_BOUNDS,
    "step_tokens": _STEP_TOKEN_BOUNDS,
    "time_to_first_token_seconds": _FIRST_TOKEN_BOUNDS,
    "inter_token_seconds": STEP_BOUNDS,
    "time_per_output_token_seconds": STEP_BOUNDS,
    "request_seconds": _REQUEST_BOUNDS,
    "queue_seconds": _REQUEST_BOUNDS,
    "prefill_seconds": _REQUEST_BOUNDS,
    "decode_seconds": _REQUEST_BOUNDS,
    "request_prompt_tokens": _REQUEST_TOKEN_BOUNDS,
    "request_generated_tokens": _REQUEST_TOKEN_BOUNDS,
}


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
    step_seconds, step_tokens: of the steps that did not fail. time_to_first_token_seconds: of a completion, from its request's
    beginning. inter_token_seconds: between the tokens that follow each other, of several in one step together.

    Of each completion that ended by `stop` or `length`: time_per_output_token_seconds, the mean after the first token;
    request_seconds, from its request's beginning to its end, and of that queue_seconds before its first step, prefill_seconds
    from there to its first token, and decode_seconds; request_prompt_tokens, request_generated_tokens.
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
    step_tokens: Histogram
    time_to_first_token_seconds: Histogram
    inter_token_seconds: Histogram
    time_per_output_token_seconds: Histogram
    request_seconds: Histogram
    queue_seconds: Histogram
    prefill_seconds: Histogram
    decode_seconds: Histogram
    request_prompt_tokens: Histogram
    request_generated_tokens: Histogram

    @property
    def steps(self) -> int:
        """Steps that did not fail."""
        return self.step_seconds.total


@dataclass
class DraftCounts:
    """Drafts that were verified since the start, their tokens, and those of them that were accepted."""

    drafts: int = 0
    proposed: int = 0
    accepted: int = 0

    def add(self, proposed: int, accepted: int) -> None:
        """Count a draft."""
        self.drafts += 1
        self.proposed += proposed
        self.accepted += accepted


class StatisticsRecorder:
    """What the engine core counts; in a step it adds to the attributes. Scheduler and decode strategy keep their own."""

    def __init__(self) -> None:
        self.computed_tokens = 0
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.finished = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        #: Seconds between tokens that followed each other, and steps with their positions and seconds, since a request ended.
        self.gaps: list[float] = []
        self.steps: list[tuple[int, float]] = []
        self._histograms = {name: _Counts(bounds) for name, bounds in _BOUNDS.items()}

    def request_began(self, request: ScheduledRequest) -> None:
        """A request waits for its first step."""
        request.began_at = time.perf_counter()
        self.prompt_tokens += request.sequence.prompt_length

    def first_token_came(self, request: ScheduledRequest) -> None:
        """A completion has its first token."""
        request.first_token_at = request.last_token_at = time.perf_counter()
        self._histograms["time_to_first_token_seconds"].observe(request.first_token_at - request.began_at)

    def _take_in(self) -> None:
        """Move the noted gaps and steps into the histograms."""
        for gap in self.gaps:
            self._histograms["inter_token_seconds"].observe(gap)
        for tokens, seconds in self.steps:
            self._histograms["step_tokens"].observe(tokens)
            self._histograms["step_seconds"].observe(seconds)
        self.gaps.clear()
        self.steps.clear()

    def request_ended(self, request: ScheduledRequest) -> None:
        """Count a request that has ended, unless it samples no tokens."""
        self._take_in()
        if not isinstance(request, Request):
            return
        self.finished["error" if request.error is not None else request.finish_reason or "abort"] += 1
        made = len(request.token_ids)
        # a prompt that is only read makes none
        if request.finish_reason is None or not request.first_token_at:
            return
        now = time.perf_counter()
        if made > 1:
            self._histograms["time_per_output_token_seconds"].observe((now - request.first_token_at) / (made - 1))
        self._histograms["request_seconds"].observe(now - request.began_at)
        self._histograms["queue_seconds"].observe(request.scheduled_at - request.began_at)
        self._histograms["prefill_seconds"].observe(request.first_token_at - request.scheduled_at)
        self._histograms["decode_seconds"].observe(now - request.first_token_at)
        self._histograms["request_prompt_tokens"].observe(request.prompt_tokens)
        self._histograms["request_generated_tokens"].observe(made)

    def read(self, scheduler: Scheduler, drafts: DraftCounts) -> EngineStatistics:
        """The statistics at this moment, between two steps."""
        self._take_in()
        return EngineStatistics(
            running=scheduler.running,
            waiting=scheduler.waiting,
            blocks=tuple(BlockUsage(pool.total, pool.total - pool.free) for pool, _ in scheduler.groups),
            prefix_cache_query_tokens=scheduler.asked_tokens,
            prefix_cache_hit_tokens=scheduler.found_tokens,
            preemptions=scheduler.preemptions,
            drafts=drafts.drafts,
            draft_tokens_proposed=drafts.proposed,
            draft_tokens_accepted=drafts.accepted,
            computed_tokens=self.computed_tokens,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            finished=MappingProxyType(dict(self.finished)),
            **{name: counts.read() for name, counts in self._histograms.items()},
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
