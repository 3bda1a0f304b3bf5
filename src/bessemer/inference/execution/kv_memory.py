"""KV-cache memory: how many blocks an engine gets."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bessemer.core.environment import free_memory_bytes, memory_bytes
from bessemer.core.errors import ConfigError
from bessemer.inference.config import EngineConfig
from bessemer.inference.execution.kv_cache import PAGE_TYPES, LayerGroup, block_bytes, layer_groups, state_bytes
from bessemer.model.config import ModelConfig
from bessemer.model.decoder import Decoder
from bessemer.model.quantised_linear import QuantisedLinear

#: Of the memory that is free, the share that pages get where nothing is said.
_SHARE = 0.25
#: Of the memory for pages, the share that states of linear attention get at most where nothing is said.
_STATES_SHARE = 0.5
#: Saved states that can be of use, for each answer that runs.
_SNAPSHOTS_EACH = 16
_GIB = 1 << 30


def page_type(model: Decoder, engine: EngineConfig) -> torch.dtype:
    """The type of a model's KV cache."""
    if engine.kv_cache_dtype != "auto":
        return PAGE_TYPES[engine.kv_cache_dtype]
    return torch.float16 if any(isinstance(module, QuantisedLinear) for module in model.modules()) else model.dtype


def model_length(config: ModelConfig, engine: EngineConfig) -> int:
    """The most tokens of a text: `max_model_len`, or the model's context where nothing is said."""
    return min(config.max_position_embeddings, engine.max_model_len or config.max_position_embeddings)


def longest_text(config: ModelConfig, engine: EngineConfig, blocks: Sequence[int]) -> int:
    """The most tokens of a text that `blocks` blocks of each group of layers hold, at most `model_length`."""
    groups = layer_groups(config)
    whole = [count * engine.block_size for count, group in zip(blocks, groups, strict=True) if group.window is None]
    return min([model_length(config, engine), *whole])


def check_model_length(config: ModelConfig, engine: EngineConfig) -> None:
    """Raise ConfigError where max_model_len is above the model's context."""
    if engine.max_model_len is not None and engine.max_model_len > config.max_position_embeddings:
        raise ConfigError(
            f"max_model_len: {engine.max_model_len:,} tokens are more than the model's context of "
            f"{config.max_position_embeddings:,} (max_position_embeddings); lower it"
        )


def memory_budget(engine: EngineConfig, device: torch.device, sharing: int = 1) -> int:
    """Bytes for the KV cache and for snapshots of states. sharing: processes that share the same free memory."""
    return int(free_bytes(device) * _SHARE) // sharing if engine.kv_memory is None else int(engine.kv_memory * _GIB)


def plan_snapshots(config: ModelConfig, engine: EngineConfig, dtype: torch.dtype, budget: int, *, ranks: int = 1) -> int:
    """How many snapshots of linear attention's states there are; 0 in models without, and without a prefix cache.

    dtype: the model's, not its pages'. budget: `memory_budget`. ranks: processes that share the heads.
    """
    each = state_bytes(config, dtype, ranks)
    if not each or not engine.prefix_cache:
        return 0
    given = budget * _STATES_SHARE if engine.state_memory is None else engine.state_memory * _GIB
    return min(int(given / each), _SNAPSHOTS_EACH * engine.max_num_seqs)


def plan_blocks(
    config: ModelConfig, engine: EngineConfig, dtype: torch.dtype, budget: int, mtp_layers: int = 0, *, ranks: int = 1
) -> list[int]:
    """Blocks of each group of layers in `budget` bytes. Layers with a window get no more than their windows can use.

    mtp_layers: MTP modules that have pages too. ranks: processes that share the heads.

    Raises ConfigError when the memory does not hold the blocks of one short text.
    """
    groups = layer_groups(config, mtp_layers)
    whole = -(-model_length(config, engine) // engine.block_size)
    most = [_most(group, whole, engine) for group in groups]
    sizes = [block_bytes(config, group, engine.block_size, dtype, ranks) for group in groups]
    # the same share of what every group can use, by bisection
    low, high = 0, engine.max_num_seqs * whole
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(middle, top) * size for top, size in zip(most, sizes, strict=True)) <= budget:
            low = middle
        else:
            high = middle - 1
    blocks = [min(low, top) for top in most]
    if blocks and min(blocks) < 2:
        need = 2 * sum(sizes)
        raise ConfigError(
            f"kv_memory: {max(0, budget) / _GIB:.3g} GiB hold fewer than two KV blocks of this model ({need / _GIB:.3g} GiB); "
            "give more memory, or a smaller block_size"
        )
    return blocks


def _most(group: LayerGroup, whole: int, engine: EngineConfig) -> int:
    """Blocks of a group that can be of use at once."""
    if group.window is None:
        return engine.max_num_seqs * whole
    # the window, the block that it begins in, the one being written, and the tokens of a step
    own = -(-group.window // engine.block_size) + 2
    kept = own + -(-engine.max_num_batched_tokens // engine.block_size)
    return min(engine.max_num_seqs * whole, engine.max_num_seqs * own + 2 * kept)


def free_bytes(device: torch.device) -> int:
    """Free memory, as far as the system reports it; else half of what there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = free_memory_bytes()
    return (memory_bytes() or 4 * _GIB) // 2 if free is None else free


def describe_states(config: ModelConfig, snapshots: int, dtype: torch.dtype, *, ranks: int = 1) -> str:
    """What follows `describe_pages` in models with linear attention: the snapshots of states. dtype: the model's."""
    each = state_bytes(config, dtype, ranks)
    if not each:
        return ""
    return (
        f"; {snapshots:,} saved states of linear attention, {snapshots * each / _GIB:.2f} GiB, for prompts that share a prefix"
    )


def describe_pages(
    config: ModelConfig, blocks: Sequence[int], engine: EngineConfig, dtype: torch.dtype, mtp_layers: int = 0, *, ranks: int = 1
) -> str:
    """One line for the user: the size of the KV cache. ranks: processes that share the heads."""
    groups = layer_groups(config, mtp_layers)
    if not groups:
        return "no KV blocks: every layer keeps a state of fixed size"
    total = sum(
        count * block_bytes(config, group, engine.block_size, dtype, ranks) for count, group in zip(blocks, groups, strict=True)
    )
    parts = []
    for count, group in zip(blocks, groups, strict=True):
        what = "" if group.window is None else f" in layers that see {group.window:,} tokens"
        parts.append(f"{count:,} KV blocks of {engine.block_size} tokens{what}")
    name = str(dtype).removeprefix("torch.")
    each = f" on each of {engine.processes} processes" if engine.processes > 1 else ""
    return f"{' and '.join(parts)}, {total / _GIB:.2f} GiB in {name}{each}, up to {engine.max_num_seqs} sequences at once"
