"""PyTorch's runtime in training: device, dtypes, threads, compiled blocks, determinism."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.utils.deterministic

from bessemer.core.environment import processor, usable_cores
from bessemer.distributed.sharding import release_gathered
from bessemer.model.decoder import Decoder
from bessemer.training.config import LoopConfig

#: Numbers of glibc's settings, from its malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: How Inductor compiles blocks on a processor: one C++ file a graph, and no probes of the compiler beforehand.
_CPU_OPTIONS = {"cpp_wrapper": True, "cpp.vec_isa_ok": True}


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step instead of returning it to the system.

    A step frees and allocates the same memory again; without this a 1M model's step takes 10,000 page faults and 11 %
    longer. Peak memory does not change. Does nothing outside glibc; cannot be undone.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


@dataclass(frozen=True)
class Runtime:
    """The choices that a result depends on to the last bit; kept in `autotune.json`."""

    device: str
    dtype: str
    compile: bool
    threads: int
    processor: str
    torch_version: str

    @classmethod
    def of(cls, config: LoopConfig, device: torch.device, threads: int | None = None, processes: int = 1) -> Self:
        """The runtime of resolved settings on this machine. threads: those that the run started with, kept where available.
        processes: how many share the machine's cores."""
        assert config.resolved
        model = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
        cores = max(1, usable_cores() // processes)
        wanted = config.threads or min(threads or cores, cores)
        return cls(str(device), config.dtype, bool(config.compile), wanted, model, torch.__version__)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While entered, sets threads and, on a CPU, deterministic algorithms; restores the previous state.

        New memory is not filled with NaN, as deterministic mode would do for safety: no kernel here reads any.
        """
        # a module with a property, which type checkers do not see
        deterministic: Any = torch.utils.deterministic
        threads, fill = torch.get_num_threads(), deterministic.fill_uninitialized_memory
        strict, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        keep_freed_memory()
        torch.set_num_threads(self.threads)
        torch.use_deterministic_algorithms(strict or self.device == "cpu")
        deterministic.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(strict, warn_only=warn)
            deterministic.fill_uninitialized_memory = fill

    def compile_blocks(self, model: Decoder, *, alone: bool) -> None:
        """Compile a model's blocks one by one, where `compile` is set; with blocked attention where that is the fastest.

        Embedding and head stay eager: compiled as a whole a model gives other weights every run, with compiled blocks the same
        ones, also after a resume. Shapes are static, so that earlier shapes cannot change the code.

        alone: no other process shares the blocks. Then, on a CPU, one C++ file for a block's forward pass and one for its
        backward pass hold all its kernels: the same numbers, and the compiler starts twice instead of 34 times. PyTorch 2.13
        does not compile collectives into such files. PyTorch's probes of the compiler beforehand would take 8 s more.
        """
        if self.compile:
            torch.compiler.reset()
            if self.device == "cpu" and self.dtype == "bfloat16" and model.attention_backend == "sdpa":
                model.set_attention_backend("blocked")
            options = _CPU_OPTIONS if self.device == "cpu" and alone else None
            for block in model.blocks:
                block.compile(dynamic=False, options=options)

    def autocast(self) -> AbstractContextManager[Any]:
        """Matmuls in bfloat16 or float16, where chosen; the weights stay in float32."""
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, getattr(torch, self.dtype))

    @contextmanager
    def evaluating(self, model: Decoder) -> Iterator[None]:
        """For validation and samples during training: evaluation mode, no gradients, no compiling of new shapes."""
        model.eval()
        try:
            with torch.no_grad(), self.autocast(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            release_gathered(model)
            model.train()
