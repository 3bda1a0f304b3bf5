"""Requests that sample nothing: scores, the log-probabilities of continuations that share a prefix, and captures of a prompt.

The prefix is read once. The logits after it give the first token of every continuation; the rest of each is read by a request
of its own that is forked from the prefix, and its last token is never read. A continuation of one token needs no request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bessemer.core.errors import BessemerError, RequestError
from bessemer.inference.capture import Captured, Recorder
from bessemer.inference.request import ScheduledRequest
from bessemer.inference.sampling.sampler import NOT_FINITE, Sampled, likeliest
from bessemer.inference.scheduling.sequence import ScheduledChunk, TokenSequence
from bessemer.model.adapters import Adapter

# Shapes: R rows, V vocabulary, K tokens of a row.

#: Rows whose log-probabilities of the whole vocabulary are in memory at once.
_ROWS = 16


def token_scores(logits_RV: Tensor, tokens_RK: Sequence[Sequence[int]]) -> tuple[list[list[float]], list[list[bool]]]:
    """Of K tokens in each row: log-probabilities (natural logarithm) by the row's logits, and whether each is what greedy
    decoding takes, the likeliest (the first of equals).

    Raises RequestError where logits are not finite.
    """
    values_RK: list[list[float]] = []
    greedy_RK: list[list[bool]] = []
    for start in range(0, len(tokens_RK), _ROWS):
        logits_BV, tokens_BK = logits_RV[start : start + _ROWS], tokens_RK[start : start + _ROWS]
        best_B = likeliest(logits_BV)
        if min(best_B) < 0:
            raise RequestError(NOT_FINITE)
        ids_BK = torch.tensor(tokens_BK, device=logits_BV.device)
        values_RK += logits_BV.log_softmax(-1).gather(-1, ids_BK).tolist()
        greedy_RK += [[token == best for token in tokens] for tokens, best in zip(tokens_BK, best_B, strict=True)]
    return values_RK, greedy_RK


# Shapes: R wanted rows of a chunk, V vocabulary.

#: A prefix and its continuations: texts, or token ids.
ScoreItem = tuple[str | Sequence[int], Sequence[str] | Sequence[Sequence[int]]]
#: Makes a sequence of (tokens, position from which logits are wanted, salt).
NewSequence = Callable[[list[int], int, str | None], TokenSequence]


@dataclass(frozen=True)
class Score:
    """How likely a continuation is after its prefix, by the model's own distribution: no temperature, no truncation.

    log_probs: of each of its tokens after all before it, natural logarithm. greedy: whether each is what greedy decoding takes.
    cached_tokens: of the prefix, found in the prefix cache.
    """

    token_ids: list[int]
    log_probs: list[float]
    greedy: list[bool]
    cached_tokens: int = field(default=0, compare=False)

    @property
    def total(self) -> float:
        """The continuation's log-probability, in nats."""
        return sum(self.log_probs)

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding continues the prefix with all of it."""
        return all(self.greedy)


class _PartialScore:
    """The score of a continuation that is read in several steps."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids
        self.log_probs: list[float] = []
        self.greedy: list[bool] = []

    @property
    def complete(self) -> bool:
        return len(self.log_probs) == len(self.token_ids)

    def wanted_rows(self, chunk: ScheduledChunk) -> range:
        """The tokens of a chunk, counted from 0, that come before one whose score is not known."""
        # tokens computed again after a preemption are not scored again
        first = chunk.sequence.prompt_length - 1 + len(self.log_probs)
        return range(first - chunk.start, chunk.count)

    def add(self, log_prob: float, is_greedy: bool) -> None:
        self.log_probs.append(log_prob)
        self.greedy.append(is_greedy)

    def take_logits(self, logits_RV: Tensor) -> None:
        """Score the next R tokens."""
        known = len(self.log_probs)
        values, greedy = token_scores(logits_RV, [[token] for token in self.token_ids[known : known + len(logits_RV)]])
        for (log_prob,), (is_greedy,) in zip(values, greedy, strict=True):
            self.add(log_prob, is_greedy)


