"""`Sandbox`: runs untrusted code in the strongest tier that this machine offers.

Below the strongest tier, a run has a scratch folder of the host, which is removed afterwards.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path, PurePosixPath

from bessemer.core.environment import usable_cores
from bessemer.core.errors import ConfigError
from bessemer.core.sandbox.execution import Execution, Interpreter, Result, closed_to_others, interpreter
from bessemer.core.sandbox.launcher.job import Job
from bessemer.core.sandbox.resources import ControlGroup, Limits, own_parent_group
from bessemer.core.sandbox.tiers import Gap, SandboxError, Tier, gaps

#: The file that holds the code of a run.
CODE_FILE = "main.py"
#: First user ids that no account has: with a full map of ids, and with a small one (a container's), below systemd's own.
_SPARE_USERS, _SPARE_USERS_OF_SMALL_MAPS, _SMALL_MAP = 1_900_000_000, 20_000, 40_000
#: Processes and memory of the sandbox itself: the launcher and the first process of a namespace.
_OWN_PROCESSES, _OWN_MEMORY = 3, 64 << 20


@dataclass(frozen=True)
class Program:
    """Something to run: Python `code`, or `argv`; its stdin; files that lie in its working folder."""

    code: str | Sequence[str]
    stdin: str | bytes = ""
    files: Mapping[str, str | bytes] = field(default_factory=dict)


class Sandbox:
    """Runs programs confined by the strongest tier from `maximum` down that this machine offers, determined by trial.

    limits: of each run, unless it says otherwise.
    minimum: the weakest tier to accept. maximum: the strongest to try.
    packages: whether programs may import this environment's packages.
    readable: further files and folders that programs may read and execute, besides the Python installation.
    Raises SandboxError when no tier from `minimum` up works here, with the reason of each; ConfigError for an unknown tier.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        minimum: Tier | str = Tier.LANDLOCK,
        maximum: Tier | str = Tier.NAMESPACES,
        packages: bool = False,
        readable: Iterable[Path | str] = (),
    ) -> None:
        self.limits = limits or Limits()
        self._interpreter = interpreter(packages=packages, readable=map(Path, readable))
        self.tier = _choose(Tier.parse(minimum), Tier.parse(maximum), self._interpreter)

    @property
    def gaps(self) -> list[Gap]:
        """Known gaps of this tier on this machine."""
        return gaps(self.tier, own_user=_user() != 0, macos=sys.platform == "darwin")

    def run(
        self,
        code: str | Sequence[str],
        stdin: str | bytes = "",
        files: Mapping[str, str | bytes] | None = None,
        limits: Limits | None = None,
    ) -> Result:
        """Run Python code, or a program with its arguments, in an empty folder that only `files` are in.

        files: name below the folder → content. Raises ConfigError for a name outside the folder or that of the code, and
        SandboxError when the program cannot be started.
        """
        program = Program(code, stdin, files or {})
        return _run(self.tier, self._interpreter, program, limits or self.limits)

    def run_many(self, programs: Iterable[Program], limits: Limits | None = None, workers: int | None = None) -> list[Result]:
        """Run programs, `workers` at a time (default: the cores of this machine); results in the order of the programs."""
        run = partial(_run, self.tier, self._interpreter, limits=limits or self.limits)
        with ThreadPoolExecutor(workers or usable_cores()) as pool:
            return list(pool.map(run, programs))


def strongest_tier() -> tuple[Tier | None, dict[Tier, str]]:
    """The strongest tier that works here, None when none does, and why each stronger one does not."""
    reasons: dict[Tier, str] = {}
    for tier in Tier.NAMESPACES.and_weaker():
        reason = _why_not(tier, interpreter(packages=False))
        if reason is None:
            return tier, reasons
        reasons[tier] = reason
    return None, reasons


def _choose(minimum: Tier, maximum: Tier, python: Interpreter) -> Tier:
    reasons = []
    for tier in maximum.and_weaker():
        if not tier.at_least(minimum):
            break
        reason = _why_not(tier, python)
        if reason is None:
            return tier
        reasons.append(f"{tier}: {reason}")
    if not reasons:
        raise ConfigError(f"the sandbox's maximum tier {maximum.value} is below its minimum {minimum.value}")
    raise SandboxError(f"no sandbox of tier {minimum.value} or stronger works here ({'; '.join(reasons)}); code is not run")


