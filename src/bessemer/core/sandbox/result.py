"""What a run came back with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: A limit for which a program is ended. Address space, open files and single files have none: the program gets an error.
Limit = Literal["seconds", "cpu_seconds", "memory", "disk", "output", "processes"]


@dataclass(frozen=True)
class Result:
    """What a program printed and how it ended.

    exit_code: as in `subprocess`: minus the number of the signal that ended it; None where the caller ended the run, or
    the sandbox itself was ended (by the kernel for memory; in the weakest tier by the program).
    limit: the limit for which the program was ended, or None.
    seconds: wall-clock time, start of the sandbox included.
    cpu_seconds: of the program and the children that it waited for; 0 where there is no exit code.
    peak_memory: largest resident size of one of its processes, or what all held together when the caller looked, in bytes.
    """

    stdout: str
    stderr: str
    exit_code: int | None
    limit: Limit | None
    seconds: float
    cpu_seconds: float
    peak_memory: int

    @property
    def timed_out(self) -> bool:
        """Whether time was up, by the clock or by the processor."""
        return self.limit in ("seconds", "cpu_seconds")

    @property
    def ok(self) -> bool:
        """Whether the program ended by itself with exit code 0."""
        return self.exit_code == 0 and self.limit is None
