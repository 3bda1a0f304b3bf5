"""The caller's side of one run: the Python interpreter, the launcher's process, its streams and limits, the result.

Limits that the kernel does not enforce are checked here, and end the run.
"""

from __future__ import annotations

import math
import os
import selectors
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

from bessemer.core.sandbox import launcher
from bessemer.core.sandbox.launcher.job import Job
from bessemer.core.sandbox.resources import ControlGroup, Limits, folder_bytes, memory_of, processes_below, threads_of
from bessemer.core.sandbox.tiers import SandboxError

#: A limit that ends the program. Beyond those on address space, open files and file size, the program only gets an error.
Limit = Literal["seconds", "cpu_seconds", "memory", "disk", "output", "processes"]


@dataclass(frozen=True)
class Result:
    """What a program printed and how it ended.

    exit_code: as in `subprocess`: minus the number of the signal that ended it; None where the caller ended the run, or
    the sandbox itself was ended (by the kernel for memory; in the weakest tier by the program).
    limit: the limit for which the program was ended, or None.
    seconds: wall-clock time, start of the sandbox included.
    cpu_seconds: of the program and the children that it waited for; 0 where there is no exit code.
    peak_memory: largest resident size of one of its processes, or what all held together when the caller looked, in bytes.
    """

    stdout: str
    stderr: str
    exit_code: int | None
    limit: Limit | None
    seconds: float
    cpu_seconds: float
    peak_memory: int

    @property
    def timed_out(self) -> bool:
        """Whether time was up, by the clock or by the processor."""
        return self.limit in ("seconds", "cpu_seconds")

    @property
    def ok(self) -> bool:
        """Whether the program ended by itself with exit code 0."""
        return self.exit_code == 0 and self.limit is None


_START = "import sys; sys.path.insert(0, sys.argv[1]); from launcher.main import main; main()"
_CHUNK = 1 << 16
_SECONDS_BETWEEN_LOOKS = 0.05
#: How long the launcher may take to kill what it started, and open streams may take to end after it.
_SECONDS_TO_END = 2.0
_SECONDS_TO_DRAIN = 0.2


