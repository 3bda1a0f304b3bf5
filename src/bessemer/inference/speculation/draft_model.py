"""Draft-model proposer: draft tokens of a smaller model (Leviathan et al. 2023, Chen et al. 2023).

It has a KV cache of its own. Before it drafts for a request it reads what it has not read of it, in chunks where that is a
whole prompt; then it makes the drafts of all requests together, token by token. Keys of rejected draft tokens are written over.

A draft model is sharded as its target is, so that each process holds and reads a part of it. One that the axes do not divide,
and one in codes, is computed by rank 0 alone while the others wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from bessemer.core.errors import ConfigError
from bessemer.core.store import read_json
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.inference.config import EngineConfig
from bessemer.inference.execution.batch import Batch
from bessemer.inference.execution.build import memory_budget, page_type, paged_memory, plan_blocks, shared_backend
from bessemer.inference.execution.kv_cache import HeadShare, PagedMemory, layer_groups
from bessemer.inference.execution.runner import Runner
from bessemer.inference.execution.tensor_parallel.sharded_model import Workers, layout_of, shard_model
from bessemer.inference.request import Request, ScheduledRequest
from bessemer.inference.sampling.sampler import likeliest
from bessemer.inference.scheduling.block_tables import BlockPool
from bessemer.inference.speculation.proposer import AcceptanceTracker, Draft, DraftLengthPolicy, Proposer, Recent
from bessemer.inference.speculation.verification import propose
from bessemer.model.attention.base import is_recurrent
from bessemer.model.decoder import Decoder
from bessemer.model.quantisation.storage import read_settings
from bessemer.model.storage.folder import load_model
from bessemer.model.storage.model_config import CONFIG, read_model_config
from bessemer.tokenization.tokenizer import Tokenizer, load_tokenizer


def is_draft_shared(config: EngineConfig) -> bool:
    """Whether the processes that share a model share the draft model of the settings: the same answer on all of them."""
    if config.processes == 1 or config.speculation is None or config.speculation.model is None:
        return False
    assert config.parallel is not None
    folder = Path(config.speculation.model)
    if not folder.is_dir() or read_settings(read_json(folder / CONFIG), folder / CONFIG):
        return False
    try:
        layout_of(config.parallel).check(read_model_config(folder), None)
    except ConfigError:
        return False
    return True


def draft_memory(model: Decoder, config: EngineConfig, mesh: Mesh = ALONE) -> tuple[PagedMemory, int]:
    """A draft model's KV cache, and its blocks: nothing is shared and no window is followed, so one pool serves all groups.

    All processes of the mesh call it, and get as many as the one with the least memory. Raises ConfigError.
    """
    share = HeadShare(mesh.place.tensor, mesh.layout.tensor)
    budget = memory_budget(config, model.device, mesh.processes_here if model.device.type == "cpu" else 1)
    blocks = min(plan_blocks(model.config, config, page_type(model, config), budget, ranks=share.ranks))
    blocks = -int(mesh.largest(torch.tensor(-blocks)))
    counts = [blocks] * len(layer_groups(model.config))
    return paged_memory(model, config, counts, share=share), blocks


def share_draft(
    model: Decoder, config: EngineConfig, device: torch.device, mesh: Mesh, workers: Workers | None = None
) -> tuple[Runner, int]:
    """The runner of this rank's shard of a draft model, and the blocks of its KV cache. All processes of the mesh call it.

    model: whole; it becomes the shard. workers: on rank 0.
    """
    shard_model(model, mesh, device)
    memory, blocks = draft_memory(model, config, mesh)
    return Runner(model, memory, shared_backend(model, memory, config), workers=workers, is_draft=True), blocks


def shared_draft_runner(config: EngineConfig, device: torch.device, mesh: Mesh) -> Runner | None:
    """A worker's runner of its shard of the draft model; None where rank 0 computes it alone, or there is none."""
    if not is_draft_shared(config):
        return None
    assert config.speculation is not None and config.speculation.model is not None
    runner, _ = share_draft(load_model(Path(config.speculation.model)), config, device, mesh)
    return runner


# Shapes: R rows, V vocabulary.

#: Most new tokens of a request whose reading takes about as long as drafting one token.
_FEW = 4


def open_draft_model(folder: str, model: Decoder, tokenizer: Tokenizer, device: torch.device) -> Decoder:
    """The draft model of another, on a device.

    Raises ConfigError where the two have not the same tokenizer, or the draft model keeps states, ArtefactError where the
    folder is damaged.
    """
    if load_tokenizer(Path(folder)).hash != tokenizer.hash:
        raise ConfigError(
            f"speculation.model: {folder} has another tokenizer than the model that it drafts for; name a model that was "
            "trained with the same one"
        )
    draft = load_model(Path(folder), device)
    if draft.config.vocab_size != model.config.vocab_size:
        raise ConfigError(
            f"speculation.model: {folder} scores {draft.config.vocab_size:,} tokens, and the model that it drafts for "
            f"{model.config.vocab_size:,}; name one with the same vocabulary"
        )
    if is_recurrent(draft.config):
        raise ConfigError(
            f"speculation.model: {folder} has linear attention, whose states cannot be taken back; name a model without"
        )
    return draft


