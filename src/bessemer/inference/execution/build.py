"""Builds a model's runner: chooses its backend, and the layout of its pages."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from bessemer.core.environment import free_memory_bytes
from bessemer.core.errors import ConfigError
from bessemer.inference.config import EngineConfig
from bessemer.inference.execution.backend import Backend, Linear
from bessemer.inference.execution.compiled_steps import CompiledSteps, StepsCodes
from bessemer.inference.execution.cuda_graphs import CudaGraphs, StaticSteps, cannot_be_static
from bessemer.inference.execution.flex_attention import FlexPagesAttention, compiled_page_attention
from bessemer.inference.execution.kv_cache import PagedMemory
from bessemer.inference.execution.linear import DequantisedWeights, OwnWeights, PackedCodes
from bessemer.inference.execution.paged_attention import CompiledAttention, GatheredAttention
from bessemer.inference.execution.runner import Runner
from bessemer.inference.execution.tensor_parallel.commands import Workers
from bessemer.model.cpu_kernels.build import library, unavailable
from bessemer.model.cpu_kernels.choice import faster_dtype
from bessemer.model.decoded_products import decoded_bytes
from bessemer.model.decoder import Decoder
from bessemer.model.quantised_linear import is_quantised

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
    do not give. workers and axis: the processes that share the model, as of `Runner`. Raises ConfigError where kernels are
    asked for and cannot be built.
    """
    if workers is not None:
        backend = shared_backend(model, memory)
    else:
        backend = choose_backend(model, memory, config, opened, modules_only)
        backend = replace(backend, samples=samples_on_device(memory, config))
    return Runner(model, memory, backend, batch_invariant=config.batch_invariant, workers=workers, axis=axis)


def samples_on_device(memory: PagedMemory, config: EngineConfig) -> bool:
    """Whether tokens are sampled where the logits lie. A processor that computes has no time to schedule beside it.

    Not where draft tokens are verified on the host, nor for linear attention, whose states are hashed before they are computed.
    """
    if config.async_scheduling == "off" or config.speculation is not None or memory.state_slots:
        return False
    return config.async_scheduling == "on" or (memory.device.type == "cuda" and not config.batch_invariant)


def shared_backend(model: Decoder, memory: PagedMemory) -> Backend:
    """The backend of each of several processes that share a model."""
    return Backend(OwnWeights(), GatheredAttention(memory, model.dtype))


def choose_backend(
    model: Decoder, memory: PagedMemory, config: EngineConfig, opened: bool, modules_only: bool = False
) -> Backend:
    """The first that can compute a model's steps, of:

    - pages read in place by FlexAttention, where the settings ask for it, with decode steps on static tensors;
    - whole steps by the compiled CPU kernels, for plain decoders;
    - the model's modules, with compiled attention and packed codes where there are kernels; where there are none, or PyTorch
      is faster, quantised weights are dequantised once.

    The kernels pack the weights, which takes time and memory: they are for models that are opened to be served. Arguments and
    errors as of `new_runner`.
    """
    if memory.by_head:
        pages = compiled_page_attention()
        static = StaticSteps(model, memory, config.max_num_seqs, pages, CudaGraphs()) if memory.has_spare else None
        return Backend(OwnWeights(), FlexPagesAttention(memory, pages), static)
    wanted = config.cpu_kernels == "on" or (config.cpu_kernels == "auto" and opened and model.device.type == "cpu")
    decoded = _decoded_dtype(model) if wanted and config.cpu_kernels == "auto" else None
    packs = wanted and decoded is None
    if packs and not modules_only and CompiledSteps.supports(model) is None:
        steps = CompiledSteps(model, memory, config.threads, release=opened)
        return Backend(StepsCodes(steps), CompiledAttention(memory, torch.get_num_threads()), steps, generator=steps)
    if config.cpu_kernels == "on" and library() is None:
        raise ConfigError(f"cpu_kernels: on: {unavailable()}")
    threads = config.threads or torch.get_num_threads()
    linear: Linear = OwnWeights()
    if decoded is not None:
        linear = DequantisedWeights(model, decoded)
    elif packs and model.device.type == "cpu" and is_quantised(model) and library() is not None:
        linear = PackedCodes(model, threads, release=opened)
    if wanted and CompiledAttention.supports(model):
        return Backend(linear, CompiledAttention(memory, threads))
    return Backend(linear, GatheredAttention(memory, model.dtype))


def _decoded_dtype(model: Decoder) -> torch.dtype | None:
    """The type to which the weights of a quantised model on a processor are dequantised once: where no kernels multiply by
    them, or would take longer, and memory holds them. None where they are not."""
    if not is_quantised(model):
        return None
    dtype, free = faster_dtype(), free_memory_bytes()
    fits = dtype is not None and (free is None or decoded_bytes(model, dtype) < _SHARE_FOR_WEIGHTS * free)
    return dtype if fits else None
