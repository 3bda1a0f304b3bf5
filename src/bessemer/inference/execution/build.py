"""Builds a model's runner: chooses its backend, the storage form of its weights and the layout of its pages.

The KV cache gets as many blocks as the memory left by the weights holds, or as the settings say.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from bessemer.core.errors import ConfigError
from bessemer.core.progress import PlainLines
from bessemer.inference.config import EngineConfig
from bessemer.inference.execution.backend import Backend, Linear
from bessemer.inference.execution.compiled_steps import CompiledSteps
from bessemer.inference.execution.cuda_graphs import CudaGraphs, StaticSteps, cannot_be_static
from bessemer.inference.execution.flash_attention import (
    FLASH_BLOCK,
    KernelPagesAttention,
    PageLibrary,
    cannot_read,
    page_kernel,
)
from bessemer.inference.execution.flex_attention import FlexPagesAttention, compiled_page_attention
from bessemer.inference.execution.kv_cache import (
    PAGE_TYPES,
    LayerGroup,
    PagedMemory,
    block_bytes,
    layer_groups,
    name_of_page_type,
    page_shape,
    state_bytes,
)
from bessemer.inference.execution.linear import (
    DequantisedWeights,
    OwnWeights,
    PackedCodes,
    StepsCodes,
    decoded_dtype,
    free_bytes,
    holds_decoded,
    without_kernels,
)
from bessemer.inference.execution.paged_attention import CompiledAttention, GatheredAttention
from bessemer.inference.execution.runner import Runner
from bessemer.inference.execution.tensor_parallel.sharded_model import Workers
from bessemer.model.config import ModelConfig
from bessemer.model.cpu_kernels import library, unavailable
from bessemer.model.decoder import Decoder
from bessemer.model.quantisation.quantised_layers import QuantisedLinear, is_quantised, read_deferred_codes

#: Of the memory that is free, the share that pages get where nothing is said.
_SHARE = 0.25
#: Of a GPU's memory, the share that an engine takes where nothing is said.
_GPU_SHARE = 0.9
#: Most logits of one step that come of tokens read, where each token's are wanted: 256 MiB of float32.
MOST_LOGITS = 1 << 26
#: Of the memory for pages, the share that states of linear attention get at most where nothing is said.
_STATES_SHARE = 0.5
#: Saved states that can be of use, for each answer that runs.
_SNAPSHOTS_EACH = 16
_GIB = 1 << 30


def page_type(model: Decoder, engine: EngineConfig) -> torch.dtype:
    """The type of a model's KV cache. Raises ConfigError for heads that a type does not fit."""
    if engine.kv_cache_dtype != "auto":
        shape = page_shape(model.config)
        if engine.kv_cache_dtype == "int4" and (shape.key_width | shape.value_width) % 2:
            raise ConfigError(
                "kv_cache_dtype: int4: this model's heads have an odd number of channels, of which two share a byte"
            )
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


def memory_budget(
    engine: EngineConfig, device: torch.device, sharing: int = 1, *, share: float | None = None, reserved: int = 0
) -> int:
    """Bytes for the KV cache and for snapshots of states. sharing: processes that share the same free memory.

    share: of a GPU's memory, what all may take together (`gpu_share`); None: a quarter of what is free is the cache's.
    reserved: bytes that a step needs beside it.
    """
    if engine.kv_memory is not None:
        return int(engine.kv_memory * _GIB)
    if share is not None:
        free, total = torch.cuda.mem_get_info(device)
        return int(free - (1 - share) * total) - reserved
    return int(free_bytes(device) * _SHARE) // sharing


def gpu_share(engine: EngineConfig, device: torch.device, opened: bool) -> float | None:
    """The share of a GPU's memory that an engine may take; None on other devices, and where only a part of what is free is for
    the cache: that of a model in training, and beside a draft model, which is opened afterwards."""
    if device.type != "cuda" or engine.gpu_memory_utilization is not None:
        return engine.gpu_memory_utilization if device.type == "cuda" else None
    has_draft = engine.speculation is not None and engine.speculation.method == "draft"
    return _GPU_SHARE if opened and not has_draft else None


