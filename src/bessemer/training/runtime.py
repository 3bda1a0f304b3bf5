"""PyTorch's runtime in training: device, dtypes, threads, compiled blocks, determinism.

`threads: auto` chooses the number of CPU threads at the start, at each validation, and while steps are slow, by measuring for
a quarter of a second: threads of one product wait for each other many times a step, so two threads on two cores can be slower
than one while another program takes a core. Another number rounds sums differently. Each choice is written down with its
step, and a resumed run repeats those that were made.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self

import torch
import torch.utils.deterministic
from torch.nn import functional

from bessemer.core.environment import processor, usable_cores
from bessemer.core.errors import ConfigError
from bessemer.core.store import read_json, write_json
from bessemer.distributed.sharding import release_gathered
from bessemer.model.decoder import Decoder
from bessemer.training.config_parts import ComputeSettings

#: Numbers of glibc's settings, from its malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: How Inductor compiles blocks on a processor: one C++ file a graph, and no probes of the compiler beforehand.
_CPU_OPTIONS = {"cpp_wrapper": True, "cpp.vec_isa_ok": True}
#: On a GPU with `deterministic`: no choice of kernels by their measured speed.
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


def release_freed_memory() -> None:
    """Give the memory that glibc keeps of what was freed back to the system, from the middle of its heap too.

    Between phases of a command: what one phase has freed lies in pieces, which only partly fit the tensors of the next one, and
    without this both count in the process's peak. Does nothing outside glibc.
    """
    gc.collect()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


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
    #: Whether `threads` is only the first choice, and `ThreadChoices` adapts it.
    adapts_threads: bool = False

    @classmethod
    def of(cls, config: ComputeSettings, device: torch.device, threads: int | None = None, processes: int = 1) -> Self:
        """The runtime of resolved settings on this machine. threads: those that the run started with, kept where available.
        processes: how many share the machine's cores. Raises ConfigError when determinism is asked for too late
        (`fix_cublas_workspaces`)."""
        assert config.dtype != "auto" and config.compile != "auto"
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

    @property
    def allows_tf32(self) -> bool:
        """Whether products that autocast leaves in float32 are computed in TF32: on a GPU, of a run in 16 bits."""
        return self.dtype != "float32" and torch.device(self.device).type == "cuda"

    @contextmanager
    def running(self) -> Iterator[None]:
        """While entered, sets threads and, on a CPU or where asked for, deterministic algorithms; restores the previous state.

        New memory is not filled with NaN, as deterministic mode would do for safety: no kernel here reads any.
        """
        # typed as Any: type checkers do not see this module's property
        deterministic: Any = torch.utils.deterministic
        threads, fill = torch.get_num_threads(), deterministic.fill_uninitialized_memory
        strict, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        keep_freed_memory()
        torch.set_num_threads(self.threads)
        torch.use_deterministic_algorithms(strict or self.deterministic)
        deterministic.fill_uninitialized_memory = False
        precision = torch.get_float32_matmul_precision()
        if self.allows_tf32:
            torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
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
        """For validation, samples and old log-probabilities during training: evaluation mode, no gradients, no compiling of new
        shapes. Attention is that of training: the kernels of `flex` are compiled once for any shape."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.autocast(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            release_gathered(model)
            model.train(training)


#: Choices by step, in the folder of a run.
THREADS = "threads.json"
#: Length of a measurement in seconds, of all candidates together, and of one turn.
_SECONDS, _TURN_SECONDS = 0.25, 0.02
#: A change must promise this much more work a second; less is noise.
_WORTH_CHANGING = 1.15
#: Between validations: fewest seconds between two choices; steps in a row, and the factor by which they take longer than the
#: first ones after a choice, that make steps slow.
_SECONDS_BETWEEN, _STEPS, _SLOWER = 10.0, 3, 1.5
#: Rows, channels of the product that is timed: that of a small model's block.
_ROWS, _CHANNELS = 1024, 256


