"""A control group (cgroup v2) for one run: all its memory and processes together, counted by the kernel.

One is made where an ancestor of the caller's own group, or that group itself, hands on both controllers and can be written to:
under systemd as root or in a user's own session, in a container with such a folder. Version 1 is not used.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

_CONTROLLERS = {"memory", "pids"}
_SECONDS_TO_EMPTY = 1.0


def parent_group(root: Path, own: str) -> Path | None:
    """The nearest group to make groups in. root: where cgroup v2 is mounted. own: the `0::` line of /proc/self/cgroup."""
    group = root / own.lstrip("/")
    for folder in (group, *group.parents):
        if folder == root.parent:
            return None
        try:
            enabled = set((folder / "cgroup.subtree_control").read_text().split())
        except OSError:
            continue
        if enabled >= _CONTROLLERS and os.access(folder, os.W_OK) and os.access(folder / "cgroup.procs", os.W_OK):
            return folder
    return None


def own_parent_group() -> Path | None:
    """The group to make groups in on this machine, or None."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
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
            events = dict(line.split() for line in (self.folder / "memory.events").read_text().splitlines())
        except OSError:
            return False
        return int(events.get("oom_kill", 0)) > 0

    def remove(self) -> None:
        """End what is left in the group, and the group."""
        kill = self.folder / "cgroup.kill"
        if kill.exists():
            kill.write_text("1")
        deadline = time.monotonic() + _SECONDS_TO_EMPTY
        while time.monotonic() < deadline:
            try:
                self.folder.rmdir()
            except OSError:
                time.sleep(0.01)
            else:
                return

    def _write(self, name: str, value: int) -> None:
        (self.folder / name).write_text(str(value))
