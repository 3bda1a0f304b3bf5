"""System calls that Python does not offer, through ctypes. Linux, x86-64 and AArch64."""

from __future__ import annotations

import ctypes
import errno
import os

_LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2

MACHINE = os.uname().machine
#: System calls by machine; those above 423 have one number everywhere.
_NUMBERS = {
    "x86_64": {"capset": 126, "pivot_root": 155, "unshare": 272},
    "aarch64": {"capset": 91, "pivot_root": 41, "unshare": 97},
}
_COMMON = {
    "mount_setattr": 442,
    "landlock_create_ruleset": 444,
    "landlock_add_rule": 445,
    "landlock_restrict_self": 446,
}


def syscall(name: str, *arguments: int | bytes | None) -> int:
    """The result of a system call. Raises OSError with the call's name."""
    number = _NUMBERS.get(MACHINE, {}).get(name) or _COMMON.get(name)
    if number is None:
        raise OSError(errno.ENOSYS, f"{name}: not known on {MACHINE}")
    return _checked(name, _LIBC.syscall(ctypes.c_long(number), *map(_as_argument, arguments)))


def prctl(option: int, *arguments: int | bytes) -> int:
    """`prctl(2)`; arguments that are left out are 0. Raises OSError."""
    padded = [*arguments, *[0] * (4 - len(arguments))]
    return _checked(f"prctl {option}", _LIBC.prctl(option, *map(_as_argument, padded)))


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """`mount(2)`. Raises OSError that names the target."""
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    _checked(f"mount {target}", _LIBC.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3]))


def unmount(target: str, flags: int) -> None:
    """`umount2(2)`. Raises OSError."""
    _checked(f"umount {target}", _LIBC.umount2(os.fsencode(target), flags))


def _as_argument(value: int | bytes | None) -> object:
    return ctypes.c_long(value) if isinstance(value, int) else value


def _checked(what: str, result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result
