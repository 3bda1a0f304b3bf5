"""Confinement of a forked process before it becomes the program: user, limits, rights, Landlock, seccomp."""

from __future__ import annotations

import _signal as signal  # without the enumerations of `signal`, which take 5 ms
import errno
import os
import resource
import struct
import sys

from .job import Job, threads_of_user

# imported before the root changes: afterwards these files cannot be read
if sys.platform == "linux":
    from .linux import (
        LEAST_ABI,
        PR_CAP_AMBIENT,
        PR_CAP_AMBIENT_RAISE,
        PR_SET_KEEPCAPS,
        PR_SET_NO_NEW_PRIVS,
        PR_SET_PDEATHSIG,
        install_filter,
        landlock_abi,
        prctl,
        restrict_files,
        scopes_signals,
        syscall,
    )

_PATH = "/usr/local/bin:/usr/bin:/bin"
_ENVIRONMENT = {"LANG": "C.UTF-8", "USER": "sandbox", "LOGNAME": "sandbox"}

_CAP_DAC_READ_SEARCH = 2
_CAPABILITY_VERSION_3 = 0x20080522
#: Bytes of a thread's stack, which count as address space.
_STACK = 8 << 20


def become_program(job: Job, scratch: str, helpers: int) -> None:
    """Confine this process and execute the program. Never returns; raises OSError.

    helpers: processes of the same user that are the sandbox's own.
    """
    os.setsid()
    if job.spare_uid and os.geteuid() == 0:
        drop_user(job.spare_uid, keep_traversing=job.traverse)
    work = f"{scratch}/work"
    python_folder = _make_bare_environment(job.python, scratch) if job.bare else os.path.dirname(job.python)
    os.chdir(work)
    _write_files(job.files)
    _set_limits(job, helpers)
    if sys.platform == "linux":
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        if job.isolation != "rlimits":
            _restrict(job, scratch)
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    environment = {**_ENVIRONMENT, "PATH": f"{python_folder}:{_PATH}", "HOME": work, "TMPDIR": f"{scratch}/tmp"}
    # the status pipe closes itself on success; nothing else is open
    program, refusal = job.argv[0], OSError(errno.ENOENT, "there is no such program")
    for path in [program] if "/" in program else [f"{folder}/{program}" for folder in environment["PATH"].split(":")]:
        try:
            os.execve(path, job.argv, environment)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError as error:
            refusal = error
    raise OSError(refusal.errno, f"{program} cannot be run in it: {refusal.strerror}")


def drop_user(user: int, *, keep_traversing: bool = False) -> None:
    """Become a user without groups or capabilities. keep_traversing: keep the capability to pass through closed folders."""
    if keep_traversing:
        prctl(PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    if keep_traversing:
        set_capabilities(1 << _CAP_DAC_READ_SEARCH)
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, _CAP_DAC_READ_SEARCH)


def set_capabilities(mask: int) -> None:
    """Keep those capabilities (bits below 32), permitted, effective and inheritable, and no other."""
    syscall("capset", struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), struct.pack("=6I", mask, mask, mask, 0, 0, 0))


def _make_bare_environment(python: str, scratch: str) -> str:
    """The folder of a `python` that has the standard library alone, as `venv` makes one: no package starts with it."""
    folder = f"{scratch}/bin"
    os.mkdir(folder)
    os.symlink(python, f"{folder}/python")
    with open(f"{scratch}/pyvenv.cfg", "w", encoding="utf-8") as file:
        file.write(f"home = {os.path.dirname(python)}\ninclude-system-site-packages = false\n")
    return folder


def _write_files(files: dict[str, bytes]) -> None:
    for name, content in files.items():
        folder = os.path.dirname(name)
        if folder:
            os.makedirs(folder, exist_ok=True)
        with open(name, "wb") as file:
            file.write(content)


def _set_limits(job: Job, helpers: int) -> None:
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_CPU, job.cpu_seconds, job.cpu_seconds + 1)
    _lower(resource.RLIMIT_FSIZE, job.disk)
    _lower(resource.RLIMIT_NOFILE, job.open_files)
    _lower(resource.RLIMIT_STACK, _STACK)
    if sys.platform == "linux":
        _lower(resource.RLIMIT_AS, job.memory)
        _lower(resource.RLIMIT_MEMLOCK, 0)
        _lower(resource.RLIMIT_MSGQUEUE, 0)
        # counted per user: a spare user, or a user namespace, starts at 0; else the user's other threads count too
        own = job.spare_uid or job.isolation == "namespaces"
        _lower(resource.RLIMIT_NPROC, job.processes + (helpers if own else threads_of_user(os.getuid())))


def _lower(kind: int, soft: int, hard: int | None = None) -> None:
    """Set a limit, never above the one that holds."""
    ceiling = resource.getrlimit(kind)[1]
    hard = soft if hard is None else hard
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(kind, (soft, hard))


def _restrict(job: Job, scratch: str) -> None:
    version = landlock_abi()
    if job.isolation == "landlock" and version < LEAST_ABI:
        raise OSError(
            errno.ENOSYS, f"Landlock is at version {version}, and {LEAST_ABI} is needed" if version else "no Landlock"
        )
    confined = job.isolation != "seccomp" and version >= LEAST_ABI
    if confined:
        restrict_files(job.readable, scratch)
    apart = job.isolation == "namespaces" or bool(job.spare_uid) or (confined and scopes_signals())
    install_filter(refuse_signals=not apart, ignore_metadata=job.isolation != "namespaces")