@cache
def _why_not(tier: Tier, python: Interpreter) -> str | None:
    """Why a tier does not work on this machine, tried with an empty program; None when it works."""
    if sys.platform == "win32":
        return "not on Windows"
    if sys.platform != "linux" and tier is not Tier.RLIMITS:
        return "only on Linux"
    try:
        done = _run(tier, python, Program("pass"), Limits())
    except SandboxError as error:
        return str(error).rpartition(": did not start: ")[2].removeprefix(f"the sandbox ({tier.value}) ")
    return None if done.ok else done.stderr.strip().rpartition("\n")[2] or f"Python did not start in it ({done})"


def _run(tier: Tier, python: Interpreter, program: Program, limits: Limits) -> Result:
    files = {_safe_name(name): _as_bytes(content) for name, content in program.files.items()}
    if isinstance(program.code, str):
        if CODE_FILE in files:
            raise ConfigError(f"sandbox: {CODE_FILE} is the code itself, and cannot be a file beside it")
        files[CODE_FILE] = program.code.encode()
        argv = ["python", "-B", "-s", CODE_FILE]
    else:
        argv = list(program.code)
    with ExitStack() as stack:
        scratch = "" if tier is Tier.NAMESPACES else str(stack.enter_context(scratch_folder()))
        spare_uid = 0 if _user() else _spare_user()
        job = Job(
            isolation=tier.value,
            argv=argv,
            python=python.executable,
            bare=python.bare,
            files=files,
            readable=list(python.readable),
            scratch=scratch,
            spare_uid=spare_uid,
            traverse=bool(spare_uid) and tier is Tier.LANDLOCK and closed_to_others([*python.readable, scratch]),
            caller=os.getpid(),
            cpu_seconds=math.ceil(limits.cpu_seconds),
            memory=limits.memory,
            disk=limits.disk,
            open_files=limits.open_files,
            processes=limits.processes,
        )
        group = _control_group(limits)
        if group is not None:
            stack.callback(group.remove)
        return Execution(job, limits, group).run(_as_bytes(program.stdin))


def _control_group(limits: Limits) -> ControlGroup | None:
    parent = own_parent_group()
    if parent is None:
        return None
    name = f"bessemer-sandbox-{os.getpid()}-{random.SystemRandom().getrandbits(32):08x}"
    memory = limits.memory + limits.disk + _OWN_MEMORY
    try:
        return ControlGroup(parent, name, memory=memory, processes=limits.processes + _OWN_PROCESSES)
    except OSError:
        return None


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else -1


def _spare_user() -> int:
    """A user id that nothing else runs as, drawn anew for each run."""
    draw = random.SystemRandom().randrange
    try:
        length = max(int(line.split()[2]) for line in Path("/proc/self/uid_map").read_text(encoding="utf-8").splitlines())
    except (OSError, ValueError):
        length = _SMALL_MAP
    if length > _SPARE_USERS + (1 << 24):
        return _SPARE_USERS + draw(1 << 24)
    return _SPARE_USERS_OF_SMALL_MAPS + draw(_SMALL_MAP)


def _safe_name(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.name or "\0" in name:
        raise ConfigError(f"sandbox: file name {name!r} does not lie below the working folder")
    return str(path)


def _as_bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder with `work` and `tmp` in it."""
    folder = Path(tempfile.mkdtemp(prefix="bessemer-sandbox-")).resolve()
    try:
        for name in ("work", "tmp"):
            (folder / name).mkdir()
        yield folder
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a tree; by `rm` when folders in it are closed, or it is too deep for Python's recursion."""
    try:
        shutil.rmtree(folder)
        return
    except (OSError, RecursionError):
        pass
    environment = {"PATH": os.defpath, "LC_ALL": "C"}
    for command in (["rm", "-rf", "--"], ["chmod", "-R", "u+rwX", "--"], ["rm", "-rf", "--"]):
        done = subprocess.run([*command, str(folder)], env=environment, stderr=subprocess.DEVNULL, check=False)
        if done.returncode == 0 and command[0] == "rm":
            return
