"""Which Python runs in the sandbox, and the files that it needs."""

from __future__ import annotations

import stat
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

#: Where systems keep shared libraries, the loader's list of them, and time zones.
_SYSTEM = tuple(
    Path(path)
    for path in (
        "/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib", "/nix/store",
        "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo",
    )
)  # fmt: skip
#: What Python has below its prefix, which may hold more than Python: `/usr`, `~/.local`.
_BELOW_PREFIX = ("bin", "lib", "lib64", "share/zoneinfo", "pyvenv.cfg")
#: Prefixes whose libraries are in the folders above, and whose programs are the system's.
_SYSTEM_PREFIXES = (Path("/"), Path("/usr"), Path("/usr/local"))


@dataclass(frozen=True)
class Interpreter:
    """A Python: its executable, whether it leaves out all packages, and the absolute paths that it reads."""

    executable: str
    bare: bool
    readable: tuple[str, ...]


def base_executable() -> str:
    """The Python that a virtual environment was made from, or this one."""
    # typeshed does not know it
    return str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())


def interpreter(*, packages: bool, readable: Iterable[Path] = ()) -> Interpreter:
    """The Python to run programs with, with `readable` beside what it needs.

    packages: whether programs may import what is installed in this environment; else they have the standard library alone.
    """
    base = base_executable()
    places = [Path(base), *_SYSTEM, *readable]
    prefixes = [Path(sys.base_prefix).resolve()]
    if packages:
        prefixes.append(Path(sys.prefix))
        places.append(Path(sys.executable))
    places += [prefix / name for prefix in prefixes if prefix not in _SYSTEM_PREFIXES for name in _BELOW_PREFIX]
    existing = {place.absolute() for place in places if place.exists()}
    kept = [place for place in existing if place.is_symlink() or not existing & set(place.parents)]
    return Interpreter(sys.executable if packages else base, not packages, tuple(sorted(map(str, kept))))


def closed_to_others(paths: Iterable[str]) -> bool:
    """Whether a folder above one of the paths lets only its owner pass."""
    folders = {parent for path in paths for parent in Path(path).parents}
    return any(not folder.stat().st_mode & stat.S_IXOTH for folder in folders if folder.exists())
