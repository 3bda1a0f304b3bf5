"""Guessing ahead: drafts of tokens that the model then checks all at once (Leviathan et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from bessemer.inference.request import Request
from bessemer.inference.scheduling.schedule import ScheduledChunk

# Shapes: d drafted tokens, V vocabulary.


class Draft(NamedTuple):
    """Guessed tokens. probabilities_dV: the distributions that they were drawn from; None where chance had no part."""

    tokens: Sequence[int] = ()
    probabilities_dV: Tensor | None = None

    def first(self, count: int) -> Draft:
        """The draft cut to so many tokens."""
        probabilities_dV = self.probabilities_dV
        return Draft(self.tokens[:count], None if probabilities_dV is None else probabilities_dV[:count])


class Proposer:
    """Guesses what comes next. The loop tells it of every step; who does not need to know leaves that out."""

    #: Whether answers wait for a place at the step to come.
    crowded = False

    def propose(self, requests: Sequence[Request]) -> Sequence[Draft]:
        """A draft for each of these answers, whose next token is to be made; an empty one where nothing is worth a try."""
        raise NotImplementedError

    def learn(self, request: Request, guessed: int, right: int) -> None:
        """What became of a draft: how many of its tokens were checked, and how many came true."""

    def computed(self, works: Sequence[ScheduledChunk], requests: Sequence[Request]) -> None:
        """A step has been computed, and its tokens belong to the answers; one that has ended is `finished`."""

    def measured(self, requests: int, guesses: int, seconds: float) -> None:
        """What a step took that made the next tokens of so many answers, checked so many guesses, and did nothing else."""

    def forget(self, request: Request) -> None:
        """An answer has ended, or begins anew."""


class Speculated(NamedTuple):
    """Since the start: guesses that were checked, those of them that came true, and steps that made tokens."""

    guessed: int
    right: int
    steps: int
