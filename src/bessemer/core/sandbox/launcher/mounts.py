"""A root of its own: a tmpfs with the readable folders bound read-only at their places, four devices, and a scratch tmpfs."""

from __future__ import annotations

import os
import struct

from .landlock import DEVICES
from .libc import mount, syscall, unmount

SCRATCH = "/sandbox"

_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DETACH = 2
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
#: A place to mount the new root on until it is the root.
_BASES = ("/tmp", "/var/tmp", "/mnt")
_OLD = "/old"
_BYTES_PER_INODE = 4096


def enter_new_root(readable: list[str], disk: int, owner: int) -> None:
    """Make the root and leave the old one. disk: bytes in scratch. owner: the user of scratch.

    Needs a mount namespace of its own and the right to mount in it; Linux 5.12. Raises OSError.
    """
    base = next(path for path in _BASES if os.path.isdir(path))
    mount(None, "/", None, _REC | _PRIVATE)
    mount("tmpfs", base, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    os.mkdir(base + _OLD)
    syscall("pivot_root", os.fsencode(base), os.fsencode(base + _OLD))
    os.chdir("/")
    for path in readable:
        _bind(path, _RDONLY | _NOSUID | _NODEV)
    for path in DEVICES:
        _bind(path, _NOSUID)
    _make_scratch(disk, owner)
    unmount(_OLD, _DETACH)
    os.rmdir(_OLD)
    mount(None, "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)


def _bind(path: str, attributes: int) -> None:
    """Show a file or folder of the old root at its place, or the same symbolic link. Nothing where there is none."""
    source = _OLD + path
    if not os.path.lexists(source):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), path)
        return
    if os.path.isdir(source):
        os.makedirs(path, exist_ok=True)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_RDONLY, 0o644))
    mount(source, path, None, _BIND | _REC)
    # struct mount_attr: set, clear, propagation, user namespace
    what = struct.pack("=4Q", attributes, 0, 0, 0)
    syscall("mount_setattr", _AT_FDCWD, os.fsencode(path), _AT_RECURSIVE, what, len(what))


def _make_scratch(disk: int, owner: int) -> None:
    os.mkdir(SCRATCH)
    inodes = max(256, disk // _BYTES_PER_INODE)
    mount("tmpfs", SCRATCH, "tmpfs", _NOSUID | _NODEV, f"size={disk},nr_inodes={inodes},mode=700")
    for name in ("work", "tmp", "shm"):
        os.mkdir(f"{SCRATCH}/{name}")
        os.chown(f"{SCRATCH}/{name}", owner, owner)
    os.chown(SCRATCH, owner, owner)
    if not os.path.lexists("/tmp"):  # a readable folder may lie below it
        os.symlink(f"{SCRATCH}/tmp", "/tmp")
    os.symlink(f"{SCRATCH}/shm", "/dev/shm")
