"""MTP proposer: draft tokens of the model's own MTP modules (`model/decoder.py`; DeepSeek-V3, section 2.2).

With L tokens of a request known, the model has pre-norm hidden states of positions 0 … L - 2. Module k takes at position i
the state of the module before it and token i + k, and predicts token i + k + 1. So module k follows the model up to position
L - 1 - k; to draft, it goes on to position L - 2 with the draft tokens of the modules before it. The last module may go on
further: its state at a position stands for the state before it at the next.

The modules have KV blocks of their own under the model's block numbers. Keys of draft tokens are written over when the token
is known. Where the model's keys were found in the prefix cache, the modules' are whatever lies there; only the acceptance
rate depends on it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from bessemer.core.errors import ConfigError
from bessemer.inference.execution.batch import Batch
from bessemer.inference.execution.runner import Runner
from bessemer.inference.request import Request, ScheduledRequest
from bessemer.inference.scheduling.sequence import ScheduledChunk
from bessemer.inference.speculation.draft_model import as_draft, draft_tokens
from bessemer.inference.speculation.proposer import AcceptanceTracker, Draft, DraftLengthPolicy, Proposer, Recent
from bessemer.model.attention import variant_of
from bessemer.model.config import ModelConfig

# Shapes: N positions, D hidden, V vocabulary.


def mtp_modules(config: ModelConfig) -> int:
    """How many MTP modules of a model can draft. Raises ConfigError where it has none, or they keep states."""
    if not config.num_nextn_predict_layers:
        raise ConfigError(
            "speculation: mtp: the model has no MTP modules (multi-token prediction); take ngram, or a model trained with "
            "num_nextn_predict_layers"
        )
    if variant_of(config, config.num_hidden_layers - 1).recurrent:
        raise ConfigError(
            "speculation: mtp: the model's MTP modules have linear attention, whose states cannot be taken back; take ngram"
        )
    return config.num_nextn_predict_layers


def spare_blocks(tokens: int, block_size: int) -> int:
    """KV blocks that one request's draft tokens may need behind its own."""
    return -(-tokens // block_size)


class _Span(NamedTuple):
    """Positions of one request from `first` on: the states there of the model or of a module, and the tokens that the next
    module takes. spare: the first of the KV blocks behind the request's own."""

    request: ScheduledRequest
    first: int
    hidden_ND: Tensor
    tokens: list[int]
    spare: int = 0


class _Progress:
    """How far the modules follow the model in one request.

    ends: of each module, the first position it has not come to, where it is with the module before it or one position behind.
    states: what each made at its last position, (1, D).
    """

    def __init__(self, start: int, modules: int) -> None:
        self.ends = [start] * modules
        self.states: list[Tensor | None] = [None] * modules

    def before(self, module: int) -> list[Tensor]:
        """Where a module is behind the one before it: what that one made at the position between."""
        state_1D = self.states[module - 1]
        if self.ends[module] == self.ends[module - 1]:
            return []
        assert state_1D is not None
        return [state_1D]


class MtpProposer(Proposer):
    """A `Proposer` with the MTP modules of the model that verifies the drafts.

    Requests with a seed get the likeliest tokens as drafts, as in `DraftModelProposer`.
    """

    def __init__(self, runner: Runner, policy: DraftLengthPolicy, max_num_seqs: int) -> None:
        """max_num_seqs: most requests that are drafted for at once; each has `spare_blocks` behind the model's KV blocks."""
        self.runner = runner
        self.policy = policy
        self.acceptance = AcceptanceTracker(policy.most, policy.adapt)
        config, memory = runner.model.config, runner.memory
        self._modules = mtp_modules(config)
        pages = memory.layers[config.num_hidden_layers].keys
        self._spare = len(pages) - max_num_seqs * spare_blocks(policy.most, memory.block_size)
        self._progress: dict[int, _Progress] = {}
        self._seconds: dict[int, Recent] = {}
        runner.keeps_pre_norm = True

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        """Drafts of the requests for which it pays, and whose pre-norm hidden states were computed since they began."""
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

    def learn(self, request: Request, proposed: int, accepted: int) -> None:
        """Report a verified draft to the acceptance tracker."""
        self.acceptance.learn(request, proposed, accepted)

    def measured(self, requests: int, drafts: int, seconds: float) -> None:
        """Report a step's time to the policy."""
        self.policy.measured(requests, drafts, seconds)

    def forget(self, request: ScheduledRequest) -> None:
        """Drop what is kept of a request, which has ended."""
        self.acceptance.forget(request)
        self._progress.pop(request.sequence.identity, None)

    def computed(self, chunks: Sequence[ScheduledChunk], requests: Sequence[ScheduledRequest]) -> None:
        """Let the modules follow the model over the positions whose tokens are known now."""
        followed = []
        row = 0
        for chunk, request in zip(chunks, requests, strict=True):
            sequence, rows = request.sequence, slice(row, row + chunk.count)
            row += chunk.count
            if sequence.status != "running":
                continue
            progress = self._progress.get(sequence.identity)
            # a new request, or one that was preempted
            if progress is None or progress.ends[0] != chunk.start:
                progress = self._progress[sequence.identity] = _Progress(chunk.start, self._modules)
            first = max(chunk.start, self._oldest(request))
            # states of rejected draft tokens are void
            hidden_ND = self.runner.pre_norm_ND[rows][first - chunk.start : sequence.computed - chunk.start]
            followed.append(_Span(request, first, hidden_ND, []))
        self.runner.pre_norm_ND = torch.empty(0)
        for module in range(self._modules):
            followed = self._follow(module, followed)

    # -- inside

    def _chances(self, request: Request) -> list[float]:
        progress = self._progress.get(request.sequence.identity)
        if progress is None or progress.ends[0] != request.sequence.computed:
            return []
        return self.acceptance.chances(request)

    def _oldest(self, request: ScheduledRequest) -> int:
        """The first position whose keys still have a block: those behind the window were freed."""
        sequence, memory = request.sequence, self.runner.memory
        table = sequence.tables[memory.group_of[self.runner.model.config.num_hidden_layers]]
        freed = next((index for index, block in enumerate(table) if block >= 0), 0)
        return max(0, min(freed * memory.block_size, sequence.computed - self._modules))

    def _follow(self, module: int, spans: Sequence[_Span]) -> list[_Span]:
        """Let a module follow the one before it over these spans. Returns the spans for the next module."""
        known = []
        for span in spans:
            sequence = span.request.sequence
            end = max(span.first, min(sequence.computed, len(sequence.tokens) - 1 - module))
            tokens = sequence.tokens[span.first + 1 + module : end + 1 + module]
            known.append(_Span(span.request, span.first, span.hidden_ND[: end - span.first], tokens))
        found = []
        for span, state_ND in zip(known, self._run(module, known), strict=True):
            progress, first = self._progress[span.request.sequence.identity], span.first
            made_ND = state_ND
            if module + 1 < self._modules and self._oldest(span.request) < first == progress.ends[module]:
                before = progress.before(module + 1)
                first, made_ND = first - len(before), torch.cat((*before, state_ND))
            progress.ends[module] = span.first + len(span.tokens)
            if span.tokens:
                progress.states[module] = state_ND[-1:].clone()
            found.append(_Span(span.request, first, made_ND, []))
        return found

    def _draft(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        """Drafts of these lengths, of all requests together: the first token of each, the second of those that want one, …"""
        tokens: list[list[int]] = [[] for _ in requests]
        distributions: list[list[Tensor | None]] = [[] for _ in requests]
        # what the last module made at positions whose tokens are draft tokens, and at the last position of all
        drafted = [torch.empty(0)] * len(requests)
        states = [cast(Tensor, self._progress[request.sequence.identity].states[0]) for request in requests]
        rows = list(range(len(requests)))
        begun = time.perf_counter()
        for round in range(max(lengths)):
            module = min(round, self._modules - 1)
            if round:
                spans = [self._next_span(row, requests[row], round, tokens[row], drafted[row], states[row]) for row in rows]
                for row, state_ND in zip(rows, self._run(module, spans), strict=True):
                    drafted[row], states[row] = state_ND, state_ND[-1:]
            logits_RV = self.runner.mtp_logits(module, torch.cat([states[row] for row in rows]))
            for row, (token, distribution_V) in zip(
                rows, draft_tokens(logits_RV, [requests[row] for row in rows]), strict=True
            ):
                tokens[row].append(token)
                distributions[row].append(distribution_V)
            rows = [row for row in rows if lengths[row] > round + 1]
        seconds = (time.perf_counter() - begun) / max(lengths)
        self._seconds.setdefault(len(requests).bit_length(), Recent()).add(seconds)
        return [as_draft(made, each) for made, each in zip(tokens, distributions, strict=True)]

    def _next_span(
        self, row: int, request: Request, round: int, draft: list[int], drafted_ND: Tensor, state_1D: Tensor
    ) -> _Span:
        """Where a module is to go for the next draft token, and what it takes there."""
        sequence, progress = request.sequence, self._progress[request.sequence.identity]
        if round < self._modules:
            # up to the model's last position
            module, first = round, progress.ends[round]
            before = progress.before(module)
            hidden_ND = torch.cat((*before, drafted_ND)) if len(drafted_ND) else torch.cat(before)
        else:
            # one position further than before
            module, first, hidden_ND = self._modules - 1, sequence.computed + round - self._modules, state_1D
        # the first position takes this token, or a draft token
        taken = first + 1 + module
        tokens = sequence.tokens[taken:] + draft[max(0, taken - len(sequence.tokens)) :]
        spare = self._spare + row * spare_blocks(self.policy.most, self.runner.memory.block_size)
        return _Span(request, first, hidden_ND, tokens[: len(hidden_ND)], spare)

    def _run(self, module: int, spans: Sequence[_Span]) -> list[Tensor]:
        """States of a module at spans of several requests, each (N, D)."""
        computed = [span for span in spans if span.tokens]
        if not computed:
            return [span.hidden_ND[:0] for span in spans]
        size = self.runner.memory.block_size
        batch = Batch.empty(len(self.runner.memory.groups))
        for span in computed:
            sequence = span.request.sequence
            blocks = -(-(span.first + len(span.tokens)) // size)
            tables = []
            for table in sequence.tables:
                missing = max(0, blocks - len(table))
                tables.append([max(0, number) for number in table] + list(range(span.spare, span.spare + missing)))
            batch.append(span.tokens, span.first, tables, prompt_length=sequence.prompt_length)
        hidden_ND = self.runner.mtp_hidden(module, batch, torch.cat([span.hidden_ND for span in computed]))
        split = iter(hidden_ND.split([len(span.tokens) for span in computed]))
        return [next(split) if span.tokens else span.hidden_ND[:0] for span in spans]
