"""PyTorch's runtime in training: device, dtypes, threads, compiled blocks, determinism."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.utils.deterministic

from bessemer.core.environment import processor, usable_cores
from bessemer.core.errors import ConfigError
from bessemer.distributed.sharding import release_gathered
from bessemer.model.decoder import Decoder
from bessemer.training.config import LoopConfig

#: Numbers of glibc's settings, from its malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: How Inductor compiles blocks on a processor: one C++ file a graph, and no probes of the compiler beforehand.
_CPU_OPTIONS = {"cpp_wrapper": True, "cpp.vec_isa_ok": True}
#: And on a GPU where results must not depend on which kernel was the fastest of several when they were tried.
_DETERMINISTIC_OPTIONS = {"deterministic": True}
#: A setting that cuBLAS reads from the environment, and the value that makes its products deterministic: eight workspaces of
#: 4,096 KiB (PyTorch's notes on reproducibility).
_CUBLAS_VARIABLE, _CUBLAS_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
#: Channels of a head below which FlexAttention has no kernel.
_NARROWEST_HEAD = 16


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


def fix_cublas_workspaces() -> None:
    """Make cuBLAS use workspaces of a fixed size, without which its products differ from run to run.

    It reads the environment when CUDA is initialised. Raises ConfigError when that has happened and the environment does not
    say so already.
    """
    if os.environ.get(_CUBLAS_VARIABLE) in (_CUBLAS_WORKSPACES, ":16:8"):
        return
    if torch.cuda.is_initialized():
        raise ConfigError(
            f"deterministic: true needs {_CUBLAS_VARIABLE}={_CUBLAS_WORKSPACES} in the environment before CUDA is initialised, "
            "and this process has done that; set it and run again"
        )
    os.environ[_CUBLAS_VARIABLE] = _CUBLAS_WORKSPACES


@dataclass(frozen=True)
class Runtime:
    """The choices that a result depends on to the last bit; kept in `autotune.json`."""

    device: str
    dtype: str
    compile: bool
    threads: int
    processor: str
    torch_version: str
    deterministic: bool
    #: Whether `threads` is where the run starts, and is chosen again (`bessemer.training.threads`).
    adapts_threads: bool = False

    @classmethod
    def of(cls, config: LoopConfig, device: torch.device, threads: int | None = None, processes: int = 1) -> Self:
        """The runtime of resolved settings on this machine. threads: those that the run started with, kept where available.
        processes: how many share the machine's cores. Raises ConfigError when determinism is asked for too late
        (`fix_cublas_workspaces`)."""
        assert config.resolved
        if config.deterministic and device.type == "cuda":
            fix_cublas_workspaces()
        model = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
        cores = max(1, usable_cores() // processes)
        given = None if config.threads == "auto" else config.threads
        return cls(
            device=str(device),
            dtype=config.dtype,
            compile=bool(config.compile),
            threads=given or min(threads or cores, cores),
            processor=model,
            torch_version=torch.__version__,
            deterministic=config.deterministic or device.type == "cpu",
            adapts_threads=config.threads == "auto" and device.type == "cpu" and processes == 1,
        )

    @contextmanager
    def running(self) -> Iterator[None]:
        """While entered, sets threads and, on a CPU or where asked for, deterministic algorithms; restores the previous state.

        New memory is not filled with NaN, as deterministic mode would do for safety: no kernel here reads any.
        """
        # a module with a property, which type checkers do not see
        deterministic: Any = torch.utils.deterministic
        threads, fill = torch.get_num_threads(), deterministic.fill_uninitialized_memory
        strict, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        keep_freed_memory()
        torch.set_num_threads(self.threads)
        torch.use_deterministic_algorithms(strict or self.deterministic)
        deterministic.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(strict, warn_only=warn)
            deterministic.fill_uninitialized_memory = fill

    def skip_masked_blocks(self, model: Decoder) -> None:
        """On a GPU, compute attention over packed documents by `flex`: the blocks of scores between documents are not computed,
        and no mask of T² numbers a row is made. The model stays as it is where a head is too narrow, or Triton is missing."""
        config = model.config
        widths: tuple[int, ...] = (config.head_dim,)
        if config.is_latent:
            widths = (config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)
        possible = torch.device(self.device).type == "cuda" and importlib.util.find_spec("triton") is not None
        if possible and model.attention_backend == "sdpa" and min(widths) >= _NARROWEST_HEAD:
            model.set_attention_backend("flex")

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
            options: dict[str, Any] | None = _CPU_OPTIONS if self.device == "cpu" and alone else None
            if self.adapts_threads:
                # compiled for any number of threads
                options = {**(options or {}), "cpp.dynamic_threads": True}
            if self.device != "cpu" and self.deterministic:
                options = _DETERMINISTIC_OPTIONS
            for block in model.blocks:
                block.compile(dynamic=False, options=options)

    @property
    def gathered_dtype(self) -> torch.dtype | None:
        """The dtype in which FSDP gathers the matrices of the blocks: bfloat16 where products read them so; None: as stored."""
        return torch.bfloat16 if self.dtype == "bfloat16" else None

    def autocast(self) -> AbstractContextManager[Any]:
        """Matmuls in bfloat16 or float16, where chosen; the weights stay in float32."""
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, getattr(torch, self.dtype))

    @contextmanager
    def evaluating(self, model: Decoder) -> Iterator[None]:
        """For validation and samples during training: evaluation mode, no gradients, no compiling of new shapes; so without
        `flex`, whose kernels are made for training's."""
        training, flexible = model.training, model.attention_backend == "flex"
        model.eval()
        if flexible:
            model.set_attention_backend("sdpa")
        try:
            with torch.no_grad(), self.autocast(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            release_gathered(model)
            model.train(training)
            if flexible:
                model.set_attention_backend("flex")
