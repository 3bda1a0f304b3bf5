"""How far to guess ahead: more where guesses come true, less where they do not, and not at all where a step with them takes
longer than it saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bessemer.inference.answers import Answer

#: The first draft's length, and how many steps an answer goes without after the first that was wrong from its first token.
_FIRST, _REST = 4, 2
#: The longest rest: beyond it a draft now and then costs nothing that can be measured.
_LONGEST_REST = 64
#: How much of a new time enters the mean of a step of so many rows.
_FRESH = 0.2


@dataclass
class _Habit:
    """What guessing has been worth for one answer. length: of the next draft. rest: steps without one."""

    length: int = _FIRST
    rest: int = 0
    misses: int = 0


class Pace:
    """Lengths of drafts, by what became of the last ones and by what steps of so many rows were measured to take."""

    def __init__(self, most: int, adapt: bool = True) -> None:
        self.most, self.adapt = most, adapt
        self._habits: dict[int, _Habit] = {}
        self._seconds: dict[int, float] = {}
        self._right = 0.5  # of the first guesses of drafts, the share that came true lately

    def lengths(self, answers: Sequence[Answer]) -> list[int]:
        """How many tokens to guess for each of these answers."""
        if not self.adapt:
            return [self.most] * len(answers)
        pays = self._longest_that_pays(len(answers))
        found = []
        for answer in answers:
            habit = self._habits.setdefault(answer.sequence.identity, _Habit(min(_FIRST, self.most)))
            if habit.rest:
                habit.rest -= 1
                found.append(0)
            else:
                found.append(min(habit.length, pays))
        return found

    def learn(self, answer: Answer, guessed: int, right: int) -> None:
        """What became of a draft."""
        habit = self._habits.setdefault(answer.sequence.identity, _Habit())
        self._right += 0.05 * (right / guessed - self._right)
        if right == guessed:
            habit.length, habit.misses = min(self.most, 2 * habit.length), 0
        elif right:
            habit.length, habit.misses = right + 1, 0
        else:
            habit.length, habit.misses = max(1, habit.length // 2), habit.misses + 1
            habit.rest = min(_LONGEST_REST, _REST**habit.misses)

    def measured(self, rows: int, seconds: float) -> None:
        """What a step took that made the next token of each answer, guesses counted among its rows."""
        before = self._seconds.get(rows)
        self._seconds[rows] = seconds if before is None else before + _FRESH * (seconds - before)

    def forget(self, answer: Answer) -> None:
        """An answer has ended."""
        self._habits.pop(answer.sequence.identity, None)

    def _longest_that_pays(self, answers: int) -> int:
        """The longest draft for everyone in so large a batch that is worth its time; any where nothing is known."""
        plain = self._seconds.get(answers)
        if plain is None:
            return self.most
        best = 0
        for length in range(1, self.most + 1):
            seconds = self._seconds.get(answers * (1 + length))
            gain = sum(self._right**place for place in range(length + 1))
            if seconds is None or gain / seconds > 1 / plain:
                best = length
        return best
