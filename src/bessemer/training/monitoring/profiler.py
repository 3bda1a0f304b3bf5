"""Profiles of selected steps, and the peak FLOP/s that MFU is a share of.

A profile is a Perfetto trace, tables of operators and, on a GPU, a memory snapshot. The peak is the vendor's figure on a GPU,
and a measured matmul on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from bessemer.core.metrics import duration, size
from bessemer.core.store import read_json, write_json, write_text
from bessemer.distributed.mesh import Mesh
from bessemer.training.autotune import AUTOTUNE
from bessemer.training.config_parts import ProfileConfig
from bessemer.training.runtime import Runtime

#: Folder below the stage's, and the number of operators in a table.
PROFILE = "profile"
_SHOWN = 25
#: Most events of a memory snapshot.
_MEMORY_EVENTS = 1_000_000


class StepProfiler:
    """Profiles the steps that the settings name; each process writes its own files. Does not change what is computed.

    A context manager, whose exit drops an incomplete recording.
    """

    def __init__(self, config: ProfileConfig | None, out: Path, mesh: Mesh) -> None:
        self._range = range(0) if config is None else config.range
        self._folder = out / PROFILE
        self._name = f"rank-{mesh.rank}"
        self._running: profile | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step `number`, counted from 1."""
        if number not in self._range:
            yield
            return
        if self._running is None:
            self._begin()
        with record_function(f"step {number}"):
            yield
        if number == self._range[-1]:
            self._finish()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
            self._stack.callback(torch.cuda.memory._record_memory_history, enabled=None)
        self._running = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._stack.enter_context(self._running)
        self._start = time.perf_counter()

    def _finish(self) -> None:
        running, seconds = self._running, time.perf_counter() - self._start
        assert running is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            seconds = time.perf_counter() - self._start
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{self._name}.memory.pickle"))
        self._stack.close()
        running.export_chrome_trace(str(self._folder / f"{self._name}.trace.json.gz"))
        steps = f"Steps {self._range[0]} to {self._range[-1]}" if len(self._range) > 1 else f"Step {self._range[0]}"
        head = f"# {steps}, {self._name.replace('-', ' ')}: {duration(seconds)}\n\n"
        write_text(self._folder / f"{self._name}.operators.md", head + operators_tables(running.key_averages()))


def operators_tables(operators: Sequence[Any]) -> str:
    """Markdown tables of a profile's operators: by self time, on the GPU where there is one, and by self memory, allocated less
    freed."""
    on_gpu = any(operator.device_type == DeviceType.CUDA for operator in operators)
    where, memory_of = ("GPU", "self_device_memory_usage") if on_gpu else ("processor", "self_cpu_memory_usage")
    by_time = _table(own_times(operators), f"Time on the {where}", lambda seconds: f"{1e3 * seconds:,.2f} ms", shares=True)
    memory = [(operator.key, operator.count, float(getattr(operator, memory_of))) for operator in operators]
    return f"{by_time}\n{_table(memory, 'Memory, allocated less freed', size, shares=False)}"


def own_times(operators: Sequence[Any]) -> list[tuple[str, int, float]]:
    """(name, calls, self time in seconds) of every kernel of a profile, or, without a GPU, of every operator."""
    kernels = [each for each in operators if each.device_type == DeviceType.CUDA and not each.is_user_annotation]
    if kernels:
        return [(kernel.key, kernel.count, kernel.self_device_time_total / 1e6) for kernel in kernels]
    return [(operator.key, operator.count, operator.self_cpu_time_total / 1e6) for operator in operators]


def _table(rows: Sequence[tuple[str, int, float]], title: str, shown: Callable[[float], str], *, shares: bool) -> str:
    largest = sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])
    total = sum(value for _, _, value in largest) or 1
    heads = ["operator", "calls", title.partition(",")[0].lower(), *(["share"] if shares else [])]
    lines = [f"## {title}", "", f"| {' | '.join(heads)} |", f"|---{'|---:' * (len(heads) - 1)}|"]
    for name, calls, value in largest[:_SHOWN]:
        share = [f"{value / total:.1%}"] if shares else []
        lines.append(f"| {' | '.join([f'`{name}`', f'{calls:,}', shown(value), *share])} |")
    return "\n".join(lines) + "\n"


#: Sides of the matrices of the timed products: the first, and the largest; products in 16 bits run faster than they sustain
#: while they are small.
_SMALLEST_SIDE, _SIDE, _SIDE_HALF = 128, 1024, 2048
#: The side is doubled while a product is expected to take no longer than this, in seconds.
_LONGEST = 0.1
#: Shortest and longest duration of the measurement in seconds, and fewest repetitions.
_SECONDS, _MOST_SECONDS, _TIMES = 0.4, 0.6, 4


def device_peak(out: Path, runtime: Runtime, card_flops: Callable[[str], float | None] = lambda name: None) -> float | None:
    """Peak FLOP/s of one process's device; None where it is unknown.

    On a GPU, `card_flops` of its name: the vendor's dense bfloat16 figure, the convention of MFU whatever the run's dtype. On a
    CPU, measured when a run starts, in the run's dtype and with its threads, and kept in its `autotune.json`. Called by the
    process that writes, after `prepare_run`.
    """
    if torch.device(runtime.device).type != "cpu":
        return card_flops(runtime.processor)
    place = out / AUTOTUNE
    written = read_json(place, "record of a run's start")
    if "peak_flops" not in written:
        written["peak_flops"] = measured_peak(runtime)
        write_json(place, written)
    return float(written["peak_flops"])


def measured_peak(runtime: Runtime) -> float:
    """FLOP/s of the fastest of several large matmuls, in the runtime's dtype and with its threads.

    Takes about half a second, and less than one in a dtype in which this processor multiplies a hundred times slower: the
    matrices are then smaller.
    """
    with runtime.running():
        dtype = getattr(torch, runtime.dtype)
        side, largest = _SMALLEST_SIDE, _SIDE if dtype == torch.float32 else _SIDE_HALF
        while side < largest and 8 * min(_seconds(side, dtype) for _ in range(2)) <= _LONGEST:
            side *= 2
        times: list[float] = []
        while len(times) < 2 or (sum(times) < _MOST_SECONDS and (len(times) < _TIMES or sum(times) < _SECONDS)):
            times.append(_seconds(side, dtype))
    return round(2 * side**3 / min(times[1:]), -6)


def _seconds(side: int, dtype: torch.dtype) -> float:
    """Seconds of one product of square matrices."""
    left, right = (torch.full((side, side), 0.5, dtype=dtype) for _ in range(2))
    start = time.perf_counter()
    torch.mm(left, right)
    return time.perf_counter() - start
