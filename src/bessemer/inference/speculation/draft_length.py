"""How far to guess ahead: as far as makes answers quickest, by how often guesses come true and by what steps take.

A step that checks k guesses takes r(k) times as long as one without. Guess j of an answer comes true with those before it
with probability p_j, which falls with j, so the answer gets 1 + Σ p tokens in the step. Both sides are measured while answers
are made. What is made greatest is one of two means over the answers, divided by r(k); with k = 0 where that is greatest:

- while others wait for a place, the arithmetic one: tokens a second. Whoever ends gives its place to the next.
- while nobody waits, the harmonic one: the time that a token takes, averaged over the answers. One that hurries ahead at the
  cost of all others leaves an empty place, and the last one ends no sooner.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

from bessemer.inference.request import Request

#: Guesses less likely than this are never worth a row.
_LEAST_CHANCE = 0.05
#: What a guess is taken to cost beside a token, before any was measured.
_UNMEASURED_COST = 0.1
#: Guesses must seem to make answers so many times as quick: of noisy times the best one is better than it will be.
_LEAST_GAIN = 1.05
#: Steps with guesses after which one without is timed again.
_PLAIN_EVERY = 128
#: Steps before more guesses are tried than seem to pay, at first and at most.
_PATIENCE, _MOST_PATIENCE = 16, 512
#: A price has fallen where a step takes less than this share of what was expected.
_FALLEN = 0.7
#: A trial has at most so many guesses an answer, or twice as many as seem to pay.
_TRIAL = 2


class Rate:
    """How often something comes true: the share of what was seen, in which older looks fade."""

    def __init__(self, fading: float, right: float = 0.0, seen: float = 0.0) -> None:
        """right, seen: what to begin with, as if it had been looked at."""
        self.fading, self.right, self.seen = fading, right, seen

    def note(self, right: float, seen: float = 1.0) -> None:
        """So many came true of so many."""
        self.right = self.right * self.fading + right
        self.seen = self.seen * self.fading + seen

    @property
    def share(self) -> float:
        """The share itself, of something that was seen."""
        return self.right / self.seen

    def blended(self, expected: float, weight: float) -> float:
        """The share, where what is expected counts as much as `weight` looks."""
        return (self.right + weight * expected) / (self.seen + weight)


class Recent:
    """A time as it was lately: the median of the last few, of two the lower, since a busy machine makes times longer only."""

    def __init__(self, length: int = 5) -> None:
        self._times: deque[float] = deque(maxlen=length)
        self.value = math.inf

    def add(self, time: float) -> None:
        """One more."""
        self._times.append(time)
        self.value = sorted(self._times)[(len(self._times) - 1) // 2]


class _Plain(Recent):
    """Steps without guesses of so many answers; `since`: steps with guesses that came after the last."""

    since = 0


class _Costs:
    """How much longer a step takes by guesses an answer, of about so many answers."""

    def __init__(self) -> None:
        self._points: dict[int, Recent] = {}
        self._curve: list[tuple[float, int]] = []
        self._waited, self._patience = 0, _PATIENCE

    def add(self, share: float, ratio: float) -> None:
        """A step with so many guesses an answer took so many times as long."""
        if ratio < _FALLEN * self.ratio(share):
            self._patience = _PATIENCE
        key = round(4 * math.log2(share))
        if key not in self._points:
            self._points[key] = Recent()
            insort(self._curve, (share, key))
        self._points[key].add(max(1.0, ratio))

    def is_time_for_a_trial(self) -> bool:
        """Whether more guesses than seem to pay are to be tried at this step; the waits double until a price has fallen."""
        self._waited += 1
        if self._waited < self._patience:
            return False
        self._waited, self._patience = 0, min(2 * self._patience, _MOST_PATIENCE)
        return True

    def ratio(self, share: float) -> float:
        """Between the nearest that were measured; beyond the last, as steep as to the last."""
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
    """Lengths of drafts. `most`: at most so many guesses an answer. Without `adapt`, always as many as there are."""

    def __init__(self, most: int, adapt: bool = True) -> None:
        self.most, self.adapt = most, adapt
        self._plain: dict[int, _Plain] = {}
        self._costs: dict[int, _Costs] = {}

    def lengths(self, chances: Sequence[Sequence[float]], seconds_a_guess: float = 0.0, crowded: bool = True) -> list[int]:
        """How many of each answer's guesses to check.

        chances: of each guess, how likely it comes true where those before it do. seconds_a_guess: what it takes to make one
        guess for each answer, where guesses are not there already. crowded: whether others wait for a place.
        """
        if not self.adapt:
            return [len(each) for each in chances]
        lengths = [0] * len(chances)
        worths = _marginal_gains(chances, crowded)
        plain = self._plain.get(len(chances))
        if not worths or plain is None or plain.since >= _PLAIN_EVERY:
            return lengths
        costs = self._costs.setdefault(len(chances).bit_length(), _Costs())
        making = seconds_a_guess / plain.value
        best = _best(worths, len(chances), costs, making, crowded)
        if costs.is_time_for_a_trial():
            hoped = _best(worths, len(chances), _Costs(), making, crowded)
            best = max(best, min(hoped, max(_TRIAL * len(chances), 2 * best)))
        for _, request in worths[:best]:
            lengths[request] += 1
        return lengths

    def measured(self, requests: int, guesses: int, seconds: float) -> None:
        """What a step took that made the next tokens of so many answers, and checked so many guesses of them all."""
        plain = self._plain.get(requests)
        if not guesses:
            if plain is None:
                plain = self._plain[requests] = _Plain()
            plain.since = 0
            plain.add(seconds)
        elif plain is not None:
            plain.since += 1
            costs = self._costs.setdefault(requests.bit_length(), _Costs())
            costs.add(guesses / requests, seconds / plain.value)


def _marginal_gains(chances: Sequence[Sequence[float]], crowded: bool) -> list[tuple[float, int]]:
    """(minus what a guess adds to the mean, its answer), the one that adds most first; see `_best`."""
    found = []
    for request, each in enumerate(chances):
        chance = expected = 1.0
        for one in each:
            chance *= one
            if chance < _LEAST_CHANCE:
                break
            found.append((-chance if crowded else 1 / (expected + chance) - 1 / expected, request))
            expected += chance
    # an answer's guesses stay in their order: sorting keeps that of equals
    found.sort(key=lambda pair: pair[0])
    return found


def _best(worths: Sequence[tuple[float, int]], requests: int, costs: _Costs, making: float, crowded: bool) -> int:
    """How many guesses make answers quickest. making: what a guess for each answer takes, in plain steps.

    Of answers that get t_i tokens each, crowded: Σ t_i counts, to which a guess adds its chance; else n² / Σ (1 / t_i), in
    which it lessens 1 / t_i.
    """
    best, fastest, total = 0, _LEAST_GAIN * requests, 0.0
    counts: dict[int, int] = {}
    longest = 0
    for count, (worth, request) in enumerate(worths, start=1):
        total -= worth
        tokens = requests + total if crowded else requests * requests / (requests - total)
        if making:
            counts[request] = counts.get(request, 0) + 1
            longest = max(longest, counts[request])
        speed = tokens / (costs.ratio(count / requests) + longest * making)
        if speed > fastest:
            best, fastest = count, speed
    return best


class AcceptanceTracker:
    """What guessing has been worth for each answer, where a guess must be made to be known: by a model.

    An answer whose draft was wrong from its first token goes without for 2, 4, 8 … steps.
    """

    _LONGEST_REST, _FADING, _IDLE_FADING = 64, 0.8, 0.98

    def __init__(self, most: int, adapt: bool = True) -> None:
        self.most, self.adapt = most, adapt
        self._all = Rate(0.98, right=2.0, seen=3.0)
        self._by_request: dict[int, _Acceptance] = {}

    def chances(self, request: Request) -> list[float]:
        """Of as many guesses as may be made for an answer, how likely each is right where those before it are."""
        room = min(self.most, request.sequence.limit - len(request.sequence.tokens) - 1)
        if not self.adapt:
            return [1.0] * room
        habit = self._by_request.setdefault(request.sequence.identity, _Acceptance())
        if habit.rest:
            habit.rest -= 1
            return []
        # what speaks against guesses fades while there are none
        habit.rate.right, habit.rate.seen = habit.rate.right * self._IDLE_FADING, habit.rate.seen * self._IDLE_FADING
        return [habit.rate.blended(self._all.share, 2.0)] * room

    def learn(self, request: Request, guessed: int, right: int) -> None:
        """Of so many guesses that were checked, so many came true; the first that did not made the others void."""
        seen = right + (right < guessed)
        self._all.note(right, seen)
        habit = self._by_request.setdefault(request.sequence.identity, _Acceptance())
        habit.rate.note(right, seen)
        habit.misses = 0 if right else habit.misses + 1
        habit.rest = 0 if right else min(self._LONGEST_REST, 2**habit.misses)

    def forget(self, request: Request) -> None:
        """An answer has ended."""
        self._by_request.pop(request.sequence.identity, None)


class _Acceptance:
    def __init__(self) -> None:
        self.rate = Rate(AcceptanceTracker._FADING)
        self.rest = self.misses = 0
