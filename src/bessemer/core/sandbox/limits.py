"""What one run may use."""

from __future__ import annotations

from dataclasses import dataclass, fields

from bessemer.core.errors import ConfigError


@dataclass(frozen=True)
class Limits:
    """Limits of a run, each kept by the kernel or by the caller. Raises ConfigError when one is not positive.

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
