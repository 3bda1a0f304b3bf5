"""What a run uses altogether, looked at from outside: memory and number of its processes, size of its scratch folder."""

from __future__ import annotations

import os
from pathlib import Path

from bessemer.core.sandbox.launcher.processes import descendants

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
#: More entries than this in a scratch folder count as a full disk, and so do paths that the system finds too long.
MAX_ENTRIES = 16_384


def processes_below(launcher: int) -> list[int]:
    """The program's processes: what the launcher started, without itself; the first process of a namespace counts."""
    return descendants(launcher)


def memory_of(pids: list[int]) -> int:
    """Bytes that the processes hold in memory and do not share with files. Processes that have ended count nothing."""
    total = 0
    for pid in pids:
        try:
            resident, shared = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1:3]
        except (OSError, ValueError):
            continue
        total += max(0, int(resident) - int(shared)) * _PAGE
    return total


def threads_of(pids: list[int]) -> int:
    """Threads of the processes, each of which has at least one."""
    total = 0
    for pid in pids:
        try:
            total += len(os.listdir(f"/proc/{pid}/task"))  # noqa: PTH208
        except OSError:
            continue
    return total


def folder_bytes(folder: Path, most: int) -> int:
    """Bytes that files below `folder` occupy; counting ends above `most`. Links are not followed.

    A folder that cannot be counted, for its number of entries or the length of its paths, is more than `most`.
    """
    total = entries = 0
    waiting = [os.fspath(folder)]
    while waiting and total <= most:
        try:
            with os.scandir(waiting.pop()) as found:
                for entry in found:
                    entries += 1
                    if entries > MAX_ENTRIES:
                        return most + 1
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        total += entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError as error:
            if not isinstance(error, (FileNotFoundError, PermissionError)):
                return most + 1
    return total
