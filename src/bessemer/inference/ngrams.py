"""Guesses from the text itself: what followed the last few tokens when they occurred before (Saxena 2023, prompt look-up).

It costs nothing and suits answers that repeat their prompt: retrieval, editing, code.
"""

from __future__ import annotations

from collections.abc import Sequence

from bessemer.inference.answers import Answer
from bessemer.inference.pace import Pace
from bessemer.inference.speculation import Draft

#: Lengths of what must have occurred before, the longest tried first.
_LENGTHS = (4, 3, 2)


class Occurrences:
    """Where each n-gram of a growing text ended last but once."""

    def __init__(self, lengths: Sequence[int] = _LENGTHS) -> None:
        self._ends: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in lengths}
        self._read = 0

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """What may follow: the tokens after the latest earlier occurrence of the longest n-gram that has one.

        Where that occurrence reaches the end of the text, the guess goes on in itself, as a loop does.
        """
        self._read_to(tokens, len(tokens) - 1)
        for length, ends in self._ends.items():
            end = ends.get(tuple(tokens[-length:])) if len(tokens) >= length else None
            if end is not None:
                period = len(tokens) - end
                return [tokens[end + place % period] for place in range(count)]
        return []

    def _read_to(self, tokens: Sequence[int], end: int) -> None:
        """Note the n-grams that end before `end`; the last one of the text is what is looked for."""
        for length, ends in self._ends.items():
            for stop in range(max(length, self._read + 1), end + 1):
                ends[tuple(tokens[stop - length : stop])] = stop
        self._read = max(self._read, end)


class NGramProposer:
    """A `Proposer` that looks into each answer's own text, prompt included."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self._texts: dict[int, Occurrences] = {}

    def propose(self, answers: Sequence[Answer]) -> list[Draft]:
        """Guesses are tokens that chance had no part in."""
        drafts = []
        for answer, count in zip(answers, self.pace.lengths(answers), strict=True):
            sequence = answer.sequence
            text = self._texts.setdefault(sequence.identity, Occurrences())
            drafts.append(Draft(text.guess(sequence.tokens, count) if count else ()))
        return drafts

    def learn(self, answer: Answer, guessed: int, right: int) -> None:
        """What became of a draft."""
        self.pace.learn(answer, guessed, right)

    def forget(self, answer: Answer) -> None:
        """An answer has ended."""
        self._texts.pop(answer.sequence.identity, None)
        self.pace.forget(answer)
