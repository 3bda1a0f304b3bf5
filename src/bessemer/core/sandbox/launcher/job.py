"""What the launcher is asked to do, as it travels through a pipe."""

from __future__ import annotations

import marshal


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
