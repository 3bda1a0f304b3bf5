"""Guessing ahead: drafts of tokens that the model then checks all at once (Leviathan et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from bessemer.inference.answers import Answer

# Shapes: d drafted tokens, V vocabulary.


class Draft(NamedTuple):
    """Guessed tokens. probabilities_dV: the distributions that they were drawn from; None where chance had no part."""

    tokens: Sequence[int] = ()
    probabilities_dV: Tensor | None = None

    def first(self, count: int) -> Draft:
        """The draft cut to so many tokens."""
        probabilities_dV = self.probabilities_dV
        return Draft(self.tokens[:count], None if probabilities_dV is None else probabilities_dV[:count])


class Proposer(Protocol):
    """Guesses what comes next."""

    def propose(self, answers: Sequence[Answer]) -> Sequence[Draft]:
        """A draft for each of these answers, whose next token is to be made; an empty one where nothing is worth a try."""

    def learn(self, answer: Answer, guessed: int, right: int) -> None:
        """What became of a draft: how many of its tokens were checked, and how many came true."""

    def forget(self, answer: Answer) -> None:
        """An answer has ended."""
