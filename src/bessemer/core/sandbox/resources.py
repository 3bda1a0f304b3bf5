"""Resources of a run: its limits, the control group in which the kernel counts them, and usage read from /proc.

A control group (cgroup v2) is created if the caller's own group, or one above it, delegates the controllers of memory and
processes and is writable: under systemd as root or in a user's session, or in a container set up for it. Version 1 is not used.
Without a group the caller measures memory and threads of all processes of the run. It always measures the scratch folder.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, fields
from pathlib import Path

from bessemer.core.errors import ConfigError
from bessemer.core.sandbox.launcher.job import descendants


@dataclass(frozen=True)
class Limits:
    """Limits of a run, each enforced by the kernel or by the caller. Raises ConfigError when one is not positive.

    seconds: wall-clock time.
    cpu_seconds: processor time of one process, rounded up to whole seconds.
    memory: bytes of address space of one process, and of memory of all together.
    disk: bytes in the scratch folder, and of one file.
    output: bytes of stdout and stderr together; more ends the program.
    processes: processes and threads at once.
    open_files: descriptors of one process.
    """

    seconds: float = 10.0
    cpu_seconds: float = 10.0
    memory: int = 1 << 30
    disk: int = 64 << 20
    output: int = 1 << 20
    processes: int = 32
    open_files: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ConfigError(f"limits: {field.name} is {getattr(self, field.name)}, and must be above 0")


_CONTROLLERS = {"memory", "pids"}
_SECONDS_TO_EMPTY = 1.0


def parent_group(root: Path, own: str) -> Path | None:
    """The nearest group to make groups in. root: where cgroup v2 is mounted. own: the `0::` line of /proc/self/cgroup."""
    group = root / own.lstrip("/")
    for folder in (group, *group.parents):
        if folder == root.parent:
            return None
        try:
            enabled = set((folder / "cgroup.subtree_control").read_text(encoding="utf-8").split())
        except OSError:
            continue
        if enabled >= _CONTROLLERS and os.access(folder, os.W_OK) and os.access(folder / "cgroup.procs", os.W_OK):
            return folder
    return None


def own_parent_group() -> Path | None:
    """The group to make groups in on this machine, or None."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    own = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
    return None if own is None else parent_group(Path("/sys/fs/cgroup"), own)


class ControlGroup:
    """A new group below `parent`. memory: bytes. processes: processes and threads. Raises OSError when it cannot be made."""

    def __init__(self, parent: Path, name: str, *, memory: int, processes: int) -> None:
        self.folder = parent / name
        self.folder.mkdir()
        self._write("memory.max", memory)
        self._write("pids.max", processes)
        if (self.folder / "memory.swap.max").exists():
            self._write("memory.swap.max", 0)

    def add_process(self, pid: int) -> None:
        """Put a process, and so all that it starts, into the group."""
        self._write("cgroup.procs", pid)

    def ran_out_of_memory(self) -> bool:
        """Whether the kernel has ended a process of the group for its memory."""
        try:
            events = dict(line.split() for line in (self.folder / "memory.events").read_text(encoding="utf-8").splitlines())
        except OSError:
            return False
        return int(events.get("oom_kill", 0)) > 0

    def remove(self) -> None:
        """Kill the processes that are left in the group, and remove the group."""
        kill = self.folder / "cgroup.kill"
        if kill.exists():
            kill.write_text("1", encoding="utf-8")
        deadline = time.monotonic() + _SECONDS_TO_EMPTY
        while time.monotonic() < deadline:
            try:
                self.folder.rmdir()
            except OSError:
                time.sleep(0.01)
            else:
                return

    def _write(self, name: str, value: int) -> None:
        (self.folder / name).write_text(str(value), encoding="utf-8")


_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
#: More entries than this in a scratch folder count as exceeding the disk limit, and so do paths that are too long.
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
            with os.scandir(waiting.pop()) as entries_here:
                for entry in entries_here:
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
