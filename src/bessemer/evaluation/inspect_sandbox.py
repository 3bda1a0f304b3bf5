"""A sandbox of Inspect's evaluations: each command runs confined as `core/sandbox` does it, on the files of its sample.

A run of the sandbox begins in an empty folder and leaves nothing, so a sample's files are a tar archive that goes into each run
and comes back changed. It is never unpacked outside. Processes end with their command: nothing runs in the background.
"""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal, overload

import anyio.to_thread
from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxEnvironment,
    SandboxEnvironmentLimits,
    SandboxUserUnsupportedError,
    sandboxenv,
)
from pydantic import BaseModel, Field

from bessemer.core.sandbox.resources import Limits
from bessemer.core.sandbox.sandbox import Sandbox

_MIB = 1 << 20
#: Folders with the system's programs, where they exist.
_SYSTEM = ("/bin", "/usr", "/lib", "/lib64")
#: Seconds beside those of the command: the start of Python, and packing the files.
_OWN_SECONDS = 20

#: Runs in the sandbox: unpacks the files, runs the command, and prints what came of both as JSON.
_RUNNER = """
import base64, io, json, os, subprocess, sys, tarfile

job = json.load(open("job.json"))
home = os.path.join(os.getcwd(), "files")
os.mkdir(home)
with tarfile.open("files.tar") as archive:
    archive.extractall(home, **({"filter": "fully_trusted"} if hasattr(tarfile, "fully_trusted_filter") else {}))
where = os.path.join(home, job["cwd"])
os.makedirs(where, exist_ok=True)
path = os.pathsep.join([os.path.dirname(sys.executable), "/usr/local/bin", "/usr/bin", "/bin"])
environment = {"PATH": path, "HOME": home, "TMPDIR": os.environ.get("TMPDIR", "/tmp"), "LC_ALL": "C.UTF-8", **job["env"]}
result = {"timed_out": False}
try:
    given = base64.b64decode(job["input"])
    done = subprocess.run(
        job["cmd"], input=given, capture_output=True, cwd=where, env=environment, timeout=job["timeout"]
    )
    code, out, err = done.returncode, done.stdout, done.stderr
except subprocess.TimeoutExpired:
    code, out, err = 124, b"", b""
    result["timed_out"] = True
except OSError as error:
    code, out, err = 126 if isinstance(error, PermissionError) else 127, b"", f"{job['cmd'][0]}: {error.strerror}".encode()
# what may not be read is packed all the same, and stays so
modes = {}
for folder, folders, names in os.walk(home):
    for name in (*folders, *names):
        path = os.path.join(folder, name)
        mode = os.lstat(path).st_mode & 0o7777
        if not os.path.islink(path) and mode & 0o500 != 0o500:
            modes[os.path.relpath(path, home)] = mode
            os.chmod(path, mode | 0o700)


def with_mode(member):
    member.mode = modes.get(os.path.normpath(member.name), member.mode)
    return member


packed = io.BytesIO()
with tarfile.open(fileobj=packed, mode="w") as archive:
    archive.add(home, arcname=".", filter=with_mode)
result |= {"code": code, "files": base64.b64encode(packed.getvalue()).decode()}
for name, text in (("out", out), ("err", err)):
    result[name] = base64.b64encode(text[: job["output"] + 1]).decode()
print(json.dumps(result))
"""


class SandboxSettings(BaseModel, frozen=True):
    """Limits of each command. minimum: the weakest tier of `core/sandbox` that is accepted. readable: folders that programs may
    read, and whose programs they may run, besides the system's."""

    seconds: float = Field(default=60.0, gt=0, description="longest time of a command that names none")
    memory: int = Field(default=1024, gt=0, description="MiB of all processes together")
    disk: int = Field(default=256, gt=0, description="MiB of files")
    processes: int = Field(default=64, gt=0)
    minimum: str = "landlock"
    readable: tuple[str, ...] = ()


