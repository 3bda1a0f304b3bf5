"""Proposers of speculative decoding (Leviathan et al. 2023), and the draft length that makes requests fastest.

A step that verifies k draft tokens takes r(k) times as long as one without. Draft token j of a request is accepted with those
before it with probability p_j, which falls with j, so the request gets 1 + Σ p tokens in the step. Both are measured while
requests are served. The policy maximises one of two means over the requests, divided by r(k); k = 0 where that is the largest:

- while requests wait, the arithmetic mean: tokens a second. A request that ends gives its place to the next.
- with an empty queue, the harmonic mean: it minimises the mean time per token. A request that is finished early at the cost
  of all others leaves an empty place, and the last one ends no sooner.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from bessemer.inference.request import Request, ScheduledRequest
from bessemer.inference.scheduling.sequence import ScheduledChunk

# Shapes: d draft tokens, V vocabulary.


class Draft(NamedTuple):
    """Draft tokens. probabilities_dV: the distributions that they were sampled from; None where they were not sampled."""

    tokens: Sequence[int] = ()
    probabilities_dV: Tensor | None = None

    def first(self, count: int) -> Draft:
        """The first `count` tokens of the draft."""
        probabilities_dV = self.probabilities_dV
        return Draft(self.tokens[:count], None if probabilities_dV is None else probabilities_dV[:count])


class Proposer:
    """Proposes draft tokens. The engine core reports every step; a proposer overrides the reports that it needs."""

    #: Whether requests wait for a place at the coming step.
    crowded = False

    def propose(self, requests: Sequence[Request]) -> Sequence[Draft]:
        """A draft for each of these requests, whose next token is to be sampled; an empty one where none pays."""
        raise NotImplementedError

    def learn(self, request: Request, proposed: int, accepted: int) -> None:
        """Report how many tokens of a draft were verified, and how many of them accepted."""

    def computed(self, chunks: Sequence[ScheduledChunk], requests: Sequence[ScheduledRequest]) -> None:
        """Report a computed step, whose tokens belong to the requests; a sequence that has ended is `finished`."""

    def measured(self, requests: int, drafts: int, seconds: float) -> None:
        """Report the time of a step that made the next tokens of requests, verified draft tokens, and did nothing else."""

    def forget(self, request: ScheduledRequest) -> None:
        """Drop what is kept of a request, which has ended."""


#: Least probability of acceptance at which a draft token is verified.
_LEAST_CHANCE = 0.05
#: Cost of a draft token relative to a token, before any was measured.
_UNMEASURED_COST = 0.1
#: Least expected speedup of drafting: the best of several noisy estimates is too optimistic.
_LEAST_GAIN = 1.05
#: Steps with drafts after which one without is timed again.
_PLAIN_EVERY = 128
#: Steps before more draft tokens are tried than seem to pay, at first and at most.
_PATIENCE, _MOST_PATIENCE = 16, 512
#: A cost counts as fallen where a step takes less than this share of the expected time.
_FALLEN = 0.7
#: Most draft tokens per request in a trial, or twice as many as seem to pay.
_TRIAL = 2


class Rate:
    """An acceptance rate: accepted over proposed draft tokens, in which older observations fade."""

    def __init__(self, decay: float, accepted: float = 0.0, proposed: float = 0.0) -> None:
        """accepted, proposed: counts to begin with, a prior."""
        self.decay = decay
        self.accepted = accepted
        self.proposed = proposed

    def observe(self, accepted: float, proposed: float = 1.0) -> None:
        """Add counts; the earlier ones fade."""
        self.accepted = self.accepted * self.decay + accepted
        self.proposed = self.proposed * self.decay + proposed

    @property
    def value(self) -> float:
        """The rate, once something was observed."""
        return self.accepted / self.proposed

    def blended(self, expected: float, weight: float) -> float:
        """The rate, in which what is expected counts as much as `weight` observations."""
        return (self.accepted + weight * expected) / (self.proposed + weight)


class Recent:
    """A recent time: the median of the last few, of two the lower, since a busy machine makes times longer only."""

    def __init__(self, length: int = 5) -> None:
        self._times: deque[float] = deque(maxlen=length)
        self.value = math.inf

    def add(self, time: float) -> None:
        """Add a time."""
        self._times.append(time)
        self.value = sorted(self._times)[(len(self._times) - 1) // 2]


class _PlainTimes(Recent):
    """Times of steps without drafts for one number of requests; `since`: steps with drafts after the last of them."""

    since = 0


class _Costs:
    """How much longer a step takes, by draft tokens per request, for about as many requests."""

    def __init__(self) -> None:
        self._points: dict[int, Recent] = {}
        self._curve: list[tuple[float, int]] = []
        self._waited = 0
        self._patience = _PATIENCE

    def add(self, share: float, ratio: float) -> None:
        """Add a step with `share` draft tokens per request that took `ratio` times as long as one without."""
        if ratio < _FALLEN * self.ratio(share):
            self._patience = _PATIENCE
        key = round(4 * math.log2(share))
        if key not in self._points:
            self._points[key] = Recent()
            insort(self._curve, (share, key))
        self._points[key].add(max(1.0, ratio))

    def is_time_for_a_trial(self) -> bool:
        """Whether this step tries more draft tokens than seem to pay; the waits double until a cost has fallen."""
        self._waited += 1
        if self._waited < self._patience:
            return False
        self._waited = 0
        self._patience = min(2 * self._patience, _MOST_PATIENCE)
        return True

    def ratio(self, share: float) -> float:
        """The cost at `share`, interpolated between the nearest measured ones; beyond the last, as steep as to the last."""
        if not self._curve:
            return 1 + _UNMEASURED_COST * share
        place = bisect_left(self._curve, (share, -1000))
        if place == len(self._curve):
            last, key = self._curve[-1]
            return 1 + (self._points[key].value - 1) * share / last
        right, key = self._curve[place]
        above = self._points[key].value
        left, below = 0.0, 1.0
        if place:
            left, key = self._curve[place - 1]
            below = self._points[key].value
        return below + (above - below) * (share - left) / (right - left)


class DraftLengthPolicy:
    """Lengths of drafts. `most`: most draft tokens per request. Without `adapt`, always as many as there are."""

    def __init__(self, most: int, adapt: bool = True) -> None:
        self.most = most
        self.adapt = adapt
        self._plain: dict[int, _PlainTimes] = {}
        self._costs: dict[int, _Costs] = {}

    def lengths(self, chances: Sequence[Sequence[float]], seconds_a_token: float = 0.0, crowded: bool = True) -> list[int]:
        """How many of each request's draft tokens to verify.

        chances: of each draft token, how likely it is accepted where those before it are. seconds_a_token: what it takes to
        make one draft token for each request, where they are not there already. crowded: whether requests wait.
        """
        if not self.adapt:
            return [len(each) for each in chances]
        lengths = [0] * len(chances)
        gains = _marginal_gains(chances, crowded)
        plain = self._plain.get(len(chances))
        if not gains or plain is None or plain.since >= _PLAIN_EVERY:
            return lengths
        costs = self._costs.setdefault(len(chances).bit_length(), _Costs())
        making = seconds_a_token / plain.value
        best = _best(gains, len(chances), costs, making, crowded)
        if costs.is_time_for_a_trial():
            hoped = _best(gains, len(chances), _Costs(), making, crowded)
            best = max(best, min(hoped, max(_TRIAL * len(chances), 2 * best)))
        for _, request in gains[:best]:
            lengths[request] += 1
        return lengths

    def measured(self, requests: int, drafts: int, seconds: float) -> None:
        """Add the time of a step that made the next tokens of `requests` requests and verified `drafts` draft tokens."""
        plain = self._plain.get(requests)
        if not drafts:
            if plain is None:
                plain = self._plain[requests] = _PlainTimes()
            plain.since = 0
            plain.add(seconds)
        elif plain is not None:
            plain.since += 1
            costs = self._costs.setdefault(requests.bit_length(), _Costs())
            costs.add(drafts / requests, seconds / plain.value)


def _marginal_gains(chances: Sequence[Sequence[float]], crowded: bool) -> list[tuple[float, int]]:
    """(minus what a draft token adds to the mean, its request), the one that adds most first; see `_best`."""
    gains = []
    for request, each in enumerate(chances):
        chance = expected = 1.0
        for one in each:
            chance *= one
            if chance < _LEAST_CHANCE:
                break
            gains.append((-chance if crowded else 1 / (expected + chance) - 1 / expected, request))
            expected += chance
    # a stable sort keeps a request's draft tokens in their order
    gains.sort(key=lambda pair: pair[0])
    return gains


def _best(gains: Sequence[tuple[float, int]], requests: int, costs: _Costs, making: float, crowded: bool) -> int:
    """How many draft tokens make requests fastest. making: what a draft token for each request takes, in plain steps.

    Of requests that get t_i tokens each, crowded: Σ t_i counts, to which a draft token adds its chance; else n² / Σ (1 / t_i),
    in which it lessens 1 / t_i.
    """
    best, fastest, total = 0, _LEAST_GAIN * requests, 0.0
    counts: dict[int, int] = {}
    longest = 0
    for count, (gain, request) in enumerate(gains, start=1):
        total -= gain
        tokens = requests + total if crowded else requests * requests / (requests - total)
        if making:
            counts[request] = counts.get(request, 0) + 1
            longest = max(longest, counts[request])
        speed = tokens / (costs.ratio(count / requests) + longest * making)
        if speed > fastest:
            best, fastest = count, speed
    return best


class AcceptanceTracker:
    """How often each request's draft tokens are accepted, where making them costs time: drafts of a model.

    A request whose draft was rejected from its first token goes without for 2, 4, 8 … steps.
    """

    _LONGEST_REST = 64
    _DECAY = 0.8
    _IDLE_DECAY = 0.98

    def __init__(self, most: int, adapt: bool = True) -> None:
        self.most = most
        self.adapt = adapt
        self._all = Rate(0.98, accepted=2.0, proposed=3.0)
        self._by_request: dict[int, _Acceptance] = {}

    def chances(self, request: Request) -> list[float]:
        """Of each draft token that may be made for a request, how likely it is accepted where those before it are."""
        remaining = min(self.most, request.sequence.limit - len(request.sequence.tokens) - 1)
        if not self.adapt:
            return [1.0] * remaining
        own = self._by_request.setdefault(request.sequence.identity, _Acceptance())
        if own.rest:
            own.rest -= 1
            return []
        # old evidence against drafts fades while there are none
        own.rate.accepted *= self._IDLE_DECAY
        own.rate.proposed *= self._IDLE_DECAY
        return [own.rate.blended(self._all.value, 2.0)] * remaining

    def learn(self, request: Request, proposed: int, accepted: int) -> None:
        """Add a verified draft; the first rejected token made those behind it void."""
        decided = accepted + (accepted < proposed)
        self._all.observe(accepted, decided)
        own = self._by_request.setdefault(request.sequence.identity, _Acceptance())
        own.rate.observe(accepted, decided)
        own.misses = 0 if accepted else own.misses + 1
        own.rest = 0 if accepted else min(self._LONGEST_REST, 2**own.misses)

    def forget(self, request: ScheduledRequest) -> None:
        """Drop what is kept of a request, which has ended."""
        self._by_request.pop(request.sequence.identity, None)


class _Acceptance:
    """One request's rate, and the steps for which it goes without a draft."""

    def __init__(self) -> None:
        self.rate = Rate(AcceptanceTracker._DECAY)
        self.rest = 0
        self.misses = 0
