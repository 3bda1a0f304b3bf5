"""Limited processes for hostile input: a parser that hangs or crashes there costs one document.

The helper is an interpreter that reads pickled arguments from a pipe and answers with pickled results. It is no
`multiprocessing` process, since those may not be started from a pool's workers.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

_MEMORY_BYTES = 2 << 30
_HEADER = 8
_CLOCK_FACTOR = 10
_START_SECONDS = 120.0
#: Signal that ends a helper whose processor time is used up; 0 where the system has no such timer.
_TIME_IS_UP = int(getattr(signal, "SIGPROF", 0))


class RefusedError(Exception):
    """The work on one input was given up. `kind` is what it is counted under."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


class Limited:
    """Calls of one function, each with at most `seconds` of processor time, in a helper process started when needed.

    Processor time, so that what is given up does not depend on what else the machine does; a call that waits instead of
    working ends after ten times as long on the clock. The function is a module's own, so that the helper can import it; as
    `module:function` it is imported there alone. Its arguments and results can be pickled.
    """

    def __init__(self, function: Callable[..., Any] | str, seconds: float) -> None:
        self._name = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[bytes] = queue.Queue()

    def __call__(self, *arguments: Any) -> Any:
        """The function's result. Raises RefusedError when it failed, took too long, or the helper died of it."""
        process = self._process or self._start()
        assert process.stdin is not None
        message = pickle.dumps(arguments, protocol=pickle.HIGHEST_PROTOCOL)
        try:
            # From a thread: a helper that hangs before it has read everything would block the pipe, and with it us.
            writer = threading.Thread(target=_write, args=(process.stdin, message), daemon=True)
            writer.start()
            answer = self._answer(process.pid)
        except queue.Empty:
            self.close()
            raise RefusedError("timed_out", f"took more than {self._seconds:g} seconds") from None
        if not answer:
            if process.wait() == -_TIME_IS_UP:
                self.close()
                raise RefusedError("timed_out", f"took more than {self._seconds:g} seconds")
            self.close()
            raise RefusedError("crashed", "its parser crashed or ran out of memory")
        done, result = pickle.loads(answer)
        if not done:
            raise RefusedError("unreadable_files", result)
        return result

    def _answer(self, pid: int) -> bytes:
        """The helper's answer, b"" where it has died. Raises queue.Empty when it waits instead of working."""
        used = _processor_seconds(pid)
        while True:
            try:
                return self._answers.get(timeout=_CLOCK_FACTOR * self._seconds)
            except queue.Empty:
                # it has used processor time since, so it works, if slowly
                if (now := _processor_seconds(pid)) <= used:
                    raise
                used = now

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", f"from {__name__} import serve; serve({self._name!r}, {self._seconds!r})"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=None
        )
        self._answers = queue.Queue()
        threading.Thread(target=_listen, args=(self._process.stdout, self._answers), daemon=True).start()
        # its first answer says that it is ready, so that starting is not timed
        try:
            is_ready = bool(self._answers.get(timeout=_START_SECONDS))
        except queue.Empty:
            is_ready = False
        if not is_ready:
            self.close()
            raise RefusedError("crashed", "the helper process could not be started")
        return self._process

    def close(self) -> None:
        """End the helper."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError, ValueError):
                    pipe.close()  # type: ignore[union-attr]
            self._process = None


class Helpers:
    """The helper processes that live while a unit is read, one for each function."""

    def __init__(self) -> None:
        self._limited: dict[str, Limited] = {}

    def call(self, function: Callable[..., Any], seconds: float, *arguments: Any) -> Any:
        """`function(*arguments)` in its helper. Raises RefusedError."""
        limited = self._limited.setdefault(f"{function.__module__}:{function.__qualname__}", Limited(function, seconds))
        return limited(*arguments)

    def close(self) -> None:
        """End the helpers."""
        for limited in self._limited.values():
            limited.close()


def _processor_seconds(pid: int) -> float:
    """Processor time that a process has used, where the system tells; else 0."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        # those behind the name, from the third on: user and system time are the 14th and 15th
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def _write(pipe: IO[bytes], message: bytes) -> None:
    # the helper died: the listener says so
    with contextlib.suppress(OSError, ValueError):
        pipe.write(len(message).to_bytes(_HEADER, "little") + message)
        pipe.flush()


def _read(pipe: IO[bytes]) -> bytes:
    header = pipe.read(_HEADER)
    return pipe.read(int.from_bytes(header, "little")) if len(header) == _HEADER else b""


def _listen(pipe: IO[bytes], answers: queue.Queue[bytes]) -> None:
    with contextlib.suppress(OSError, ValueError):
        while answer := _read(pipe):
            answers.put(answer)
    answers.put(b"")


def serve(name: str, seconds: float) -> None:
    """The helper's life: import `module:function`, then answer calls until the pipe closes, or one takes too long."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    module, _, function = name.partition(":")
    called = getattr(importlib.import_module(module), function)
    answers, calls = sys.stdout.buffer, sys.stdin.buffer
    # keeps what a library prints out of the answers
    sys.stdout = sys.stderr
    _write(answers, pickle.dumps(("ready", None)))
    while message := _read(calls):
        _let_run(seconds)
        try:
            answer = (True, called(*pickle.loads(message)))
        except Exception as error:  # whatever hostile input makes a parser raise
            answer = (False, f"{type(error).__name__}: {error}")
        _let_run(0)
        _write(answers, pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL))


def _let_run(seconds: float) -> None:
    """Have the system end this process after so much processor time, whatever it is doing; never for 0."""
    if _TIME_IS_UP:
        signal.setitimer(signal.ITIMER_PROF, seconds)