class Execution:
    """One run. group: the control group that counts its resources, or None."""

    def __init__(self, job: Job, limits: Limits, group: ControlGroup | None) -> None:
        self._job = job
        self._limits = limits
        self._group = group
        self._limit: Limit | None = None
        #: Time after which reading stops, whatever is still open.
        self._give_up = math.inf
        self._peak_memory = 0
        self._written: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray(), "status": bytearray()}
        self._unsent: dict[str, memoryview] = {}
        self._selector = selectors.DefaultSelector()

    def run(self, stdin: bytes) -> Result:
        """Run to the end. Raises SandboxError when the program was not started."""
        start = time.monotonic()
        job_read, job_write = os.pipe()
        status_read, status_write = os.pipe()
        with open(job_write, "wb", buffering=0) as job, open(status_read, "rb", buffering=0) as status:  # noqa: PTH123
            try:
                process = self._start(job_read, status_write)
            finally:
                os.close(job_read)
                os.close(status_write)
            with process, self._selector:
                assert process.stdin and process.stdout and process.stderr
                try:
                    if self._group is not None:
                        self._group.add_process(process.pid)
                    self._send("job", job, self._job.to_bytes())
                    self._send("stdin", process.stdin, stdin)
                    for name, stream in {"stdout": process.stdout, "stderr": process.stderr, "status": status}.items():
                        os.set_blocking(stream.fileno(), False)
                        self._selector.register(stream, selectors.EVENT_READ, name)
                    self._watch(process, start)
                finally:
                    self._end(process)
        return self._result(time.monotonic() - start)

    def _start(self, job: int, status: int) -> subprocess.Popen[bytes]:
        folder = str(Path(launcher.__file__).parents[1])
        return subprocess.Popen(
            [base_executable(), "-I", "-S", "-c", _START, folder, str(job), str(status)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            pass_fds=(job, status),
            start_new_session=True,
            env={"LC_ALL": "C.UTF-8"},
            cwd="/",
        )

    def _send(self, name: str, stream: IO[bytes], content: bytes) -> None:
        if not content:
            stream.close()
            return
        os.set_blocking(stream.fileno(), False)
        self._unsent[name] = memoryview(content)
        self._selector.register(stream, selectors.EVENT_WRITE, name)

    def _watch(self, process: subprocess.Popen[bytes], start: float) -> None:
        """Move bytes and look at the limits until the launcher has ended and its streams have."""
        deadline = start + self._limits.seconds
        next_look = start + _SECONDS_BETWEEN_LOOKS
        while self._is_reading() and (now := time.monotonic()) < self._give_up:
            if self._limit is None and now >= deadline:
                self._stop(process, "seconds")
            elif self._limit is None and now >= next_look:
                self._look(process)
                next_look = time.monotonic() + _SECONDS_BETWEEN_LOOKS
            wake_up = self._give_up if self._limit else min(deadline, next_look, self._give_up)
            for key, _ in self._selector.select(max(0.0, wake_up - time.monotonic())):
                self._move(process, key)
            if process.poll() is not None:
                self._give_up = min(self._give_up, time.monotonic() + _SECONDS_TO_DRAIN)

    def _is_reading(self) -> bool:
        return any(key.data in self._written for key in self._selector.get_map().values())

    def _move(self, process: subprocess.Popen[bytes], key: selectors.SelectorKey) -> None:
        name = key.data
        stream = cast(IO[bytes], key.fileobj)
        if name in self._unsent:
            try:
                sent = os.write(stream.fileno(), self._unsent[name][:_CHUNK])
            except BrokenPipeError:
                sent = len(self._unsent[name])
            self._unsent[name] = self._unsent[name][sent:]
            if not self._unsent[name]:
                self._selector.unregister(stream)
                stream.close()
            return
        data = os.read(stream.fileno(), _CHUNK)
        if not data:
            self._selector.unregister(stream)
        elif name == "status":
            self._written[name] += data
        else:
            left = self._limits.output - len(self._written["stdout"]) - len(self._written["stderr"])
            self._written[name] += data[:left]
            if len(data) > left:
                self._stop(process, "output")

    def _look(self, process: subprocess.Popen[bytes]) -> None:
        """End the run when its processes together exceed a limit."""
        pids = processes_below(process.pid)
        if self._job.isolation == "namespaces":
            pids = pids[1:]
        memory = memory_of(pids)
        self._peak_memory = max(self._peak_memory, memory)
        if memory > self._limits.memory:
            self._stop(process, "memory")
        elif threads_of(pids) > self._limits.processes:
            self._stop(process, "processes")
        elif self._job.scratch and folder_bytes(Path(self._job.scratch), self._limits.disk) > self._limits.disk:
            self._stop(process, "disk")

    def _stop(self, process: subprocess.Popen[bytes], limit: Limit) -> None:
        if self._limit is None:
            self._limit = limit
            self._give_up = time.monotonic() + _SECONDS_TO_END
            process.terminate()

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Let the launcher kill all processes, or kill them here if it does not end in time."""
        if process.poll() is None and self._limit is None:
            process.terminate()
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            for pid in [*processes_below(process.pid), process.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def _result(self, seconds: float) -> Result:
        # only the first line counts: after an error the launcher also reports the end
        kind, _, text = self._written["status"].decode(errors="replace").partition("\n")[0].partition(" ")
        if kind == "error":
            raise SandboxError(f"the sandbox ({self._job.isolation}) did not start: {text}")
        exit_code, cpu_seconds, peak = _ending(text) if kind == "exit" else (None, 0.0, 0)
        return Result(
            stdout=self._written["stdout"].decode(errors="replace"),
            stderr=self._written["stderr"].decode(errors="replace"),
            exit_code=exit_code if self._limit is None else None,
            limit=self._limit or self._kernel_limit(exit_code, cpu_seconds),
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            peak_memory=max(peak, self._peak_memory),
        )

    def _kernel_limit(self, exit_code: int | None, cpu_seconds: float) -> Limit | None:
        """The limit for which the kernel ended the program."""
        if self._group is not None and self._group.ran_out_of_memory():
            return "memory"
        killed = exit_code == -signal.SIGKILL and cpu_seconds >= self._job.cpu_seconds
        return "cpu_seconds" if exit_code == -signal.SIGXCPU or killed else None


def _ending(text: str) -> tuple[int | None, float, int]:
    """Exit code, CPU seconds, peak in bytes of a status line."""
    code, seconds, peak = text.split()
    unit = 1 if os.uname().sysname == "Darwin" else 1024
    return int(code), float(seconds), int(peak) * unit


#: Where systems keep shared libraries, the loader's list of them, and time zones.
_SYSTEM = tuple(
    Path(path)
    for path in (
        "/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib", "/nix/store",
        "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo",
    )
)  # fmt: skip
#: Python's own parts of its prefix, which may hold more than Python: `/usr`, `~/.local`.
_BELOW_PREFIX = ("bin", "lib", "lib64", "share/zoneinfo", "pyvenv.cfg")
#: Prefixes whose libraries are in the folders above, and whose programs are the system's.
_SYSTEM_PREFIXES = (Path("/"), Path("/usr"), Path("/usr/local"))


@dataclass(frozen=True)
class Interpreter:
    """A Python: its executable, whether it leaves out all packages, and the absolute paths that it reads."""

    executable: str
    bare: bool
    readable: tuple[str, ...]


def base_executable() -> str:
    """The Python that a virtual environment was made from, or this one."""
    # typeshed does not know it
    return str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())


def interpreter(*, packages: bool, readable: Iterable[Path] = ()) -> Interpreter:
    """The Python that runs programs, with the paths that it needs and those in `readable`.

    packages: whether programs may import what is installed in this environment; else they have the standard library alone.
    """
    base = base_executable()
    places = [Path(base), *_SYSTEM, *readable]
    prefixes = [Path(sys.base_prefix).resolve()]
    if packages:
        prefixes.append(Path(sys.prefix))
        places.append(Path(sys.executable))
    places += [prefix / name for prefix in prefixes if prefix not in _SYSTEM_PREFIXES for name in _BELOW_PREFIX]
    existing = {place.absolute() for place in places if place.exists()}
    kept = [place for place in existing if place.is_symlink() or not existing & set(place.parents)]
    return Interpreter(sys.executable if packages else base, not packages, tuple(sorted(map(str, kept))))


def closed_to_others(paths: Iterable[str]) -> bool:
    """Whether a folder above one of the paths lets only its owner pass."""
    folders = {parent for path in paths for parent in Path(path).parents}
    return any(not folder.stat().st_mode & stat.S_IXOTH for folder in folders if folder.exists())
