"""Builds a model's executor: the compiled CPU kernels where they can, else the model's own modules; and the layout of pages."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bessemer.core.environment import free_memory_bytes
from bessemer.core.errors import ConfigError
from bessemer.inference.config import EngineConfig
from bessemer.inference.execution.batch import Executor
from bessemer.inference.execution.cuda_graphs import CudaGraphs, StaticSteps, cannot_be_static
from bessemer.inference.execution.flex_attention import compiled_page_attention
from bessemer.inference.execution.kernel_executor import AdaptingExecutor, KernelExecutor
from bessemer.inference.execution.kv_cache import PagedMemory
from bessemer.inference.execution.module_executor import ModuleExecutor
from bessemer.model.cpu_kernels.build import library, unavailable
from bessemer.model.cpu_kernels.choice import faster_dtype
from bessemer.model.decoded_products import decoded_bytes
from bessemer.model.decoder import Decoder
from bessemer.model.quantised_linear import is_quantised

# Shapes: R wanted rows, V vocabulary.

#: Share of the free memory that dequantised weights may take.
_SHARE_FOR_WEIGHTS = 0.5


class PageLayout(NamedTuple):
    """Layout of pages: `by_head` to be read in place, with a `spare` one for steps on static tensors."""

    by_head: bool
    spare: bool


def page_layout(model: Decoder, config: EngineConfig, dtype: torch.dtype, mtp_layers: int = 0) -> PageLayout:
    """The layout of a model's pages of a type that the settings ask for.

    mtp_layers: MTP modules that have pages too. Raises ConfigError where pages are to be read in place and cannot be.
    """
    if config.paged_attention != "flex":
        return PageLayout(False, False)
    if reason := must_gather(model, config, dtype):
        raise ConfigError(f"paged_attention: flex: {reason}; use auto or gather")
    graphs = config.cuda_graphs and model.device.type == "cuda" and not config.batch_invariant and not mtp_layers
    return PageLayout(True, graphs and cannot_be_static(model) is None)


def must_gather(model: Decoder, config: EngineConfig, dtype: torch.dtype) -> str | None:
    """Why FlexAttention cannot read a model's pages of a type in place; None where it can."""
    device = model.device.type
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"FlexAttention reads a KV cache in float32, bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    if device == "cuda" and (config.block_size < 16 or config.block_size & (config.block_size - 1)):
        return f"on a GPU FlexAttention reads KV blocks of 16, 32, 64, … tokens, not of {config.block_size}"
    if device == "cpu" and model.config.attention_sinks:
        return "on a processor FlexAttention keeps no sums, which attention sinks need"
    if device == "cpu" and config.cpu_kernels == "on":
        return "the compiled kernels (cpu_kernels: on) read KV blocks in an order of their own"
    return None if device in ("cuda", "cpu") else f"FlexAttention is for cuda and cpu here, not for {device}"


def new_executor(
    model: Decoder, memory: PagedMemory, config: EngineConfig, opened: bool, modules_only: bool = False
) -> Executor:
    """The executor of a model over its KV cache.

    The compiled CPU kernels pack the weights, which takes time and memory: they are for models that are opened to be served.
    Models that are not plain run by their modules, with compiled attention and packed matmuls. Where there are no kernels, or
    PyTorch is faster, the weights of a quantised model are dequantised once.

    opened: whether this one was opened to be served. modules_only: states inside the model are needed, which the kernels do
    not give. Raises ConfigError where kernels are asked for and cannot be built.
    """
    if memory.by_head:
        flex = compiled_page_attention()
        static = StaticSteps(model, memory, config.max_num_seqs, flex, CudaGraphs()) if memory.has_spare else None
        return ModuleExecutor(model, memory, config.batch_invariant, flex=flex, static=static)
    wanted = config.cpu_kernels == "on" or (config.cpu_kernels == "auto" and opened and model.device.type == "cpu")
    decoded = _decoded_dtype(model) if wanted and config.cpu_kernels == "auto" else None
    packs = wanted and decoded is None
    if packs and not modules_only and KernelExecutor.supports(model) is None:
        kernels = KernelExecutor(model, memory, config.threads, release=opened)
        return AdaptingExecutor(kernels, ModuleExecutor(model, memory, config.batch_invariant, compiled=True))
    if config.cpu_kernels == "on" and library() is None:
        raise ConfigError(f"cpu_kernels: on: {unavailable()}")
    compiled = wanted and ModuleExecutor.can_compile(model)
    packed = packs and model.device.type == "cpu" and library() is not None
    return ModuleExecutor(
        model, memory, config.batch_invariant, compiled, packed, config.threads, release=opened, decoded=decoded
    )


def _decoded_dtype(model: Decoder) -> torch.dtype | None:
    """The type to which the weights of a quantised model on a processor are dequantised once: where no kernels multiply by
    them, or would take longer, and memory holds them. None where they are not."""
    if not is_quantised(model):
        return None
    dtype, free = faster_dtype(), free_memory_bytes()
    fits = dtype is not None and (free is None or decoded_bytes(model, dtype) < _SHARE_FOR_WEIGHTS * free)
    return dtype if fits else None