class ScoreRequest(ScheduledRequest):
    """Asks for the scores of continuations of one prefix.

    It reads the prefix, and a lone continuation with it. Of several, each that has more than one token is a successor, in the
    place of the request whose sequence has ended before it. `siblings`: those of them that have begun and not ended.
    """

    def __init__(
        self,
        prefix: list[int],
        continuations: Sequence[list[int]],
        new_sequence: NewSequence,
        salt: str | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        """salt: of the prefix. Each continuation has the salt and the adapter of the request in whose place it begins."""
        self._partial = [_PartialScore(tokens) for tokens in continuations]
        self._is_lone = len(continuations) == 1
        self._unread = deque(() if self._is_lone else (each for each in self._partial if len(each.token_ids) > 1))
        self._new_sequence = new_sequence
        self._prefix = prefix
        own = continuations[0][:-1] if self._is_lone else []
        super().__init__(new_sequence(prefix + own, len(prefix) - 1, salt), adapter)
        self.siblings: list[ScheduledRequest] = []

    @property
    def done(self) -> bool:
        return self.error is not None or (self.ended and not self._unread and not self.siblings)

    @property
    def ended(self) -> bool:
        first = self._partial[0]
        return self.error is not None or (first.complete if self._is_lone else bool(first.log_probs))

    def wanted_rows(self, chunk: ScheduledChunk) -> range:
        return self._partial[0].wanted_rows(chunk)

    def take_logits(self, chunk: ScheduledChunk, logits_RV: Tensor) -> None:
        if not self._partial[0].log_probs:
            (values,), (greedy,) = token_scores(logits_RV[:1], [[each.token_ids[0] for each in self._partial]])
            for each, log_prob, is_greedy in zip(self._partial, values, greedy, strict=True):
                each.add(log_prob, is_greedy)
            logits_RV = logits_RV[1:]
        self._partial[0].take_logits(logits_RV)

    def successors(self, places: int) -> list[ScheduledRequest]:
        return self.successors_of(self, places)

    def successors_of(self, ended: ScheduledRequest, places: int) -> list[ScheduledRequest]:
        """The continuations that take the place of a request that has ended, at most `places`.

        They take over the adapter and the salt of `ended`, which may have changed since the prefix was read.
        """
        begun: list[ScheduledRequest] = []
        while self._unread and len(begun) < places and self.error is None:
            partial = self._unread.popleft()
            # made when they begin: thousands of waiting items need no copies of their prefixes
            sequence = self._new_sequence(self._prefix + partial.token_ids[:-1], len(self._prefix), ended.sequence.salt)
            begun.append(_ContinuationRequest(self, partial, sequence, ended.adapter))
        self.siblings += begun
        return begun

    def scores(self) -> list[Score]:
        """The score of each continuation, once it is done. Raises the request's error when there is one."""
        if self.error is not None:
            raise self.error
        cached = self.sequence.cached
        return [Score(each.token_ids, each.log_probs, each.greedy, cached) for each in self._partial]


class _ContinuationRequest(ScheduledRequest):
    """Reads one continuation after the prefix of a `ScoreRequest`."""

    def __init__(self, first: ScoreRequest, partial: _PartialScore, sequence: TokenSequence, adapter: Adapter | None) -> None:
        super().__init__(sequence, adapter)
        self._first = first
        self._partial = partial

    @property
    def done(self) -> bool:
        return self.error is not None or self._partial.complete

    def fail(self, error: BessemerError) -> None:
        super().fail(error)
        self._first.fail(error)

    def wanted_rows(self, chunk: ScheduledChunk) -> range:
        return self._partial.wanted_rows(chunk)

    def take_logits(self, chunk: ScheduledChunk, logits_RV: Tensor) -> None:
        self._partial.take_logits(logits_RV)

    def successors(self, places: int) -> list[ScheduledRequest]:
        self._first.siblings.remove(self)
        return self._first.successors_of(self, places)


class CaptureRequest(ScheduledRequest):
    """Reads a prompt for its captured values alone: no logits, no tokens."""

    def __init__(self, sequence: TokenSequence, recorder: Recorder, adapter: Adapter | None = None) -> None:
        super().__init__(sequence, adapter, recorder)
        self._recorder = recorder
        self._is_read = False

    @property
    def done(self) -> bool:
        return self._is_read or self.error is not None

    @property
    def captured(self) -> Captured:
        """What was captured, once it is done."""
        return self._recorder.captured(self.sequence.prompt_length)

    def wanted_rows(self, chunk: ScheduledChunk) -> range:
        return range(0)

    def take(self, sampled: list[Sampled], weight_version: int = 0) -> list[int]:
        self._is_read = True
        return super().take(sampled)
