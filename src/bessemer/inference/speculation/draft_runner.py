"""The draft model's KV cache; and its runner where the processes that share a model share its draft model too.

A draft model is sharded as its target is, so that each process holds and reads a part of it. One that the axes do not divide,
and one in codes, is computed by rank 0 alone while the others wait.
"""

from __future__ import annotations

from pathlib import Path

import torch

from bessemer.core.errors import ConfigError
from bessemer.core.store import read_json
from bessemer.distributed.mesh import ALONE, Mesh
from bessemer.inference.config import EngineConfig
from bessemer.inference.execution.build import page_layout, shared_backend
from bessemer.inference.execution.kv_cache import HeadShare, PagedMemory, layer_groups
from bessemer.inference.execution.kv_memory import longest_text, memory_budget, page_type, plan_blocks
from bessemer.inference.execution.runner import Runner
from bessemer.inference.execution.tensor_parallel.commands import DraftWorkers, Workers
from bessemer.inference.execution.tensor_parallel.sharded_model import layout_of, shard_model
from bessemer.model.decoder import Decoder
from bessemer.model.folder import load_model
from bessemer.model.folder_config import CONFIG, read_model_config
from bessemer.model.quantisation.settings import read_settings


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
    dtype, device = page_type(model, config), model.device
    share = HeadShare(mesh.place.tensor, mesh.layout.tensor)
    budget = memory_budget(config, device, mesh.processes_here if device.type == "cpu" else 1)
    blocks = min(plan_blocks(model.config, config, dtype, budget, ranks=share.ranks))
    blocks = -int(mesh.largest(torch.tensor(-blocks)))
    counts = [blocks] * len(layer_groups(model.config))
    by_head, spare = page_layout(model, config, dtype)
    memory = PagedMemory(
        model.config,
        counts,
        config.block_size,
        dtype,
        device,
        share=share,
        by_head=by_head,
        spare=spare,
        longest=longest_text(model.config, config, counts),
    )
    return memory, blocks


def share_draft(
    model: Decoder, config: EngineConfig, device: torch.device, mesh: Mesh, workers: Workers | None = None
) -> tuple[Runner, int]:
    """The runner of this rank's shard of a draft model, and the blocks of its KV cache. All processes of the mesh call it.

    model: whole; it becomes the shard. workers: on rank 0.
    """
    shard_model(model, mesh, device)
    memory, blocks = draft_memory(model, config, mesh)
    return Runner(model, memory, shared_backend(model, memory), workers=workers and DraftWorkers(workers)), blocks


def shared_draft_runner(config: EngineConfig, device: torch.device, mesh: Mesh) -> Runner | None:
    """A worker's runner of its shard of the draft model; None where rank 0 computes it alone, or there is none."""
    if not is_draft_shared(config):
        return None
    assert config.speculation is not None and config.speculation.model is not None
    runner, _ = share_draft(load_model(Path(config.speculation.model)), config, device, mesh)
    return runner
