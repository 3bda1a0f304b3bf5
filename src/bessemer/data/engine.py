"""Engine of the data stages: Daft, whose rows are tasks (a part of the documents, a file), not documents.

A task is one call of a plain function, which reads and writes files of its own and returns a small JSON
value. So the same function runs in this process's threads, in processes of its own or on a Ray cluster, memory is bounded
by the tasks under way, and a killed stage goes on with the tasks that are not done. Daft is imported here alone.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import bessemer.core.errors as errors
from bessemer.core.errors import BessemerError
from bessemer.core.packages import install_extra

Task = TypeVar("Task")

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

    # A function's error reaches the caller as it is; the engine's own lines about it would only repeat it.
    logging.getLogger("daft_local_execution").setLevel(logging.CRITICAL)
    return daft


def run_tasks(
    function: Callable[[Task], Any], tasks: Sequence[Task], engine: Engine | None = None
) -> Iterator[tuple[int, Any]]:
    """Call `function` on every task and yield (number of the task, what was returned) as they finish, in no fixed order.

    What the function returns must be a JSON value; a BessemerError that it raises is raised here as it was there.
    The function and the tasks travel to other processes by value, their modules by name.
    """
    if not tasks:
        return
    engine = engine or Engine()
    daft = load_daft()
    if engine.name == "ray":
        _start_ray(daft, engine)
    apart = engine.name == "local" and engine.processes

    def work(numbers: Any) -> list[str]:
        return [_answer(function, tasks[number]) for number in numbers.to_pylist()]

    apply = daft.func.batch(return_dtype=daft.DataType.string(), batch_size=1, use_process=apart)(work)
    frame = daft.from_pydict({"task": list(range(len(tasks)))})
    if engine.name == "ray":
        frame = frame.into_partitions(len(tasks))
    for row in frame.select("task", apply(daft.col("task")).alias("answer")).iter_rows():
        answer = json.loads(row["answer"])
        if "error" in answer:
            raise _error(**answer)
        yield row["task"], answer["result"]


def _answer(function: Callable[[Any], Any], task: Any) -> str:
    """What the function returned, or the user's mistake that it found: other errors are the engine's to report."""
    try:
        return json.dumps({"result": function(task)})
    except BessemerError as error:
        return json.dumps({"error": type(error).__name__, "text": str(error)})


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
    # Daft chooses once in a process
    if daft.get_or_create_runner().name != "ray":
        raise errors.ConfigError("engine: ray: a stage of this run was local before it; give all data stages one engine")
