"""Worker processes of a sharded model: started, commanded, watched and ended by rank 0.

Commands go through a pipe to each, because a pipe can be waited on for days; a collective that a process does not join is an
error after some minutes. Through a second pipe a worker reports that it is ready, or what went wrong. A process that is gone
closes both, so that rank 0 does not wait for it.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

from bessemer.core.errors import BessemerError, LostProcessError, ending_of_process
from bessemer.inference.execution.tensor_parallel.adapters import AdapterNumbers
from bessemer.inference.execution.tensor_parallel.commands import Command, encode

#: What each process runs; its last argument is JSON.
PROGRAM = (sys.executable, "-m", "bessemer.inference.execution.tensor_parallel.worker")
#: Seconds that a process gets to end by itself.
_GRACE_SECONDS = 5
#: Seconds in which the end of a process that broke a collective is known.
_NEWS_SECONDS = 3


class WorkerProcesses:
    """Ranks 1, 2, …; `settings` is what `bessemer.inference.execution.tensor_parallel.worker` is given, with its rank."""

    def __init__(
        self, ranks: int, settings: Mapping[str, Any], threads: int | None, interrupt: Callable[[], None] | None = None
    ) -> None:
        """threads: of PyTorch in each; its own choice when None. interrupt: called, on another thread, when one was lost."""
        self.numbers = AdapterNumbers()
        self._interrupt = interrupt
        environment = dict(os.environ)
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._news = threading.Condition()
        self._ready = 0
        self._failures: list[tuple[bool, LostProcessError]] = []
        self._closed = False
        self._processes = [self._start(dict(settings) | {"rank": rank}, environment) for rank in range(1, ranks)]
        self._watchers = [
            threading.Thread(target=self._watch, args=(rank, process), name=f"worker {rank}", daemon=True)
            for rank, process in enumerate(self._processes, start=1)
        ]
        for watcher in self._watchers:
            watcher.start()

    @staticmethod
    def _start(settings: dict[str, Any], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*PROGRAM, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            # Ctrl-C is for rank 0, which then ends the workers
            start_new_session=True,
        )

    @property
    def failure(self) -> LostProcessError | None:
        """Why the model can compute no more; None while it can."""
        with self._news:
            # a worker that died without a report is the cause; reports of a lost connection are its consequence
            return min(self._failures, key=lambda failure: failure[0])[1] if self._failures else None

    def wait_until_ready(self) -> None:
        """Wait until all have read the model. Raises LostProcessError, with what a worker reported."""
        with self._news:
            self._news.wait_for(lambda: self._ready == len(self._processes) or self._failures)
        if (failure := self.failure) is not None:
            raise failure

    def tell(self, command: Command) -> None:
        """Send a command to all workers."""
        message = pickle.dumps(encode(command, self.numbers))
        for process in self._processes:
            _stream(process.stdin).write(message)
            _stream(process.stdin).flush()

    @contextmanager
    def together(self) -> Iterator[None]:
        """A collective call: an error within it ends all workers, and is raised as LostProcessError.

        The ranks would no longer be at the same call, so nothing is computed after it.
        """
        if self._closed and self.failure is None:
            raise LostProcessError("the engine is closed; open the model again")
        try:
            if (failure := self.failure) is not None:
                raise failure
            yield
        except BaseException as error:
            failure = self._cause_of(error)
            self.close(grace=0)
            if isinstance(error, Exception) and not isinstance(error, BessemerError):
                raise failure from error
            raise

    def close(self, grace: float = _GRACE_SECONDS) -> None:
        """End the processes, after `grace` seconds those that do not end by themselves."""
        self.let_go()
        for process in self._processes:
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for watcher in self._watchers:
            watcher.join()

    def let_go(self) -> None:
        """Close the commands: the workers end."""
        self._closed = True
        for process in self._processes:
            # the process may be gone, with a command unread
            with suppress(OSError):
                _stream(process.stdin).close()

    # -- inside

    def _cause_of(self, error: BaseException) -> LostProcessError:
        """The process that ended, where that broke the call; else the error itself, which leaves the workers waiting."""
        with self._news:
            if not self._news.wait_for(lambda: self._failures, 0 if isinstance(error, BessemerError) else _NEWS_SECONDS):
                self._failures.append((True, LostProcessError(f"process 0 of the model failed: {_one_line(error)}")))
        failure = self.failure
        assert failure is not None
        return failure

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        reported = None
        for line in _stream(process.stdout):
            message = json.loads(line)
            if message == "ready":
                with self._news:
                    self._ready += 1
                    self._news.notify_all()
            else:
                reported = message
        code = process.wait()
        if reported is None:
            self._note(False, LostProcessError(f"process {rank} of the model ended with {ending_of_process(code)}; all stop"))
        else:
            self._note(True, LostProcessError(f"process {rank} of the model failed: {reported}"))

    def _note(self, is_reported: bool, failure: LostProcessError) -> None:
        with self._news:
            if not self._closed:
                self._failures.append((is_reported, failure))
            self._news.notify_all()
        if not self._closed and self._interrupt is not None:
            self._interrupt()


def _stream(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "both are pipes"
    return stream


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
