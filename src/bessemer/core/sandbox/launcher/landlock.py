"""Landlock: the files that a process may reach, TCP, signals and abstract sockets (kernel's userspace-api/landlock).

The kernel's ABI says what it knows: 1 files, 2 renames between folders, 3 truncation, 4 TCP, 5 ioctl on devices, 6 signals and
abstract Unix sockets. UDP is not among them; seccomp refuses sockets.
"""

from __future__ import annotations

import os
import struct

from .libc import syscall

#: The first ABI that keeps a file from being truncated through a descriptor for reading.
LEAST_ABI = 3
_ABI_OF_TCP, _ABI_OF_IOCTL, _ABI_OF_SCOPES = 4, 5, 6

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_BLOCK, _TRUNCATE, _IOCTL_DEV = 1 << 6, 1 << 11, 1 << 14, 1 << 15
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_TCP_BIND_AND_CONNECT = 0b11
_SIGNALS_AND_ABSTRACT_SOCKETS = 0b11
_VERSION_FLAG = 1
_PATH_BENEATH = 1

DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def abi() -> int:
    """The version of Landlock here; 0 where there is none."""
    try:
        return syscall("landlock_create_ruleset", None, 0, _VERSION_FLAG)
    except OSError:
        return 0


def scopes_signals() -> bool:
    """Whether a confined process can signal nobody outside its domain."""
    return abi() >= _ABI_OF_SCOPES


def restrict(readable: list[str], writable: str) -> None:
    """Confine this process for good: read and execute below `readable`, everything but devices below `writable`.

    Needs no_new_privs. Raises OSError.
    """
    version = abi()
    rights = (1 << (16 if version >= _ABI_OF_IOCTL else 15)) - 1
    network = _TCP_BIND_AND_CONNECT if version >= _ABI_OF_TCP else 0
    scopes = _SIGNALS_AND_ABSTRACT_SOCKETS if version >= _ABI_OF_SCOPES else 0
    fields = 3 if scopes else 2 if network else 1
    attributes = struct.pack(f"={fields}Q", *(rights, network, scopes)[:fields])
    ruleset = syscall("landlock_create_ruleset", attributes, len(attributes), 0)
    for path in readable:
        _allow(ruleset, path, rights & (_EXECUTE | _READ_FILE | _READ_DIR))
    for path in DEVICES:
        _allow(ruleset, path, rights & (_READ_FILE | _WRITE_FILE | _TRUNCATE))
    _allow(ruleset, writable, rights & ~(_MAKE_CHAR | _MAKE_BLOCK | _IOCTL_DEV))
    syscall("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    if not os.path.isdir(path):
        rights &= _FILE_RIGHTS
    syscall("landlock_add_rule", ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, place), 0)
    os.close(place)
