"""Builds an engine core from settings: KV cache, runner, scheduler, proposer."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.inference.async_core import AsyncEngineCore
from bessemer.inference.config import EngineConfig
from bessemer.inference.engine_core import EngineCore
from bessemer.inference.execution.build import new_runner, page_layout, shared_backend
from bessemer.inference.execution.kv_cache import HeadShare, PagedMemory, layer_groups, state_bytes
from bessemer.inference.execution.kv_memory import (
    check_model_length,
    describe_pages,
    describe_states,
    longest_text,
    memory_budget,
    page_type,
    plan_blocks,
    plan_snapshots,
)
from bessemer.inference.execution.runner import Runner
from bessemer.inference.execution.tensor_parallel.sharded_model import ShardedModel
from bessemer.inference.scheduling.block_pool import BlockPool
from bessemer.inference.scheduling.scheduler import BlockGroup, Scheduler
from bessemer.inference.speculation.build import mtp_layers_of, new_proposer
from bessemer.inference.speculation.decoder import SpeculativeDecoder
from bessemer.inference.speculation.draft_runner import shared_draft_runner
from bessemer.model.decoder import Decoder
from bessemer.tokenization.tokenizer import Tokenizer

#: Most logits of one step that come of tokens read, where each token's are wanted: 256 MiB of float32.
_MOST_LOGITS = 1 << 26


def assemble(
    model: Decoder, tokenizer: Tokenizer, config: EngineConfig, *, opened: bool, sharded: ShardedModel | None = None
) -> tuple[EngineCore, str]:
    """The engine core of a model, and a line about its KV cache: how many blocks, of which type, how much memory.

    opened: whether the model was opened to be served, and is not one in training. sharded: the model's shards, where worker
    processes hold some. Raises ConfigError, and ArtefactError for a draft model that cannot be read.
    """
    check_model_length(model.config, config)
    mtp_layers, _ = mtp_layers_of(config, model.config)
    if sharded is None:
        memory, blocks = new_memory(model, config)
        runner = new_runner(model, memory, config, opened, modules_only=mtp_layers > 0)
    else:
        with sharded.workers.together():
            memory, blocks = new_memory(model, config, sharded.mesh)
        runner = new_runner(model, memory, config, opened, workers=sharded.workers, axis=sharded.axis)
    groups = [
        BlockGroup(BlockPool(count, config.block_size), group.window)
        for count, group in zip(blocks, layer_groups(model.config), strict=True)
    ]
    align = config.block_size if config.batch_invariant else None
    scheduler = Scheduler(
        groups,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_logits_rows=max(_MOST_LOGITS // model.config.vocab_size, align or 1),
        max_waiting=config.max_waiting,
        state_slots=memory.state_slots,
        snapshots=memory.snapshot_count,
        block_size=config.block_size,
        align=align,
        share_generated=not config.batch_invariant,
        share_prefixes=config.prefix_cache,
    )
    proposer = new_proposer(config, tokenizer, runner, sharded)
    kind = AsyncEngineCore if runner.backend.samples else EngineCore
    core = kind(scheduler, runner, None if proposer is None else SpeculativeDecoder(proposer))
    ranks = memory.share.ranks
    described = describe_pages(model.config, blocks, config, memory.dtype, mtp_layers, ranks=ranks)
    described += describe_states(model.config, memory.snapshot_count, model.dtype, ranks=ranks)
    return core, described


def worker_runners(
    model: Decoder, config: EngineConfig, mesh: Mesh, axis: DeviceMesh | None = None
) -> tuple[Runner, Runner | None]:
    """A worker's runner of its shard of a model, and that of its shard of the draft model, where the processes share one.

    axis: as of `Runner`. Made by the same collectives as `assemble` on rank 0.
    """
    memory, _ = new_memory(model, config, mesh)
    runner = Runner(model, memory, shared_backend(model, memory), batch_invariant=config.batch_invariant, axis=axis)
    return runner, shared_draft_runner(config, model.device, mesh)


def new_memory(model: Decoder, config: EngineConfig, mesh: Mesh = ALONE) -> tuple[PagedMemory, list[int]]:
    """A model's KV cache, and how many blocks each group of layers has.

    All processes that share the model call it, and get as many as the one with the least memory. Raises ConfigError.
    """
    dtype, device = page_type(model, config), model.device
    mtp_layers, mtp_spare_blocks = mtp_layers_of(config, model.config)
    share = HeadShare(mesh.place.tensor, mesh.layout.tensor)
    sharing = mesh.processes_here if device.type == "cpu" else 1
    budget = memory_budget(config, device, sharing)
    snapshots = plan_snapshots(model.config, config, model.dtype, budget, ranks=share.ranks)
    budget -= snapshots * state_bytes(model.config, model.dtype, share.ranks)
    blocks = plan_blocks(model.config, config, dtype, budget, mtp_layers, ranks=share.ranks)
    *blocks, snapshots = [-int(count) for count in mesh.largest(-torch.tensor([*blocks, snapshots]))]
    slots = config.max_num_seqs if "linear_attention" in model.config.types else 0
    kept = config.speculation.tokens if config.speculation else 0
    by_head, spare = page_layout(model, config, dtype, mtp_layers)
    memory = PagedMemory(
        model.config,
        blocks,
        config.block_size,
        dtype,
        device,
        state_slots=slots,
        kept_steps=kept,
        mtp_layers=mtp_layers,
        mtp_spare_blocks=mtp_spare_blocks,
        share=share,
        snapshots=snapshots,
        by_head=by_head,
        spare=spare,
        longest=longest_text(model.config, config, blocks),
    )
    return memory, blocks
