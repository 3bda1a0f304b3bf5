"""Guesses by the model's own extra blocks (`model/multi_token.py`; DeepSeek-V3, section 2.2).

With L tokens of an answer known, the trunk has states of places 0 … L - 2. Block k takes at place i the state of the block
before it and token i + k, and predicts token i + k + 1. So block k follows the trunk up to place L - 1 - k; to guess, it goes
on to place L - 2 with the guesses that the blocks before it made. The last block may go on further: its state at a place
stands for the state before it at the next.

The blocks have pages of their own under the trunk's numbers. What a guess wrote there is written over when the token is
known. Where the trunk's keys were found by the prefix cache, the blocks' are whatever lies there; only how often guesses come
true depends on it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from bessemer.core.errors import ConfigError
from bessemer.inference.execution.batch import Batch
from bessemer.inference.execution.module_executor import ModuleExecutor
from bessemer.inference.request import Request
from bessemer.inference.scheduling.schedule import ScheduledChunk
from bessemer.inference.speculation.draft_length import AcceptanceTracker, DraftLengthPolicy, Recent
from bessemer.inference.speculation.draft_model import as_draft, guess
from bessemer.inference.speculation.proposer import Draft, Proposer
from bessemer.model.config import ModelConfig

# Shapes: N places, D hidden, V vocabulary.


def extra_blocks(config: ModelConfig) -> int:
    """How many blocks of a model can guess. Raises ConfigError where it has none, or they keep states."""
    if not config.num_nextn_predict_layers:
        raise ConfigError(
            "speculation: mtp: the model has no extra blocks for multi-token prediction; take ngram, or a model trained with "
            "num_nextn_predict_layers"
        )
    if config.types[-1] == "linear_attention":
        raise ConfigError(
            "speculation: mtp: the model's extra blocks have linear attention, whose states cannot be taken back; take ngram"
        )
    return config.num_nextn_predict_layers


def spare_blocks(tokens: int, block_size: int) -> int:
    """Blocks of pages that one answer's guesses may need behind its own."""
    return -(-tokens // block_size)


class _Places(NamedTuple):
    """Places of one answer from `first` on: the states there of the trunk or of a block, and what the next block takes."""

    request: Request
    first: int
    hidden_ND: Tensor
    tokens: list[int]
    spare: int = 0


class _Following:
    """How far the blocks follow the trunk in one answer. ends: of each, the first place it has not come to, where it is with
    the block before it or one place behind. states: what each made at its last place, (1, D)."""

    def __init__(self, start: int, blocks: int) -> None:
        self.ends = [start] * blocks
        self.states: list[Tensor | None] = [None] * blocks

    def before(self, block: int) -> list[Tensor]:
        """Where a block is behind the one before it: what that one made at the place between."""
        state_1D = self.states[block - 1]
        if self.ends[block] == self.ends[block - 1]:
            return []
        assert state_1D is not None
        return [state_1D]


class MultiTokenProposer(Proposer):
    """A `Proposer` with the extra blocks of the very model that checks the guesses.

    Requests with a seed get the likeliest tokens for guesses, as in `DraftModelProposer`.
    """

    def __init__(self, executor: ModuleExecutor, policy: DraftLengthPolicy, max_num_seqs: int) -> None:
        """max_num_seqs: answers that may be guessed for at once; each has `spare_blocks` behind the trunk's pages."""
        self.executor, self.policy, self.acceptance = executor, policy, AcceptanceTracker(policy.most, policy.adapt)
        config, memory = executor.model.config, executor.memory
        self._blocks = extra_blocks(config)
        pages = memory.layers[config.num_hidden_layers].keys
        self._spare = len(pages) - max_num_seqs * spare_blocks(policy.most, memory.block_size)
        self._following: dict[int, _Following] = {}
        self._seconds: dict[int, Recent] = {}
        executor.keeps_pre_norm = True

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        """Drafts of the answers for which it pays, and whose trunk was seen."""
        seconds = self._seconds.get(len(requests).bit_length())
        chances = [self._chances(request) for request in requests]
        lengths = self.policy.lengths(chances, seconds.value if seconds else 0.0, self.crowded)
        drafts = [Draft()] * len(requests)
        chosen = [index for index, length in enumerate(lengths) if length]
        if chosen:
            made = self._draft([requests[index] for index in chosen], [lengths[index] for index in chosen])
            for index, draft in zip(chosen, made, strict=True):
                drafts[index] = draft
        return drafts

    def learn(self, request: Request, guessed: int, right: int) -> None:
        """What became of a draft."""
        self.acceptance.learn(request, guessed, right)

    def measured(self, requests: int, guesses: int, seconds: float) -> None:
        """What a step took."""
        self.policy.measured(requests, guesses, seconds)

    def forget(self, request: Request) -> None:
        """An answer has ended."""
        self.acceptance.forget(request)
        self._following.pop(request.sequence.identity, None)

    def computed(self, works: Sequence[ScheduledChunk], requests: Sequence[Request]) -> None:
        """Let the blocks follow the trunk over the places whose tokens are known now."""
        followed = []
        row = 0
        for work, request in zip(works, requests, strict=True):
            sequence, rows = request.sequence, slice(row, row + work.count)
            row += work.count
            if sequence.status != "running":
                continue
            following = self._following.get(sequence.identity)
            if following is None or following.ends[0] != work.start:  # a new answer, or one that was preempted
                following = self._following[sequence.identity] = _Following(work.start, self._blocks)
            first = max(work.start, self._oldest(request))
            # what the trunk made of guesses that did not come true is void
            hidden_ND = self.executor.pre_norm_ND[rows][first - work.start : sequence.computed - work.start]
            followed.append(_Places(request, first, hidden_ND, []))
        self.executor.pre_norm_ND = torch.empty(0)
        for block in range(self._blocks):
            followed = self._follow(block, followed)

    # -- inside

    def _chances(self, request: Request) -> list[float]:
        following = self._following.get(request.sequence.identity)
        if following is None or following.ends[0] != request.sequence.computed:
            return []
        return self.acceptance.chances(request)

    def _oldest(self, request: Request) -> int:
        """The first place whose keys have a page still: what a window has left behind is not seen again."""
        sequence, memory = request.sequence, self.executor.memory
        table = sequence.tables[memory.group_of[self.executor.model.config.num_hidden_layers]]
        freed = next((index for index, block in enumerate(table) if block >= 0), 0)
        return max(0, min(freed * memory.block_size, sequence.computed - self._blocks))

    def _follow(self, block: int, places: Sequence[_Places]) -> list[_Places]:
        """Let a block follow the one before it over these places; the places over which the next block is to follow it."""
        known = []
        for place in places:
            sequence = place.request.sequence
            end = max(place.first, min(sequence.computed, len(sequence.tokens) - 1 - block))
            tokens = sequence.tokens[place.first + 1 + block : end + 1 + block]
            known.append(_Places(place.request, place.first, place.hidden_ND[: end - place.first], tokens))
        found = []
        for place, state_ND in zip(known, self._run(block, known), strict=True):
            following, first = self._following[place.request.sequence.identity], place.first
            made_ND = state_ND
            if block + 1 < self._blocks and self._oldest(place.request) < first == following.ends[block]:
                before = following.before(block + 1)
                first, made_ND = first - len(before), torch.cat((*before, state_ND))
            following.ends[block] = place.first + len(place.tokens)
            if place.tokens:
                following.states[block] = state_ND[-1:].clone()
            found.append(_Places(place.request, first, made_ND, []))
        return found

    def _draft(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        """So many tokens for each answer, of all together: the first of each, the second of those that want one, …"""
        tokens: list[list[int]] = [[] for _ in requests]
        distributions: list[list[Tensor | None]] = [[] for _ in requests]
        # what the last block made at places whose tokens are guesses, and at the last place of all
        guessed = [torch.empty(0)] * len(requests)
        states = [cast(Tensor, self._following[request.sequence.identity].states[0]) for request in requests]
        rows = list(range(len(requests)))
        begun = time.perf_counter()
        for round in range(max(lengths)):
            block = min(round, self._blocks - 1)
            if round:
                places = [self._next_places(row, requests[row], round, tokens[row], guessed[row], states[row]) for row in rows]
                for row, state_ND in zip(rows, self._run(block, places), strict=True):
                    guessed[row], states[row] = state_ND, state_ND[-1:]
            logits_RV = self.executor.mtp_logits(block, torch.cat([states[row] for row in rows]))
            for row, (token, distribution_V) in zip(rows, guess(logits_RV, [requests[row] for row in rows]), strict=True):
                tokens[row].append(token)
                distributions[row].append(distribution_V)
            rows = [row for row in rows if lengths[row] > round + 1]
        seconds = (time.perf_counter() - begun) / max(lengths)
        self._seconds.setdefault(len(requests).bit_length(), Recent()).add(seconds)
        return [as_draft(made, each) for made, each in zip(tokens, distributions, strict=True)]

    def _next_places(
        self, row: int, request: Request, round: int, drafted: list[int], guessed_ND: Tensor, state_1D: Tensor
    ) -> _Places:
        """Where a block is to go for the next guess, and what it takes there."""
        sequence, following = request.sequence, self._following[request.sequence.identity]
        if round < self._blocks:  # up to the trunk's last place
            block, first = round, following.ends[round]
            before = following.before(block)
            hidden_ND = torch.cat((*before, guessed_ND)) if len(guessed_ND) else torch.cat(before)
        else:  # one place further than before
            block, first, hidden_ND = self._blocks - 1, sequence.computed + round - self._blocks, state_1D
        # the first place takes this token, or a guess that so many others come before
        taken = first + 1 + block
        tokens = sequence.tokens[taken:] + drafted[max(0, taken - len(sequence.tokens)) :]
        spare = self._spare + row * spare_blocks(self.policy.most, self.executor.memory.block_size)
        return _Places(request, first, hidden_ND, tokens[: len(hidden_ND)], spare)

    def _run(self, block: int, places: Sequence[_Places]) -> list[Tensor]:
        """States of a block at places of several answers, each (N, D)."""
        computed = [place for place in places if place.tokens]
        if not computed:
            return [place.hidden_ND[:0] for place in places]
        size = self.executor.memory.block_size
        batch = Batch.empty(len(self.executor.memory.groups))
        for place in computed:
            sequence = place.request.sequence
            blocks = -(-(place.first + len(place.tokens)) // size)
            tables = []
            for table in sequence.tables:
                missing = max(0, blocks - len(table))
                tables.append([max(0, number) for number in table] + list(range(place.spare, place.spare + missing)))
            batch.append(place.tokens, place.first, tables, prompt_length=sequence.prompt_length)
        hidden_ND = self.executor.mtp_hidden(block, batch, torch.cat([place.hidden_ND for place in computed]))
        split = iter(hidden_ND.split([len(place.tokens) for place in computed]))
        return [next(split) if place.tokens else place.hidden_ND[:0] for place in places]
