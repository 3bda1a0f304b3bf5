"""N-gram proposer: what followed the last few tokens when they occurred before (prompt lookup, Saxena 2023).

It costs next to nothing and suits completions that repeat their prompt or themselves: retrieval, editing, code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bessemer.inference.request import Request, ScheduledRequest
from bessemer.inference.speculation.proposer import Draft, DraftLengthPolicy, Proposer, Rate

#: Lengths of the n-grams, the longest looked up first.
_LENGTHS = (3, 2)
#: Longest match that is counted by its length: a longer one predicts no better.
_LONGEST_MATCH = 16
#: Observations of one request that count as much as the rate of all requests.
_SHARED_WEIGHT = 4.0
#: How much older observations count at each new one: of one request, and of all.
_OWN_DECAY = 0.9
_SHARED_DECAY = 0.98


class Continuation(NamedTuple):
    """Tokens that may follow, and how many tokens the text has in common with the place where they were found."""

    tokens: list[int]
    match: int


_NO_CONTINUATION = Continuation([], 0)


class Occurrences:
    """Where each n-gram of a growing text last ended, the one at its end left out. Each token is read once."""

    def __init__(self, lengths: Sequence[int] = _LENGTHS) -> None:
        """lengths: of the n-grams, the longest first."""
        self._ends: list[tuple[int, dict[tuple[int, ...], int]]] = [(length, {}) for length in lengths]
        self._read = 0

    def continuation(self, tokens: Sequence[int], count: int) -> Continuation:
        """The `count` tokens after the latest earlier occurrence of the longest n-gram that has one; none without.

        Where that occurrence reaches the end of the text, the continuation repeats itself, as a loop does.
        """
        self._read_to(tokens, len(tokens) - 1)
        for length, ends in self._ends:
            end = ends.get(tuple(tokens[-length:]))
            if end is None:
                continue
            match = length
            most = min(end, _LONGEST_MATCH)
            while match < most and tokens[end - 1 - match] == tokens[-1 - match]:
                match += 1
            period = len(tokens) - end
            if period >= count:
                return Continuation(list(tokens[end : end + count]), match)
            return Continuation([tokens[end + place % period] for place in range(count)], match)
        return _NO_CONTINUATION

    def _read_to(self, tokens: Sequence[int], end: int) -> None:
        """Add the n-grams that end up to `end`: all but the one at the end of the text, which is looked up."""
        for length, ends in self._ends:
            for stop in range(max(length, self._read + 1), end + 1):
                ends[tuple(tokens[stop - length : stop])] = stop
        self._read = end


class _RequestText:
    """One request's text: its n-grams, the last continuation and where it begins, and the acceptance rate by match length."""

    def __init__(self) -> None:
        self.occurrences = Occurrences()
        self.last = _NO_CONTINUATION
        self.start = 0
        self.rates = [Rate(_OWN_DECAY) for _ in range(_LONGEST_MATCH + 1)]


class NGramProposer(Proposer):
    """Looks up each request's own text, prompt included.

    A look-up costs no step, so every request's next tokens are looked up at every step and compared with what comes, whether
    they made a draft or not: the acceptance rate is known by the length of the match, without any trial.
    """

    def __init__(self, policy: DraftLengthPolicy) -> None:
        self.policy = policy
        self._texts: dict[int, _RequestText] = {}
        # prior: with two tokens in common every other token is accepted, with sixteen nearly all
        self._rates = [Rate(_SHARED_DECAY, accepted=match, proposed=match + 2) for match in range(_LONGEST_MATCH + 1)]

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        """Draft tokens that were not sampled."""
        most = self.policy.most
        continuations, chances = [], []
        for request in requests:
            tokens = request.sequence.tokens
            text = self._texts.get(request.sequence.identity)
            if text is None:
                text = self._texts[request.sequence.identity] = _RequestText()
            if text.last.tokens:
                self._compare(text, tokens)
            text.last = text.occurrences.continuation(tokens, most)
            text.start = len(tokens)
            proposed = text.last.tokens
            continuations.append(proposed)
            remaining = request.sequence.limit - len(tokens) - 1
            chances.append(self._chances(text, min(remaining, len(proposed))) if proposed else ())
        lengths = self.policy.lengths(chances, crowded=self.crowded)
        return [Draft(tokens[:length]) for tokens, length in zip(continuations, lengths, strict=True)]

    def measured(self, requests: int, drafts: int, seconds: float) -> None:
        """Report a step's time to the policy."""
        self.policy.measured(requests, drafts, seconds)

    def forget(self, request: ScheduledRequest) -> None:
        """Drop the text of a request, which has ended."""
        self._texts.pop(request.sequence.identity, None)

    def _compare(self, text: _RequestText, tokens: Sequence[int]) -> None:
        """Observe which tokens of the last continuation came, up to the first that did not."""
        for place, (proposed, came) in enumerate(zip(text.last.tokens, tokens[text.start :], strict=False)):
            match = min(text.last.match + place, _LONGEST_MATCH)
            text.rates[match].observe(proposed == came)
            self._rates[match].observe(proposed == came)
            if proposed != came:
                return

    def _chances(self, text: _RequestText, count: int) -> list[float]:
        """How likely each token of the continuation is accepted where those before it are: they lengthen the match."""
        chances = []
        for match in range(text.last.match, text.last.match + count):
            match = min(match, _LONGEST_MATCH)
            chances.append(text.rates[match].blended(self._rates[match].value, _SHARED_WEIGHT))
        return chances