@dataclass
class _ReadProgress:
    """How far a request was read. computed: tokens whose keys are right. table: their blocks, the same in every group of
    layers. The draft's tokens were computed behind `length` tokens of the request's sequence."""

    computed: int = 0
    length: int = 0
    draft: list[int] = field(default_factory=list)
    table: list[int] = field(default_factory=list)


class ModelProposer(Proposer):
    """A `Proposer` whose draft tokens a model makes, for all requests together, token by token.

    Requests with a seed get the model's likeliest tokens as drafts: a draft is then not sampled, and the text of a seed does
    not depend on the draft length. The others get tokens sampled from the model's distribution.
    """

    def __init__(self, policy: DraftLengthPolicy) -> None:
        self.policy = policy
        self.acceptance = AcceptanceTracker(policy.most, policy.adapt)
        #: Seconds in which every request of a step gets one draft token. The key is the bit length of the number of requests.
        self._seconds: dict[int, Recent] = {}

    def propose(self, requests: Sequence[Request]) -> list[Draft]:
        """Drafts of the requests for which it pays, and that the model is ready for."""
        seconds = self._seconds.get(len(requests).bit_length())
        chances = [self._chances(request) for request in requests]
        lengths = self.policy.lengths(chances, seconds.value if seconds else 0.0, self.crowded)
        chosen = self._ready(requests, lengths)
        drafts = [Draft()] * len(requests)
        if chosen:
            made = self._draft([requests[index] for index in chosen], [lengths[index] for index in chosen])
            for index, draft in zip(chosen, made, strict=True):
                drafts[index] = draft
        return drafts

    def learn(self, request: Request, proposed: int, accepted: int) -> None:
        self.acceptance.learn(request, proposed, accepted)

    def measured(self, requests: int, drafts: int, seconds: float) -> None:
        self.policy.measured(requests, drafts, seconds)

    def forget(self, request: ScheduledRequest) -> None:
        self.acceptance.forget(request)

    def _chances(self, request: Request) -> list[float]:
        """Of each draft token that may be made for a request, how likely it is accepted."""
        return self.acceptance.chances(request)

    def _ready(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[int]:
        """Indices of the requests that are drafted for: those with a length above 0 that the model is ready for."""
        return [index for index, length in enumerate(lengths) if length]

    def _draft(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        """Drafts of these lengths."""
        raise NotImplementedError

    def _time(self, requests: int, seconds: float) -> None:
        """Note the time of a draft token for each of some requests."""
        self._seconds.setdefault(requests.bit_length(), Recent()).add(seconds)


def draft_together(
    requests: Sequence[Request],
    lengths: Sequence[int],
    tokens: Sequence[list[int]],
    logits_of: Callable[[int, list[int]], Tensor],
) -> list[Draft]:
    """Drafts of these lengths, of all requests together: the first token of each, the second of those that want one, …

    tokens: a list for each request, which its draft tokens are appended to. logits_of(round, rows): logits (R, V) for the draft
    token `round`, counted from 0, of some of the requests.
    """
    distributions: list[list[Tensor | None]] = [[] for _ in requests]
    for round in range(max(lengths)):
        rows = [row for row, length in enumerate(lengths) if length > round]
        of_rows = draft_tokens(logits_of(round, rows), [requests[row] for row in rows])
        for row, (token, distribution_V) in zip(rows, of_rows, strict=True):
            tokens[row].append(token)
            distributions[row].append(distribution_V)
    return [as_draft(made, each) for made, each in zip(tokens, distributions, strict=True)]


class DraftModelProposer(ModelProposer):
    """A `ModelProposer` with a model of its own, its runner and its KV cache."""

    def __init__(
        self,
        model: Decoder,
        runner: Runner,
        pool: BlockPool,
        groups: int,
        policy: DraftLengthPolicy,
        max_num_batched_tokens: int,
    ) -> None:
        """pool: the blocks of each of `groups` groups of layers. max_num_batched_tokens: most tokens read before a step."""
        super().__init__(policy)
        self.model = model
        self.runner = runner
        self.pool = pool
        self._groups = groups
        self._max_num_batched_tokens = max_num_batched_tokens
        self._readings: dict[int, _ReadProgress] = {}
        #: Of each request that has been read, the logits of its first draft token, (1, V), by identity.
        self._firsts: dict[int, Tensor] = {}

    def forget(self, request: ScheduledRequest) -> None:
        super().forget(request)
        reading = self._readings.pop(request.sequence.identity, None)
        if reading is not None:
            self._release(reading)

    def _ready(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[int]:
        """Of those with a length above 0, the ones that have blocks and have been read."""
        wanted = [index for index, length in enumerate(lengths) if length and self._has_blocks(requests[index], length)]
        self._firsts = self._read([requests[index] for index in wanted])
        return [index for index in wanted if requests[index].sequence.identity in self._firsts]

    # -- blocks

    def _chances(self, request: Request) -> list[float]:
        # the last draft token is not computed, and all others must have a position
        remaining = self.model.config.max_position_embeddings - len(request.sequence.tokens) + 1
        return self.acceptance.chances(request)[: max(0, remaining)]

    def _has_blocks(self, request: Request, length: int) -> bool:
        """Take blocks for the request and its draft. Where too few are free, it gets no draft and gives back its blocks."""
        reading = self._readings.setdefault(request.sequence.identity, _ReadProgress())
        blocks = -(-(len(request.sequence.tokens) + length - 1) // self.pool.block_size)
        if blocks - len(reading.table) > self.pool.free:
            self._release(reading)
            self._readings[request.sequence.identity] = _ReadProgress()
            return False
        while len(reading.table) < blocks:
            reading.table.append(self.pool.allocate())
        return True

    def _release(self, reading: _ReadProgress) -> None:
        for block in reversed(reading.table):
            self.pool.release(block)

    # -- computing

    def _read(self, requests: Sequence[Request]) -> dict[int, Tensor]:
        """Read the new tokens of each request. Logits (1, V) of those that are read to their end, by identity."""
        budget, chunks = self._max_num_batched_tokens, []
        # the shortest first
        for request in sorted(requests, key=self._unread):
            reading, tokens = self._readings[request.sequence.identity], request.sequence.tokens
            came = 0
            for proposed, made in zip(reading.draft, tokens[reading.length :], strict=False):
                if proposed != made:
                    break
                came += 1
            reading.computed += came
            reading.draft = []
            count = min(len(tokens) - reading.computed, budget)
            if count:
                chunks.append((request, tokens[reading.computed : reading.computed + count]))
                budget -= count
        logits_RV = self._forward(chunks)
        ended: dict[int, Tensor] = {}
        for row, (request, _) in enumerate(chunks):
            reading = self._readings[request.sequence.identity]
            reading.length = len(request.sequence.tokens)
            if reading.computed == reading.length:
                ended[request.sequence.identity] = logits_RV[row : row + 1]
        return ended

    def _unread(self, request: Request) -> int:
        return len(request.sequence.tokens) - self._readings[request.sequence.identity].computed

    def _draft(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        tokens: list[list[int]] = [[] for _ in requests]

        def logits_of(round: int, rows: list[int]) -> Tensor:
            if not round:
                return torch.cat([self._firsts[request.sequence.identity] for request in requests])
            return self._forward([(requests[row], tokens[row][-1:]) for row in rows])

        drafts = draft_together(requests, lengths, tokens, logits_of)
        for request, made in zip(requests, tokens, strict=True):
            reading = self._readings[request.sequence.identity]
            reading.computed = reading.length
            reading.draft = made[:-1]
        return drafts

    def _forward(self, chunks: Sequence[tuple[Request, list[int]]]) -> Tensor:
        """Compute the next tokens of each request; the logits after the last of each, (R, V)."""
        if not chunks:
            return torch.empty(0, self.model.config.vocab_size)
        readings = [self._readings[request.sequence.identity] for request, _ in chunks]
        batch = Batch.empty(self._groups)
        for reading, (request, tokens) in zip(readings, chunks, strict=True):
            batch.append_tokens(
                tokens,
                reading.computed,
                [reading.table] * self._groups,
                wanted=[len(tokens) - 1],
                prompt_length=request.sequence.prompt_length,
            )
            reading.computed += len(tokens)
        begun = time.perf_counter()
        logits_RV = self.runner.forward(batch)
        if len(batch.tokens) <= _FEW * len(chunks):
            self._time(len(chunks), time.perf_counter() - begun)
        return logits_RV


def draft_tokens(logits_RV: Tensor, requests: Sequence[Request]) -> list[tuple[int, Tensor | None]]:
    """A draft token for each request and the distribution it was sampled from, (V,): none at temperature 0 and with a seed."""
    drafted: list[tuple[int, Tensor | None]] = [(0, None)] * len(requests)
    drawn = [row for row, request in enumerate(requests) if not request.sampling.greedy and request.params.seed is None]
    greedy = [row for row in range(len(requests)) if row not in set(drawn)]
    if greedy:
        # where logits are not finite, any draft token will do: it is verified
        for row, token in zip(greedy, likeliest(logits_RV[greedy]), strict=True):
            drafted[row] = (max(token, 0), None)
    if drawn:
        tokens, distributions = propose(logits_RV[drawn], [requests[row].sampling for row in drawn])
        for row, token, distribution_V in zip(drawn, tokens, distributions, strict=True):
            drafted[row] = (token, distribution_V)
    return drafted


def as_draft(tokens: list[int], distributions: Sequence[Tensor | None]) -> Draft:
    """Tokens with the distributions that they were sampled from, up to the first that could not be sampled."""
    if all(distribution_V is None for distribution_V in distributions):
        return Draft(tokens)
    known = list(takewhile(lambda distribution_V: distribution_V is not None, distributions))
    return Draft(tokens[: len(known)], torch.stack(cast(list[Tensor], known))) if known else Draft()
