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
from bessemer.inference.speculation.draft_model import ModelProposer, draft_together
from bessemer.inference.speculation.proposer import Draft, DraftLengthPolicy
from bessemer.model.attention.base import variant_of
from bessemer.model.config import ModelConfig

# Shapes: N positions, D hidden, V vocabulary.


def mtp_modules(config: ModelConfig) -> int:
    """The number of MTP modules of a model that can draft. Raises ConfigError where it has none, or they keep states."""
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


class _ModuleSpan(NamedTuple):
    """Positions of one request from `first` on: the states there of the model or of a module, and the tokens that the next
    module takes. spare: the first of the KV blocks behind the request's own."""

    request: ScheduledRequest
    first: int
    hidden_ND: Tensor
    tokens: list[int]
    spare: int = 0


class _ModuleProgress:
    """How far the modules follow the model in one request.

    ends: of each module, the first position that it has not computed: that of the module before it, or one less. states: of
    each module, its hidden state at its last position, (1, D).
    """

    def __init__(self, start: int, modules: int) -> None:
        self.ends = [start] * modules
        self.states: list[Tensor | None] = [None] * modules

    def before(self, module: int) -> list[Tensor]:
        """The state of the module before at the position that a module is behind it; nothing where it is not behind."""
        state_1D = self.states[module - 1]
        if self.ends[module] == self.ends[module - 1]:
            return []
        assert state_1D is not None
        return [state_1D]


class MtpProposer(ModelProposer):
    """A `ModelProposer` with the MTP modules of the model that verifies the drafts.

    It drafts for requests whose pre-norm hidden states were computed since they began.
    """

    def __init__(self, runner: Runner, policy: DraftLengthPolicy, max_num_seqs: int) -> None:
        """max_num_seqs: most requests that are drafted for at once; each has `spare_blocks` behind the model's KV blocks."""
        super().__init__(policy)
        self.runner = runner
        config, memory = runner.model.config, runner.memory
        self._modules = mtp_modules(config)
        pages = memory.layers[config.num_hidden_layers].keys
        self._spare = len(pages) - max_num_seqs * spare_blocks(policy.most, memory.block_size)
        self._progress: dict[int, _ModuleProgress] = {}
        runner.keeps_pre_norm = True

    def forget(self, request: ScheduledRequest) -> None:
        super().forget(request)
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
                progress = self._progress[sequence.identity] = _ModuleProgress(chunk.start, self._modules)
            first = max(chunk.start, self._oldest(request))
            # states of rejected draft tokens are void
            hidden_ND = self.runner.pre_norm_ND[rows][first - chunk.start : sequence.computed - chunk.start]
            followed.append(_ModuleSpan(request, first, hidden_ND, []))
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

    def _follow(self, module: int, spans: Sequence[_ModuleSpan]) -> list[_ModuleSpan]:
        """Let a module follow the one before it over these spans. Returns the spans for the next module."""
        known = []
        for span in spans:
            sequence = span.request.sequence
            end = max(span.first, min(sequence.computed, len(sequence.tokens) - 1 - module))
            tokens = sequence.tokens[span.first + 1 + module : end + 1 + module]
            known.append(_ModuleSpan(span.request, span.first, span.hidden_ND[: end - span.first], tokens))
        followed = []
        for span, state_ND in zip(known, self._run(module, known), strict=True):
            progress, first = self._progress[span.request.sequence.identity], span.first
            made_ND = state_ND
            if module + 1 < self._modules and self._oldest(span.request) < first == progress.ends[module]:
                before = progress.before(module + 1)
                first, made_ND = first - len(before), torch.cat((*before, state_ND))
            progress.ends[module] = span.first + len(span.tokens)
            if span.tokens:
                progress.states[module] = state_ND[-1:].clone()
            followed.append(_ModuleSpan(span.request, first, made_ND, []))
        return followed

    def _draft(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        tokens: list[list[int]] = [[] for _ in requests]
        # the last module's states at positions of draft tokens, and at the last position
        drafted = [torch.empty(0)] * len(requests)
        states = [cast(Tensor, self._progress[request.sequence.identity].states[0]) for request in requests]

        def logits_of(round: int, rows: list[int]) -> Tensor:
            module = min(round, self._modules - 1)
            if round:
                spans = [self._next_span(row, requests[row], round, tokens[row], drafted[row], states[row]) for row in rows]
                for row, state_ND in zip(rows, self._run(module, spans), strict=True):
                    drafted[row], states[row] = state_ND, state_ND[-1:]
            return self.runner.mtp_logits(module, torch.cat([states[row] for row in rows]))

        started = time.perf_counter()
        drafts = draft_together(requests, lengths, tokens, logits_of)
        self._time(len(requests), (time.perf_counter() - started) / max(lengths))
        return drafts

    def _next_span(
        self, row: int, request: Request, round: int, draft: list[int], drafted_ND: Tensor, state_1D: Tensor
    ) -> _ModuleSpan:
        """The positions and inputs of a module for the next draft token."""
        sequence, progress = request.sequence, self._progress[request.sequence.identity]
        if round < self._modules:
            # the module goes up to the model's last position
            module, first = round, progress.ends[round]
            before = progress.before(module)
            hidden_ND = torch.cat((*before, drafted_ND)) if len(drafted_ND) else torch.cat(before)
        else:
            # the last module goes one position further than before
            module, first, hidden_ND = self._modules - 1, sequence.computed + round - self._modules, state_1D
        # index of the token, known or drafted, that the first position takes
        taken = first + 1 + module
        tokens = sequence.tokens[taken:] + draft[max(0, taken - len(sequence.tokens)) :]
        spare = self._spare + row * spare_blocks(self.policy.most, self.runner.memory.block_size)
        return _ModuleSpan(request, first, hidden_ND, tokens[: len(hidden_ND)], spare)

    def _run(self, module: int, spans: Sequence[_ModuleSpan]) -> list[Tensor]:
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
            batch.append_tokens(span.tokens, span.first, tables, prompt_length=sequence.prompt_length)
        hidden_ND = self.runner.mtp_hidden(module, batch, torch.cat([span.hidden_ND for span in computed]))
        split = iter(hidden_ND.split([len(span.tokens) for span in computed]))
        return [next(split) if span.tokens else span.hidden_ND[:0] for span in spans]
