"""Engine of the data stages: Daft, whose rows are tasks (a part of the documents, a file), not documents.

A task is one call of a plain function, which reads and writes files of its own and returns a small JSON
value. So the same function runs in this process's threads, in processes of its own or on a Ray cluster, memory is bounded
by the tasks under way, and a killed stage goes on with the tasks that are not done. Daft is imported here alone.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from queue import Empty, SimpleQueue
from typing import Any, Literal, TypeVar

import bessemer.core.errors as errors
from bessemer.core.concurrency import DeferredInterrupts, abandon_threads
from bessemer.core.environment import install_extra
from bessemer.core.errors import BessemerError, as_storage_error

Task = TypeVar("Task")

#: Seconds after which the thread that waits for tasks looks for a Ctrl-C.
_LOOK = 0.1
#: Result where no row came within that time.
_NOT_YET = (-1, "")

_ENVIRONMENT = {
    "DAFT_ANALYTICS_ENABLED": "0",
    "DAFT_PROGRESS_BAR": "0",
    "DAFT_SHOW_QUERY_ID": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}


@dataclass(frozen=True)
class Engine:
    """Where the tasks of a data stage run.

    `local`: on this machine's cores, in threads of this process, or in `processes` where Python itself has much to do.
    `ray`: on the cluster at `address` (`ray://host:10001`, `auto`), a new one on this machine where it is None.
    """

    name: Literal["local", "ray"] = "local"
    address: str | None = None
    processes: bool = False


def load_daft() -> Any:
    """Import Daft with its telemetry, and that of what it loads, switched off."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import daft

    # A function's error reaches the caller unchanged, so the engine's own message about it is suppressed.
    logging.getLogger("daft_local_execution").setLevel(logging.CRITICAL)
    return daft


def run_tasks(
    function: Callable[[Task], Any], tasks: Sequence[Task], engine: Engine | None = None
) -> Iterator[tuple[int, Any]]:
    """Call `function` on every task and yield (number of the task, what was returned) as they finish, in no fixed order.

    What the function returns must be a JSON value; a BessemerError that it raises is raised here as it was there.
    The function and the tasks travel to other processes by value, their modules by name.

    Ctrl-C ends it without waiting for the tasks under way; their files are unfinished ones, as after a kill.
    """
    if not tasks:
        return
    engine = engine or Engine()
    daft = load_daft()
    if engine.name == "ray":
        _start_ray(daft, engine)
    apart = engine.name == "local" and engine.processes
    demand = _Demand()

    def work(numbers: Any) -> list[str]:
        if apart:
            _end_with_parent()
        return [_answer(function, tasks[number]) if demand.lasts else "" for number in numbers.to_pylist()]

    apply = daft.func.batch(return_dtype=daft.DataType.string(), batch_size=1, use_process=apart)(work)
    frame = daft.from_pydict({"task": list(range(len(tasks)))})
    if engine.name == "ray":
        frame = frame.into_partitions(len(tasks))
    for number, text in _rows_of(frame.select("task", apply(daft.col("task")).alias("answer")), demand):
        answer = json.loads(text)
        if "error" in answer:
            raise _error(**answer)
        yield number, answer["result"]


@dataclass
class _Demand:
    """Whether tasks that have not begun are still wanted. Copies in other processes do not change with it."""

    lasts: bool = True


def _rows_of(frame: Any, demand: _Demand) -> Iterator[tuple[int, str]]:
    """The rows as the engine finishes them, which runs in another thread. Daft handles Ctrl-C on its own, says so,
    and may lose it: this thread keeps the signal, and never waits inside the engine."""
    rows: SimpleQueue[tuple[int, str] | BaseException | None] = SimpleQueue()

    def compute() -> None:
        try:
            for row in frame.iter_rows():
                if not demand.lasts:
                    break
                rows.put((row["task"], row["answer"]))
            rows.put(None)
        except BaseException as error:
            rows.put(error)

    computing = threading.Thread(target=compute, name="data-engine", daemon=True)
    with DeferredInterrupts() as interrupts:
        computing.start()
        try:
            while True:
                try:
                    result = rows.get(timeout=_LOOK)
                except Empty:
                    result = _NOT_YET
                # Daft installs its own signal handler when its first query runs, before the first row; `renew` puts ours back
                interrupts.renew()
                if interrupts.received is not None:
                    interrupts.deliver()
                if isinstance(result, BaseException):
                    raise result
                if result is None:
                    return
                if result is not _NOT_YET:
                    yield result
        except BaseException:
            demand.lasts = False
            if interrupts.received is None:
                computing.join()
            else:
                abandon_threads()
            raise


@cache
def _end_with_parent() -> None:
    """In a process of the engine: end soon after the one that it works for, which Ctrl-C or a kill has ended. Two that write
    the same files would be in each other's way when the same command goes on."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def _answer(function: Callable[[Any], Any], task: Any) -> str:
    """The function's result or a user's mistake, as JSON; other errors are raised, for the engine to report."""
    try:
        return json.dumps({"result": function(task)})
    except BessemerError as error:
        mistake: BessemerError | None = error
    except Exception as error:
        mistake = as_storage_error(error)
        if mistake is None:
            raise
    return json.dumps({"error": type(mistake).__name__, "text": str(mistake)})


def _error(error: str, text: str) -> BessemerError:
    kind = getattr(errors, error, BessemerError)
    assert issubclass(kind, BessemerError)
    return kind(text)  # type: ignore[no-any-return]


def _start_ray(daft: Any, engine: Engine) -> None:
    try:
        import ray
    except ImportError:
        raise errors.ConfigError(f"engine: ray needs the package ray: {install_extra('ray')}") from None
    if not ray.is_initialized():
        try:
            ray.init(address=engine.address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise errors.ConfigError(
                f"engine: ray: no cluster answers at {engine.address} (one that asks for a token needs RAY_AUTH_MODE=token "
                f"here as well): {error}"
            ) from None
    daft.set_runner_ray(engine.address, noop_if_initialized=True)
    # Daft's runner is fixed once per process
    if daft.get_or_create_runner().name != "ray":
        raise errors.ConfigError("engine: ray: a stage of this run was local before it; give all data stages one engine")
