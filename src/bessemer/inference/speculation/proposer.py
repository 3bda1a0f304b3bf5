"""Proposers of speculative decoding: draft tokens that the model verifies in one step (Leviathan et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from bessemer.inference.request import Request, ScheduledRequest
from bessemer.inference.scheduling.schedule import ScheduledChunk

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