@sandboxenv(name="bessemer")
class BessemerSandbox(SandboxEnvironment):
    """The files of one sample, and commands on them."""

    def __init__(self, settings: SandboxSettings | None = None) -> None:
        """Raises SandboxError where no tier from `minimum` up works on this machine."""
        super().__init__()
        self._settings = settings or SandboxSettings()
        self._files = _packed([])
        system = [Path(folder) for folder in _SYSTEM if Path(folder).exists()]
        self._sandbox = Sandbox(minimum=self._settings.minimum, readable=[*system, *map(Path, self._settings.readable)])
        self._turn = anyio.Lock()

    @classmethod
    async def sample_init(cls, task_name: str, config: Any, metadata: dict[str, str]) -> dict[str, SandboxEnvironment]:
        """A sandbox for a sample. Raises as the constructor."""
        settings = config if isinstance(config, SandboxSettings) else None
        return {"default": await anyio.to_thread.run_sync(cls, settings)}

    @classmethod
    async def sample_cleanup(
        cls, task_name: str, config: Any, environments: dict[str, SandboxEnvironment], interrupted: bool
    ) -> None:
        """Nothing is left of a sample outside this process."""

    @classmethod
    def config_deserialize(cls, config: dict[str, Any]) -> BaseModel:
        """Settings as a log has them."""
        return SandboxSettings.model_validate(config)

    async def exec(
        self,
        cmd: list[str],
        input: str | bytes | None = None,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        user: str | None = None,
        timeout: int | None = None,
        timeout_retry: bool = True,
        concurrency: bool = True,
    ) -> ExecResult[str]:
        """Run a command. Raises as Inspect's interface says; a command ended by another limit fails, with the limit on its
        stderr and its changes to files lost."""
        if user is not None:
            raise SandboxUserUnsupportedError(f"this sandbox has one user, and cannot run a command as {user!r}")
        most_output = SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE
        seconds = float(timeout or self._settings.seconds)
        given = input.encode() if isinstance(input, str) else input or b""
        job = {
            "cmd": cmd,
            "input": base64.b64encode(given).decode(),
            "cwd": "." if cwd is None else _inside(cwd),
            "env": env or {},
            "timeout": seconds,
            "output": most_output,
        }
        limits = Limits(
            seconds=seconds + _OWN_SECONDS,
            cpu_seconds=seconds + _OWN_SECONDS,
            memory=self._settings.memory * _MIB,
            # the files as they came, as they are, and packed
            disk=3 * self._settings.disk * _MIB,
            output=4 * self._settings.disk * _MIB + 4 * most_output,
            processes=self._settings.processes,
            open_files=1024,
        )
        async with self._turn:
            files: dict[str, str | bytes] = {"job.json": json.dumps(job), "files.tar": self._files}
            result = await anyio.to_thread.run_sync(lambda: self._sandbox.run(_RUNNER, files=files, limits=limits))
            if result.limit in ("seconds", "cpu_seconds"):
                raise TimeoutError(f"the command took more than {seconds:g} s")
            if not result.ok:
                why = f"the limit on {result.limit}" if result.limit else result.stderr.strip().splitlines()[-1:] or "no reason"
                return ExecResult(False, 1 if result.exit_code in (None, 0) else result.exit_code, "", f"sandbox: {why}")
            # a program may put its own words here: they are of its own files and its own result
            try:
                told = json.loads(result.stdout.strip().splitlines()[-1])
                out, err = (base64.b64decode(told[name]).decode(errors="replace") for name in ("out", "err"))
                self._keep(base64.b64decode(told["files"]))
            except (ValueError, LookupError, TypeError, tarfile.TarError) as error:
                return ExecResult(False, 1, "", f"sandbox: what came of the command cannot be read: {error}")
        if told["timed_out"]:
            raise TimeoutError(f"the command took more than {seconds:g} s")
        if told["code"] == 126:
            raise PermissionError(err)
        if max(len(out), len(err)) > most_output:
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE_STR, out[:most_output])
        return ExecResult(told["code"] == 0, told["code"], out, err)

    async def write_file(self, file: str, contents: str | bytes) -> None:
        """Write a file below the sample's folder. Raises PermissionError for one outside it, IsADirectoryError for a folder."""
        name = _inside(file)
        async with self._turn:
            with _opened(self._files) as archive:
                if (there := _member(archive, name)) is not None and there.isdir():
                    raise IsADirectoryError(file)
                others = [
                    (member, _content(archive, member))
                    for member in archive.getmembers()
                    if _named(member) != PurePosixPath(name)
                ]
            header = tarfile.TarInfo(name)
            content = contents.encode() if isinstance(contents, str) else contents
            header.size, header.mode = len(content), 0o644
            self._keep(_packed([*others, (header, content)]))

    @overload
    async def read_file(self, file: str, text: Literal[True] = True) -> str: ...

    @overload
    async def read_file(self, file: str, text: Literal[False]) -> bytes: ...

    async def read_file(self, file: str, text: bool = True) -> str | bytes:
        """A file's content. Raises FileNotFoundError, IsADirectoryError, PermissionError for one outside the folder and for a
        link, OutputLimitExceededError for a large one, and UnicodeDecodeError."""
        name = _inside(file)
        async with self._turn:
            with _opened(self._files) as archive:
                member = _member(archive, name)
                if member is None:
                    raise FileNotFoundError(file)
                if member.isdir():
                    raise IsADirectoryError(file)
                if not member.isreg():
                    raise PermissionError(f"{file}: a link, or no file")
                if member.size > SandboxEnvironmentLimits.MAX_READ_FILE_SIZE:
                    raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR, None)
                content = _content(archive, member) or b""
        return content.decode() if text else content

    def _keep(self, files: bytes) -> None:
        """Raises RuntimeError for more than the sample may have, TarError for what is no archive."""
        with _opened(files) as archive:
            # a sparse file is larger than the archive
            size = sum(member.size for member in archive.getmembers())
        if max(size, len(files) - _MIB) > self._settings.disk * _MIB:
            raise RuntimeError(f"the files of this sample take more than {self._settings.disk} MiB")
        self._files = files


def _inside(name: str) -> str:
    """A path below the sample's folder. Raises PermissionError for another."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise PermissionError(f"{name}: only files below the sample's folder, named without '..', can be reached")
    return str(path)


def _opened(files: bytes) -> tarfile.TarFile:
    return tarfile.open(fileobj=io.BytesIO(files))


def _named(member: tarfile.TarInfo) -> PurePosixPath:
    return PurePosixPath(member.name)


def _member(archive: tarfile.TarFile, name: str) -> tarfile.TarInfo | None:
    """The last entry of a name."""
    found = [member for member in archive.getmembers() if _named(member) == PurePosixPath(name)]
    return found[-1] if found else None


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    """The bytes of a regular file; None for anything else, links included."""
    stream = archive.extractfile(member) if member.isreg() else None
    return None if stream is None else stream.read()


def _packed(entries: Iterable[tuple[tarfile.TarInfo, bytes | None]]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for header, content in entries:
            archive.addfile(header, None if content is None else io.BytesIO(content))
    return packed.getvalue()
