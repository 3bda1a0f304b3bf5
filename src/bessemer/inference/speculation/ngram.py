"""Guesses from the text itself: what followed the last few tokens when they occurred before (Saxena 2023, prompt look-up).

It costs next to nothing and suits answers that repeat their prompt or themselves: retrieval, editing, code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bessemer.inference.request import Request
from bessemer.inference.speculation.draft_length import DraftLengthPolicy, Rate
from bessemer.inference.speculation.proposer import Draft, Proposer

#: Lengths of what must have occurred before, the longest looked up first.
_LENGTHS = (3, 2)
#: Beyond so many tokens in common, more of them say nothing more.
_LONGEST_MATCH = 16
#: How many looks at one answer count as much as what the others' guesses came to.
_OWN_LOOKS = 4.0
#: How much older looks count at each new one: of one answer, and of all.
_OWN_FADING, _SHARED_FADING = 0.9, 0.98


class Found(NamedTuple):
    """What may follow, and how many tokens the text has in common with the place where it was found."""

    tokens: list[int]
    match: int


_NOTHING = Found([], 0)


class Occurrences:
    """Where each n-gram of a growing text ended last but once. Each token is read once."""

    def __init__(self, lengths: Sequence[int] = _LENGTHS) -> None:
        """lengths: of the n-grams, the longest first."""
        self._ends: list[tuple[int, dict[tuple[int, ...], int]]] = [(length, {}) for length in lengths]
        self._read = 0

    def guess(self, tokens: Sequence[int], count: int) -> Found:
        """The `count` tokens after the latest earlier occurrence of the longest n-gram that has one; none without.

        Where that occurrence reaches the end of the text, the guess goes on in itself, as a loop does.
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
                return Found(list(tokens[end : end + count]), match)
            return Found([tokens[end + place % period] for place in range(count)], match)
        return _NOTHING

    def _read_to(self, tokens: Sequence[int], end: int) -> None:
        """Note the n-grams that end up to `end`: all but the one at the end of the text, which is what is looked for."""
        for length, ends in self._ends:
            for stop in range(max(length, self._read + 1), end + 1):
                ends[tuple(tokens[stop - length : stop])] = stop
        self._read = end


class _Text:
    """One answer's text: its n-grams, the last guess and where it begins, and how guesses of each match came true."""

    def __init__(self) -> None:
        self.occurrences = Occurrences()
        self.guess, self.start = _NOTHING, 0
        self.rates = [Rate(_OWN_FADING) for _ in range(_LONGEST_MATCH + 1)]


class NGramProposer(Proposer):
    """Looks into each answer's own text, prompt included.

    Looking costs no step, so every answer's next token is guessed at every step and compared with what comes, whether the
    guess was worth a draft or not: how often a guess comes true is known by the length of its match, without any trial.
    """

    def __init__(self, policy: DraftLengthPolicy) -> None:
        self.policy = policy
        self._texts: dict[int, _Text] = {}
        # before anything is known: two tokens in common are right every other time, sixteen nearly always
        self._rates = [Rate(_SHARED_FADING, right=match, seen=match + 2) for match in range(_LONGEST_MATCH + 1)]

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        """Guesses that chance had no part in."""
        most, found, chances = self.policy.most, [], []
        for request in requests:
            tokens = request.sequence.tokens
            text = self._texts.get(request.sequence.identity)
            if text is None:
                text = self._texts[request.sequence.identity] = _Text()
            if text.guess.tokens:
                self._compare(text, tokens)
            guess = text.occurrences.guess(tokens, most)
            text.guess, text.start = guess, len(tokens)
            found.append(guess.tokens)
            room = request.sequence.limit - len(tokens) - 1
            chances.append(self._chances(text, min(room, len(guess.tokens))) if guess.tokens else ())
        lengths = self.policy.lengths(chances, crowded=self.crowded)
        return [Draft(tokens[:length]) for tokens, length in zip(found, lengths, strict=True)]

    def measured(self, requests: int, guesses: int, seconds: float) -> None:
        """What a step took."""
        self.policy.measured(requests, guesses, seconds)

    def forget(self, request: Request) -> None:
        """An answer has ended."""
        self._texts.pop(request.sequence.identity, None)

    def _compare(self, text: _Text, tokens: Sequence[int]) -> None:
        """Note which tokens of the last guess came true, up to the first that did not."""
        for place, (guessed, came) in enumerate(zip(text.guess.tokens, tokens[text.start :], strict=False)):
            match = min(text.guess.match + place, _LONGEST_MATCH)
            text.rates[match].note(guessed == came)
            self._rates[match].note(guessed == came)
            if guessed != came:
                return

    def _chances(self, text: _Text, count: int) -> list[float]:
        """How likely each token of the guess is right where those before it are: they lengthen the match."""
        chances = []
        for match in range(text.guess.match, text.guess.match + count):
            match = min(match, _LONGEST_MATCH)
            chances.append(text.rates[match].blended(self._rates[match].share, _OWN_LOOKS))
        return chances
