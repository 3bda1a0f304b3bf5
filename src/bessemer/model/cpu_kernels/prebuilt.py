"""Kernels that were compiled elsewhere: the distribution `bessemer-kernels`, one shared library for each tier of processors.

An installed one is loaded when it was built from the sources that lie here, and has a tier whose instructions this processor
has. The build of the distribution (`kernels/build_hook.py`) loads this file by its path, where this package is not installed:
it imports the standard library alone.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import platform
import re
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

#: The distribution, and the module that it installs.
DISTRIBUTION, MODULE = "bessemer-kernels", "bessemer_kernels"
#: Options of every compilation. -ffp-contract=off: a multiplication and an addition are fused only where the source says so. No
#: -ffast-math: the order of a sum is a promise.
OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=off")


@dataclass(frozen=True)
class Tier:
    """Processors that one library is for.

    machine: their kind, as `machine()` names it. flags: the compiler's. needs: the instructions that the flags admit, as
    `torch.cpu.get_capabilities` names them. arithmetics: the values of BESSEMER_ARITHMETIC for which the library may be chosen.
    """

    name: str
    machine: str
    flags: tuple[str, ...]
    needs: frozenset[str]
    arithmetics: frozenset[str] = frozenset({"native"})


_V2 = frozenset({"sse3", "ssse3", "sse4_1", "sse4_2", "popcnt"})
_V3 = _V2 | {"avx", "avx2", "bmi", "bmi2", "f16c", "fma3", "lzcnt"}
_V4 = _V3 | {"avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl"}

#: The best first. On ARM the sources choose by the instructions that the flags admit. -mtune=znver4 admits no others: by GCC's
#: generic tuning a token by K types takes a tenth longer on Zen 4 (docs/negative-results.md).
TIERS = (
    Tier("avx512", "x86_64", ("-march=x86-64-v4", "-mavx512vnni", "-mtune=znver4"), _V4 | {"avx512_vnni"}),
    Tier("avx_vnni", "x86_64", ("-march=x86-64-v3", "-mavxvnni"), _V3 | {"avx_vnni"}),
    Tier("avx2", "x86_64", ("-march=x86-64-v3",), _V3, frozenset({"native", "avx2"})),
    Tier("portable", "x86_64", ("-march=x86-64-v2", "-DBESSEMER_PORTABLE"), _V2, frozenset({"native", "portable"})),
    Tier("neon_i8mm", "aarch64", ("-march=armv8.2-a+dotprod+i8mm",), frozenset({"neon", "dot", "i8mm"})),
    Tier("neon_dotprod", "aarch64", ("-march=armv8.2-a+dotprod",), frozenset({"neon", "dot"})),
    Tier("neon", "aarch64", ("-march=armv8-a",), frozenset({"neon"}), frozenset({"native", "neon"})),
    Tier("portable", "aarch64", ("-march=armv8-a", "-DBESSEMER_PORTABLE"), frozenset(), frozenset({"portable"})),
)


def machine() -> str:
    """This machine's kind, by one name on every system: `x86_64`, `aarch64`, or what the system says."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def tiers(machine: str) -> list[Tier]:
    """The tiers of a kind of machine, the best first; none for a kind without a library."""
    return [tier for tier in TIERS if tier.machine == machine]


def sources(folder: Path) -> list[Path]:
    """The C++ files and headers of a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h"))


def sources_hash(folder: Path) -> str:
    """By what a library and the sources know each other: the hash of the files' names and texts, and of `OPTIONS`; 32 digits.

    Line endings do not count, which a checkout on Windows may change.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in (*OPTIONS, *(text for path in sources(folder) for text in (path.name, path.read_text(encoding="utf-8")))):
        content = part.encode()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


_INTERFACE = re.compile(r'extern "C" (?:\{(?P<block>.*?)^\}|(?P<line>[^{;]*))', re.DOTALL | re.MULTILINE)


def interface(folder: Path) -> list[str]:
    """Names of the plain C functions that the sources declare, by name: Windows exports what is listed."""
    found = set()
    for path in sources(folder):
        for match in _INTERFACE.finditer(path.read_text(encoding="utf-8")):
            text = re.sub(r"//.*", "", match["block"] or match["line"])
            found |= set(re.findall(r"\b(bessemer_\w+)\(", text))
    return sorted(found)


@dataclass(frozen=True)
class Prebuilt:
    """An installed distribution. sources: as `sources_hash` gives it. libraries: paths by the name of their tier."""

    version: str
    sources: str
    libraries: dict[str, Path]

    def __str__(self) -> str:
        return f"{DISTRIBUTION} {self.version}"


class PrebuiltError(Exception):
    """Why an installed distribution cannot be used, in one line."""


def installed() -> Prebuilt | None:
    """The installed distribution, or None. Raises PrebuiltError for one that is damaged."""
    try:
        module = importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        if error.name == MODULE:
            return None
        raise PrebuiltError(f"the installed {DISTRIBUTION} is damaged: {error}") from error
    except Exception as error:
        raise PrebuiltError(f"the installed {DISTRIBUTION} is damaged: {error}") from error
    try:
        found = Prebuilt(
            str(module.VERSION), str(module.SOURCES), {name: Path(path) for name, path in module.LIBRARIES.items()}
        )
    except (AttributeError, TypeError) as error:
        raise PrebuiltError(f"the installed {DISTRIBUTION} is damaged: {error}") from error
    missing = [path.name for path in found.libraries.values() if not path.is_file()]
    if missing:
        raise PrebuiltError(f"the installed {found} is damaged: {missing[0]} is not there")
    return found


def choose(found: Prebuilt, folder: Path, arithmetic: str, features: Set[str], kind: str | None = None) -> tuple[Tier, Path]:
    """The tier of an installed distribution for this processor, and its library.

    folder: of the sources. arithmetic: as of `build`. features: the processor's, as in `Tier.needs`. kind: as of `machine`;
    None: this machine's. Raises PrebuiltError where none fits.
    """
    if found.sources != sources_hash(folder):
        raise PrebuiltError(f"the installed {found} was built from other sources and is not used")
    for tier in tiers(kind or machine()):
        if tier.name in found.libraries and arithmetic in tier.arithmetics and tier.needs <= features:
            return tier, found.libraries[tier.name]
    wanted = "of this processor" if arithmetic == "native" else f"of the arithmetic {arithmetic!r}"
    raise PrebuiltError(f"the installed {found} has no library {wanted} ({kind or machine()})")


def features() -> set[str]:
    """Instructions that the processor and the system have, as PyTorch asks the processor for them."""
    import torch

    return {name for name, has in torch.cpu.get_capabilities().items() if has is True}


def advice() -> str | None:
    """The command that installs the distribution for this version of the package; None where there is none for this machine.

    From a folder of a release's wheels, never from the package index, where the name is not ours.
    """
    if not tiers(machine()):
        return None
    try:
        wanted = f"{DISTRIBUTION}=={importlib.metadata.version('bessemer')}"
    except importlib.metadata.PackageNotFoundError:
        # a checkout that is not installed
        wanted = DISTRIBUTION
    return f"pip install --no-index --find-links FOLDER {wanted}, FOLDER with the release's wheels"
