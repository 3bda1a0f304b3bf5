"""The launcher: starts the program confined, waits, kills its remaining processes, reports.

With namespaces this process starts the first process of a PID namespace, which starts the program; when the first process ends,
the kernel kills all others. Without, this process is the subreaper of the program's orphans and kills its descendants itself.

The status pipe carries one line: `exit CODE CPU_SECONDS PEAK` or `error WHAT`.
"""

from __future__ import annotations

import _signal as signal  # without the enumerations of `signal`, which take 5 ms
import os
import sys

from .confine import become_program, drop_user
from .job import Job, end_descendants, wait_for

if sys.platform == "linux":
    from .confine import set_capabilities
    from .linux import (
        PR_SET_CHILD_SUBREAPER,
        PR_SET_DUMPABLE,
        PR_SET_PDEATHSIG,
        SCRATCH,
        enter_new_root,
        prctl,
        syscall,
    )

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_INNER_USER = 1000


class Stopped(BaseException):
    """The caller wants the program ended."""


def main() -> None:
    """`launcher JOB_DESCRIPTOR STATUS_DESCRIPTOR`."""
    signal.signal(signal.SIGTERM, _stop)
    job_pipe, status = int(sys.argv[2]), int(sys.argv[3])
    os.set_inheritable(status, False)
    with open(job_pipe, "rb") as file:
        job = Job.from_bytes(file.read())
    try:
        if job.isolation == "namespaces":
            _run_in_namespaces(job, status)
        else:
            _run_below(job, status)
    except Stopped:
        pass
    except Exception as error:
        _report_error(status, error)


def _stop(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped


def _report(status: int, line: str) -> None:
    os.write(status, line.encode() + b"\n")


def _report_error(status: int, error: Exception) -> None:
    text = repr(error)
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    _report(status, f"error {text}")


def _run_below(job: Job, status: int) -> None:
    """Start the program as a child, and end all its descendants."""
    if sys.platform == "linux":
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        _end_with_caller(job.caller)
    spare_uid = job.spare_uid
    if spare_uid:
        os.chown(job.scratch, spare_uid, spare_uid)
        for name in ("work", "tmp"):
            os.chown(f"{job.scratch}/{name}", spare_uid, spare_uid)
    program = 0
    try:
        program = _fork(job, job.scratch, status, 0)
        _close_streams()
        ending = wait_for(program)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end_program(program, spare_uid)
    _report(status, "exit {} {} {}".format(*ending))


def _end_program(program: int, spare_uid: int) -> None:
    if sys.platform == "linux":
        end_descendants(spare_uid)
        return
    if program:
        try:
            os.killpg(program, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def _run_in_namespaces(job: Job, status: int) -> None:
    """Start the first process of new namespaces, and wait for it."""
    _end_with_caller(job.caller)
    outer = _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS
    owner = job.spare_uid
    if os.geteuid() == 0:
        try:
            syscall("unshare", outer)
        except PermissionError:
            drop_user(job.spare_uid)
    if os.geteuid() != 0:
        owner = _INNER_USER
        _enter_user_namespace(outer)
        _end_with_caller(job.caller)
    _hold_signals(True)
    first = os.fork()
    if first == 0:
        _be_first_process(job, status, owner)
    _close_streams()
    try:
        _hold_signals(False)
        os.waitpid(first, 0)
    except Stopped:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)


def _enter_user_namespace(others: int) -> None:
    user, group = os.geteuid(), os.getegid()
    prctl(PR_SET_DUMPABLE, 1)
    syscall("unshare", _CLONE_NEWUSER | others)
    for name, text in {
        "setgroups": "deny",
        "uid_map": f"{_INNER_USER} {user} 1",
        "gid_map": f"{_INNER_USER} {group} 1",
    }.items():
        with open(f"/proc/self/{name}", "w", encoding="utf-8") as file:
            file.write(text)


def _be_first_process(job: Job, status: int, owner: int) -> None:
    """The PID namespace's init: make the root, give up all rights, start the program, reap, report. Never returns."""
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        _hold_signals(False)
        syscall("unshare", _CLONE_NEWNS)
        enter_new_root(job.readable, job.disk, owner)
        in_user_namespace = os.geteuid() != 0
        if in_user_namespace:
            set_capabilities(0)
        else:
            drop_user(job.spare_uid)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        program = _fork(job, SCRATCH, status, 2 if in_user_namespace else 1)
        _close_streams()
        _report(status, "exit {} {} {}".format(*wait_for(program)))
    except Exception as error:
        _report_error(status, error)
    finally:
        os._exit(0)


def _fork(job: Job, scratch: str, status: int, helpers: int) -> int:
    """The process id of the program."""
    _hold_signals(True)
    program = os.fork()
    if program:
        _hold_signals(False)
        return program
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _hold_signals(False)
        become_program(job, scratch, helpers)
    except Exception as error:
        _report_error(status, error)
    finally:
        os._exit(126)


def _end_with_caller(caller: int) -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != caller:
        raise Stopped


def _hold_signals(hold: bool) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK if hold else signal.SIG_UNBLOCK, [signal.SIGTERM])


def _close_streams() -> None:
    """Close the program's streams in this process, so that they end when the program does."""
    for stream in (0, 1, 2):
        os.close(stream)