def step_bytes(config: ModelConfig, engine: EngineConfig, dtype: torch.dtype) -> int:
    """Memory that a step takes at most, by its largest tensors: what a block keeps of each token, and three copies of the
    logits in float32."""
    widths = 6 * config.hidden_size + 3 * config.intermediate_size + 3 * config.num_attention_heads * config.head_dim
    rows = max(engine.max_num_seqs, MOST_LOGITS // config.vocab_size)
    return engine.max_num_batched_tokens * widths * dtype.itemsize + 3 * 4 * rows * config.vocab_size


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
    # by bisection, the largest number of blocks for every group that fits
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
    """The most blocks of a group that can be used at once."""
    if group.window is None:
        return engine.max_num_seqs * whole
    # the window, the block that it begins in, the one being written, and the tokens of a step
    own = -(-group.window // engine.block_size) + 2
    kept = own + -(-engine.max_num_batched_tokens // engine.block_size)
    return min(engine.max_num_seqs * whole, engine.max_num_seqs * own + 2 * kept)


def describe_states(config: ModelConfig, snapshots: int, dtype: torch.dtype, *, ranks: int = 1) -> str:
    """The end of the line of `describe_pages`: snapshots of linear attention's states. dtype: the model's."""
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
    name = name_of_page_type(dtype)
    each = f" on each of {engine.processes} processes" if engine.processes > 1 else ""
    return f"{' and '.join(parts)}, {total / _GIB:.2f} GiB in {name}{each}, up to {engine.max_num_seqs} sequences at once"


class PageLayout(NamedTuple):
    """Layout of pages: `by_head` to be read in place, with a `spare` one for steps on static tensors."""

    by_head: bool
    spare: bool


#: Channels of a head below which FlexAttention has no kernel on a GPU.
_NARROWEST_HEAD = 16
#: How pages are read.
PagedWay = Literal["gather", "flash", "flashinfer", "flex"]
_LIBRARIES: tuple[PageLibrary, ...] = ("flash", "flashinfer")


def paged_way(config: ModelConfig, engine: EngineConfig, dtype: torch.dtype, device: torch.device) -> PagedWay:
    """How a model's pages of a type are read, by PyTorch's modules, where the settings say `auto` or name a way.

    auto: on a GPU in place, by the first of FlashAttention, FlashInfer and FlexAttention that can. Raises ConfigError where
    they are to be read in a way that cannot be.
    """
    asked = engine.paged_attention
    if asked == "gather" or (asked == "auto" and device.type != "cuda"):
        return "gather"
    for name in _LIBRARIES:
        if asked in ("auto", name):
            reason = cannot_read(name, config, engine.block_size, dtype, device)
            if reason is None:
                return name
            if asked == name:
                raise ConfigError(f"paged_attention: {name}: {reason}; use auto")
    reason = must_gather(config, engine, dtype, device)
    if reason is None:
        return "flex"
    if asked == "flex":
        raise ConfigError(f"paged_attention: flex: {reason}; use auto or gather")
    return "gather"


def page_layout(model: Decoder, config: EngineConfig, dtype: torch.dtype, mtp_layers: int = 0) -> PageLayout:
    """The layout of a model's pages of a type that the settings ask for.

    mtp_layers: MTP modules that have pages too. Raises as `paged_way`.
    """
    way = paged_way(model.config, config, dtype, model.device)
    if way == "gather":
        return PageLayout(False, False)
    graphs = config.cuda_graphs and model.device.type == "cuda" and not config.batch_invariant and not mtp_layers
    return PageLayout(way == "flex", graphs and way != "flashinfer" and cannot_be_static(model) is None)


def paged_memory(
    model: Decoder,
    config: EngineConfig,
    blocks: Sequence[int],
    *,
    mtp_layers: int = 0,
    longest: int | None = None,
    **options: Any,
) -> PagedMemory:
    """A KV cache with `blocks` blocks of each group of layers, of the type and layout of the settings.

    longest: tokens of the longest text; None: what the blocks hold. options: as in `PagedMemory`. Raises as `page_layout`.
    """
    dtype = page_type(model, config)
    by_head, spare = page_layout(model, config, dtype, mtp_layers)
    return PagedMemory(
        model.config,
        blocks,
        config.block_size,
        dtype,
        model.device,
        mtp_layers=mtp_layers,
        by_head=by_head,
        spare=spare,
        longest=longest or longest_text(model.config, config, blocks),
        **options,
    )


def must_gather(config: ModelConfig, engine: EngineConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why FlexAttention cannot read a model's pages of a type in place; None where it can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"FlexAttention reads a KV cache in float32, bfloat16 and float16, not in {name_of_page_type(dtype)}"
    if device.type == "cuda" and (engine.block_size < 16 or engine.block_size & (engine.block_size - 1)):
        return f"on a GPU FlexAttention reads KV blocks of 16, 32, 64, … tokens, not of {engine.block_size}"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "on a GPU FlexAttention needs the package triton"
    shape = page_shape(config)
    if device.type == "cuda" and min(shape.key_width, shape.value_width) < _NARROWEST_HEAD:
        return f"on a GPU FlexAttention has kernels for heads of {_NARROWEST_HEAD} channels and more"
    if device.type == "cpu" and config.attention_sinks:
        return "on a processor FlexAttention keeps no sums, which attention sinks need"
    if device.type == "cpu" and engine.cpu_kernels == "on":
        return "the compiled kernels (cpu_kernels: on) read KV blocks in an order of their own"
    return None if device.type in ("cuda", "cpu") else f"FlexAttention is for cuda and cpu here, not for {device.type}"


#: Most tokens of a step on a GPU where nothing is said: enough for its products to be bound by arithmetic.
_GPU_STEP_TOKENS = 8192


def resolved_for(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> EngineConfig:
    """The settings with what hangs on the device: on a GPU, steps of more tokens, and KV blocks of the size that FlashAttention
    reads where it is installed and can read this model's. What was given stays. dtype: of the KV cache."""
    if device.type != "cuda":
        return config
    changes: dict[str, int] = {}
    if "max_num_batched_tokens" not in config.model_fields_set and not config.batch_invariant:
        changes["max_num_batched_tokens"] = max(_GPU_STEP_TOKENS, config.max_num_batched_tokens)
    is_free = "block_size" not in config.model_fields_set and config.paged_attention in ("auto", "flash")
    if is_free and cannot_read("flash", model, FLASH_BLOCK, dtype, device) is None:
        changes["block_size"] = FLASH_BLOCK
    return config.with_changes(**changes) if changes else config


def new_runner(
    model: Decoder,
    memory: PagedMemory,
    config: EngineConfig,
    opened: bool,
    *,
    modules_only: bool = False,
    workers: Workers | None = None,
    axis: DeviceMesh | None = None,
) -> Runner:
    """The runner of a model over its KV cache, by the backend that `choose_backend` chooses.

    opened: whether this one was opened to be served. modules_only: states inside the model are needed, which steps in one call
    do not give. workers and axis: the processes that share the model, as in `Runner`. Raises ConfigError where kernels are
    asked for and cannot be built.
    """
    if workers is not None:
        backend = shared_backend(model, memory, config)
    else:
        backend = choose_backend(model, memory, config, opened, modules_only)
        backend = replace(backend, samples=samples_on_device(memory, config))
    return Runner(model, memory, backend, batch_invariant=config.batch_invariant, workers=workers, axis=axis)


def samples_on_device(memory: PagedMemory, config: EngineConfig) -> bool:
    """Whether tokens are sampled on the device. By default on a GPU alone: a processor cannot schedule while it computes.

    Never with draft tokens, which are verified on the host, or linear attention, whose states are hashed before the step.
    """
    if config.async_scheduling == "off" or config.speculation is not None or memory.state_slots:
        return False
    return config.async_scheduling == "on" or (memory.device.type == "cuda" and not config.batch_invariant)


def shared_backend(model: Decoder, memory: PagedMemory, config: EngineConfig) -> Backend:
    """The backend of each of several processes that share a model."""
    return Backend(OwnWeights(), _attention_in_place(model, memory, config) or GatheredAttention(memory, model.dtype))


def _attention_in_place(
    model: Decoder, memory: PagedMemory, config: EngineConfig
) -> FlexPagesAttention | KernelPagesAttention | None:
    """What reads a model's pages in place; None where they are gathered, on a GPU with a line that says why."""
    way = paged_way(model.config, config, memory.dtype, memory.device)
    if way == "flex":
        return FlexPagesAttention(memory, compiled_page_attention(), model.dtype)
    if way != "gather":
        return KernelPagesAttention(memory, page_kernel(way, memory), model.dtype)
    if memory.device.type == "cuda" and config.paged_attention == "auto" and memory.groups:
        reason = must_gather(model.config, config, memory.dtype, memory.device)
        PlainLines().say(f"  slow: keys and values are gathered before every layer's attention: {reason}")
    return None


def choose_backend(
    model: Decoder, memory: PagedMemory, config: EngineConfig, opened: bool, modules_only: bool = False
) -> Backend:
    """The first that can compute a model's steps, of:

    - pages read in place (`paged_way`), on a GPU or where the settings ask for it, with decode steps on static tensors;
    - whole steps by the compiled CPU kernels, for plain decoders;
    - the model's modules, with compiled attention and packed codes where there are kernels; where there are none, or PyTorch
      is faster, quantised weights are dequantised once.

    The kernels pack the weights, which takes time and memory: they are for models that are opened to be served. So are copies
    of weights that are dequantised. A line says where memory holds none and every product dequantises a matrix. Arguments and
    errors as those of `new_runner`.
    """
    attention = _attention_in_place(model, memory, config)
    if attention is not None:
        read_deferred_codes(model)
        of_codes, static = without_kernels(model, opened), None
        if memory.has_spare:
            static = StaticSteps(model, memory, config.max_num_seqs, attention, CudaGraphs(), of_codes)
        return Backend(of_codes, attention, static)
    wanted = config.cpu_kernels == "on" or (config.cpu_kernels == "auto" and opened and model.device.type == "cpu")
    decoded = decoded_dtype(model) if wanted and config.cpu_kernels == "auto" else None
    packs = wanted and decoded is None and library() is not None and holds_decoded(model)
    if not packs:
        read_deferred_codes(model)
    if packs and not modules_only and CompiledSteps.supports(model) is None:
        steps = CompiledSteps(model, memory, config.threads, activation_bits=config.activation_bits, release=opened)
        return Backend(
            StepsCodes(steps), CompiledAttention(memory, torch.get_num_threads(), model.dtype), steps, generator=steps
        )
    if config.cpu_kernels == "on" and library() is None:
        raise ConfigError(f"cpu_kernels: on: {unavailable()}")
    threads = config.threads or torch.get_num_threads()
    linear: Linear = OwnWeights()
    if decoded is not None:
        linear = DequantisedWeights(model, decoded)
    elif not packs:
        linear = without_kernels(model, opened)
    elif model.device.type == "cpu" and is_quantised(model):
        linear = PackedCodes(model, threads, activation_bits=config.activation_bits, release=opened)
    if wanted and CompiledAttention.supports(model):
        return Backend(linear, CompiledAttention(memory, threads, model.dtype))
    return Backend(linear, GatheredAttention(memory, model.dtype))
