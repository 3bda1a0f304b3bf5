"""The launcher's job, which it reads from a pipe, and the job's processes.

Trees of processes are read from /proc; all of them end with the job.
"""

from __future__ import annotations

import _signal as signal  # without the enumerations of `signal`, which take 5 ms
import marshal
import os
import time


class Job:
    """One program, its files and its limits.

    isolation: the tier's name.
    argv: the program and its arguments; `python` is the one below.
    python: the interpreter. bare: give it an environment without packages, in the scratch folder.
    files: name below the working folder → content.
    readable: absolute paths that the program may read and execute.
    scratch: folder of the host that it may write; empty where a tmpfs is made for it.
    spare_uid: the user to become; 0 keeps the caller's.
    traverse: keep the right to pass through folders that are closed to that user (Landlock alone decides then).
    caller: process id of the caller, with which the program ends.
    cpu_seconds, memory, disk: limits, the latter two in bytes. open_files, processes: limits in numbers.
    """

    def __init__(
        self,
        *,
        isolation: str,
        argv: list[str],
        python: str,
        bare: bool,
        files: dict[str, bytes],
        readable: list[str],
        scratch: str,
        spare_uid: int,
        traverse: bool,
        caller: int,
        cpu_seconds: int,
        memory: int,
        disk: int,
        open_files: int,
        processes: int,
    ) -> None:
        self.isolation = isolation
        self.argv = argv
        self.python = python
        self.bare = bare
        self.files = files
        self.readable = readable
        self.scratch = scratch
        self.spare_uid = spare_uid
        self.traverse = traverse
        self.caller = caller
        self.cpu_seconds = cpu_seconds
        self.memory = memory
        self.disk = disk
        self.open_files = open_files
        self.processes = processes

    def to_bytes(self) -> bytes:
        """For the same interpreter at the other end of a pipe."""
        return marshal.dumps(vars(self))

    @classmethod
    def from_bytes(cls, data: bytes) -> Job:
        """The inverse of `to_bytes`. Not for bytes from elsewhere."""
        return cls(**marshal.loads(data))


def children(pid: int) -> list[int]:
    """Direct children of a process; none where the system does not say."""
    pids: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", encoding="utf-8") as file:
                pids += map(int, file.read().split())
    except OSError:
        pass
    return pids


def descendants(pid: int) -> list[int]:
    """All processes below one, parents first."""
    pids = children(pid)
    for below in pids:
        pids += children(below)
    return pids


def threads_of_user(user: int) -> int:
    """How many threads a user has that /proc shows: what RLIMIT_NPROC counts."""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                if os.stat(f"/proc/{name}").st_uid == user:
                    count += len(os.listdir(f"/proc/{name}/task"))
            except OSError:
                continue
    return count


def end_descendants(spare_uid: int) -> None:
    """Kill all processes below this one. spare_uid: a user that has no other processes, or 0.

    Orphans become children of this process, their subreaper. With a spare user all are killed at once. Otherwise the tree is
    killed again and again, until no process that was forked meanwhile is left.
    """
    while True:
        if spare_uid:
            _kill_all_of(spare_uid)
        for pid in descendants(os.getpid()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _kill_all_of(user: int) -> None:
    assistant = os.fork()
    if assistant == 0:
        try:
            os.setuid(user)
            os.kill(-1, signal.SIGKILL)
        finally:
            os._exit(0)
    os.waitpid(assistant, 0)


def wait_for(pid: int) -> tuple[int, float, int]:
    """Reap orphans until `pid` ends. Its exit code (minus the signal), CPU seconds, peak resident size as ru_maxrss."""
    while True:
        ended, status, usage = os.wait4(-1, 0)
        if ended == pid:
            return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss
