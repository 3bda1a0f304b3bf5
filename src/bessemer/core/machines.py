"""Emulation of other machines: an older processor, fewer cores, a busy core, a container's quota.

    python -m bessemer.core.machines avx2 make test

runs a command as on that machine. `make run MACHINE=avx2` and the benchmarks use it, tests check that each machine is as
described, and `docs/machines.md` and `bessemer doctor` use the same names.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bessemer.core.config import nearest
from bessemer.core.errors import BessemerError, ConfigError

#: Environment variable with the name of the emulated machine. Only records of measurements read it.
MACHINE_VARIABLE = "BESSEMER_MACHINE"


@dataclass(frozen=True)
class Machine:
    """A machine that this one can emulate.

    environment: variables that libraries read when they are loaded. cores: the command may use as many; None: all. busy: as
    many of the cores are kept busy by other processes. quota: processor time of a container, in cores.
    """

    description: str
    environment: Mapping[str, str] = field(default_factory=dict)
    cores: int | None = None
    busy: int = 0
    quota: float | None = None


#: Every library has its own variable: PyTorch's kernels, its compiler, oneDNN, MKL, OpenBLAS and numpy, Numba, our kernels.
_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "TORCHINDUCTOR_CPP_MARCH": "x86-64-v3",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
    "NUMBA_CPU_NAME": "haswell",
    "BESSEMER_ARITHMETIC": "avx2",
}

MACHINES: Mapping[str, Machine] = {
    "native": Machine("this machine as it is"),
    "avx2": Machine("an x86-64 processor with AVX2 and no AVX-512: no fast products in bfloat16", _AVX2),
    "no-compiler": Machine("no C++ compiler", {"CXX": "/bin/false", "CC": "/bin/false"}),
    "one-core": Machine("one core", cores=1),
    "busy-core": Machine("one of the cores taken by somebody else's work", busy=1),
    "half-core": Machine("a container whose quota is half of one core", quota=0.5),
    "avx2-one-core": Machine("AVX2, one core", _AVX2, cores=1),
    "avx2-busy-core": Machine("AVX2, one of the cores taken by somebody else's work", _AVX2, busy=1),
}


def machine(name: str) -> Machine:
    """The machine of a name. Raises ConfigError for an unknown name."""
    if name not in MACHINES:
        raise ConfigError(f"there is no machine {name!r}{nearest(name, list(MACHINES))}")
    return MACHINES[name]


def run_as(name: str, command: Sequence[str]) -> int:
    """Run a command as on the machine of a name, its output passed through; its exit status.

    Raises ConfigError for an unknown machine, or one that this system cannot emulate.
    """
    wanted = machine(name)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not cores and (wanted.cores or wanted.busy):
        raise ConfigError(f"{name}: this system does not hold processes to cores")
    if wanted.busy >= max(len(cores), 1) and wanted.busy:
        raise ConfigError(f"{name}: it takes a core away, and this process may use {len(cores)}")
    environment = os.environ | dict(wanted.environment) | {MACHINE_VARIABLE: name}
    with ExitStack() as stack:
        for core in cores[len(cores) - wanted.busy :] if wanted.busy else ():
            stack.enter_context(_busy(core))
        group = None if wanted.quota is None else stack.enter_context(_group(wanted.quota))

        def begin() -> None:
            if wanted.cores is not None:
                os.sched_setaffinity(0, cores[: wanted.cores])
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()), encoding="utf-8")

        process = subprocess.Popen(command, env=environment, preexec_fn=begin)
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                # the command gets Ctrl-C too; wait until it has ended
                continue


@contextmanager
def _busy(core: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that keeps one core busy. It has a session of its own, so that the scheduler gives both equal time."""
    loop = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", loop, str(core)], start_new_session=True)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@contextmanager
def _group(quota: float) -> Iterator[Path]:
    """A control group with a quota of processor time. Raises ConfigError where this user cannot make one."""
    period = 100_000
    root = Path("/sys/fs/cgroup")
    try:
        if (root / "cgroup.controllers").exists():
            group = root / f"bessemer-{os.getpid()}"
            group.mkdir()
            (group / "cpu.max").write_text(f"{round(quota * period)} {period}", encoding="utf-8")
        else:
            group = root / "cpu" / f"bessemer-{os.getpid()}"
            group.mkdir()
            (group / "cpu.cfs_period_us").write_text(str(period), encoding="utf-8")
            (group / "cpu.cfs_quota_us").write_text(str(round(quota * period)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"a quota of processor time needs a control group, which cannot be made here: {error}") from error
    try:
        yield group
    finally:
        try:
            group.rmdir()
        except OSError:
            # a process that the command left behind is still in it
            pass


def _main(arguments: Sequence[str]) -> int:
    if len(arguments) < 2:
        print("usage: python -m bessemer.core.machines MACHINE COMMAND ...", file=sys.stderr)
        for name, known in MACHINES.items():
            print(f"  {name:<16} {known.description}", file=sys.stderr)
        return 2
    try:
        return run_as(arguments[0], arguments[1:])
    except BessemerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1:]))
