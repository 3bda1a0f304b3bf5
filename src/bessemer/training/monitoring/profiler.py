"""Profiling of selected steps: a Perfetto trace, tables of operators and, on a GPU, a memory snapshot."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from bessemer.core.figures import duration, size
from bessemer.core.store import write_text
from bessemer.distributed.mesh import Mesh
from bessemer.training.monitoring.profile_config import ProfileConfig

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
