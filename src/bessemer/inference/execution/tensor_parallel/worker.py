"""A tensor-parallel worker: any rank but 0 of the processes that serve one model.

`worker_processes` starts it as `python -m bessemer.inference.execution.tensor_parallel.worker JSON`. Commands arrive on its
standard input; `"ready"` and errors leave on its standard output.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from bessemer.core.environment import set_environment

#: Exit code after an error that was reported to rank 0.
_REPORTED = 2
#: Seconds that a step gets to end after rank 0 is gone.
GRACE_SECONDS = 5


def main(settings: dict[str, Any], commands: IO[bytes], replies: IO[bytes]) -> int:
    """Serve until the commands end; the exit code."""
    from bessemer.distributed.mesh import Seat, joined
    from bessemer.inference.build import worker_runners
    from bessemer.inference.config import EngineConfig
    from bessemer.inference.execution.runner import run_worker
    from bessemer.inference.execution.tensor_parallel.sharded_model import device_of, mesh_of, one_line, shard_model
    from bessemer.model.storage.folder import load_model

    def report(message: str) -> None:
        replies.write(json.dumps(message).encode() + b"\n")
        replies.flush()

    coming = read_commands(commands)
    try:
        config = EngineConfig.parse(settings["config"])
        assert config.parallel is not None
        seat = Seat(settings["rank"], config.processes, Path(settings["file"]))
        device = device_of(settings["device"], seat.rank, seat.processes)
        model = load_model(settings["folder"])
        report("ready")
        with joined(device, config.parallel.timeout, seat):
            mesh = mesh_of(config.parallel, device)
            shard_model(model, mesh, device, config)
            runner, draft = worker_runners(model, config, mesh)
            run_worker(runner, coming, draft)
    except Exception as error:
        # rank 0 may have ended
        with suppress(OSError):
            report(one_line(error))
        return _REPORTED
    return 0


def read_commands(commands: IO[bytes]) -> Iterator[bytes]:
    """Commands as they come, encoded, read on a thread of its own.

    The thread sees that rank 0 is gone also where a step, or the start of the process group, waits for it, and then ends this
    process.
    """
    read: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def work() -> None:
        try:
            while True:
                read.put(pickle.load(commands))
        except (EOFError, OSError, pickle.UnpicklingError):
            read.put(None)
        threading.Event().wait(GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=work, name="commands", daemon=True).start()
    return iter(read.get, None)


if __name__ == "__main__":
    set_environment()
    with os.fdopen(os.dup(1), "wb") as replies:
        # what libraries print goes to standard error
        os.dup2(2, 1)
        code = main(json.loads(sys.argv[1]), sys.stdin.buffer, replies)
    # nothing is left to do, and taking PyTorch down takes seconds
    os._exit(code)