def thread_candidates(cores: int) -> tuple[int, ...]:
    """The numbers of threads that are compared: all cores, all but one, half."""
    return tuple(sorted({cores, max(1, cores - 1), max(1, cores // 2)}, reverse=True))


def faster_threads(current: int, candidates: Sequence[int], rate: Callable[[int, float], float] | None = None) -> int:
    """The number of threads by which this machine computes most at present; `current` unless another is clearly better.

    rate: work a second with a number of threads, measured for some seconds. Leaves the number of threads as it was.
    """
    rate = rate or _work_per_second
    others = [number for number in candidates if number != current]
    if not others:
        return current
    turns = max(1, round(_SECONDS / _TURN_SECONDS / (1 + len(others))))
    totals = dict.fromkeys((current, *others), 0.0)
    before = torch.get_num_threads()
    try:
        # in turns, so that passing load slows all candidates alike
        for _ in range(turns):
            for number in totals:
                totals[number] += rate(number, _TURN_SECONDS)
    finally:
        torch.set_num_threads(before)
    best = max(others, key=lambda number: totals[number])
    return best if totals[best] > _WORTH_CHANGING * totals[current] else current


def _work_per_second(threads: int, seconds: float) -> float:
    """Layers of a small model per second: matrix products and element-wise operations."""
    torch.set_num_threads(threads)
    hidden, weight = torch.ones(_ROWS, _CHANNELS), torch.full((_CHANNELS, _CHANNELS), 1 / _CHANNELS)
    start, count = time.perf_counter(), 0
    with torch.no_grad():
        while (elapsed := time.perf_counter() - start) < seconds or not count:
            hidden = functional.silu(functional.rms_norm(hidden @ weight, (_CHANNELS,)))
            count += 1
    return count / max(elapsed, 1e-9)


class ThreadChoices:
    """The numbers of threads of a run by step, as they are chosen, or as they were before it was interrupted.

    They are chosen at validations; while some cores are not used, or steps have become slow, every ten seconds besides.
    """

    def __init__(self, out: Path, threads: int, *, choose: Callable[[int, Sequence[int]], int] | None = None) -> None:
        """out: the run's folder. threads: with which it starts. choose: a number from the present one and the candidates; None:
        `faster_threads`."""
        self._place = out / THREADS
        self._first = threads
        self._choose = choose or faster_threads
        self._candidates = thread_candidates(usable_cores())
        self._by_step: dict[int, int] = {}
        #: Durations of the steps since the last choice, in seconds, and its time.
        self._seconds: list[float] = []
        self._chosen_at = time.monotonic()
        if self._place.exists():
            written = read_json(self._place, "record of a run's threads")
            self._first = written["first"]
            self._by_step = {int(step): number for step, number in written["by_step"].items()}

    def resume(self, step: int) -> int:
        """Set and return the number that a run had after `step` steps."""
        number = self._at(step)
        torch.set_num_threads(number)
        return number

    def after_step(self, step: int, seconds: float, *, validated: bool) -> int | None:
        """Set the number for the steps that follow `step` finished ones, the last of which took `seconds`; it, where it was
        chosen, or was once chosen, here. validated: whether the model was validated after this step."""
        self._seconds.append(seconds)
        if step < max(self._by_step, default=0) or step in self._by_step:
            # this choice was made before the run was interrupted: repeat it
            return self.resume(step) if step in self._by_step else None
        if not validated and not self._is_due():
            return None
        self._by_step[step] = self._choose(self._at(step), self._candidates)
        write_json(self._place, {"first": self._first, "by_step": self._by_step})
        self._seconds, self._chosen_at = [], time.monotonic()
        return self.resume(step)

    def _is_due(self) -> bool:
        if time.monotonic() - self._chosen_at < _SECONDS_BETWEEN:
            return False
        if torch.get_num_threads() < self._candidates[0]:
            return True
        first, last = self._seconds[:_STEPS], self._seconds[_STEPS:][-_STEPS:]
        return len(last) == _STEPS and min(last) > _SLOWER * median(first)

    def _at(self, step: int) -> int:
        """The number of threads of the step that follows `step` finished ones."""
        return next((self._by_step[at] for at in sorted(self._by_step, reverse=True) if at <= step), self._first)
