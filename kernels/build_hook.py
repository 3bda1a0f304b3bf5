"""Build of `bessemer-kernels`: compiles the kernels once for each tier of this kind of machine, by the compiler that CXX names.

The sources and the tiers are the package's own: in a checkout they lie in ../src, in a source distribution in sources/.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_HERE = Path(__file__).parent
_PACKAGE = "bessemer_kernels"
_WINDOWS = sys.platform == "win32"
_SUFFIX = ".dll" if _WINDOWS else ".so"


def sources_folder(root: Path) -> Path:
    """Where the C++ lies, in a checkout or a source distribution."""
    packed = root / "sources"
    return packed if packed.is_dir() else root.parent / "src" / "bessemer" / "model" / "cpu_kernels"


def load_tiers(folder: Path) -> ModuleType:
    """The module `prebuilt.py` beside the sources."""
    spec = importlib.util.spec_from_file_location("bessemer_prebuilt", folder / "prebuilt.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # its data classes look themselves up there
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def object_command(compiler: str, source: Path, made: Path, options: tuple[str, ...], torch: Path) -> list[str]:
    """The command that compiles one file. options: as GCC and Clang name them; clang-cl is given them as Clang's."""
    headers = [torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include"]
    if _WINDOWS:
        given = ["/nologo", "/c", "/EHsc", "/MD", "/O2", *(f"/clang:{option}" for option in options)]
        return [compiler, *given, *(f"/I{folder}" for folder in headers), str(source), f"/Fo{made}"]
    return [
        compiler,
        *options,
        "-fPIC",
        "-pthread",
        "-c",
        *(f"-isystem{folder}" for folder in headers),
        str(source),
        "-o",
        str(made),
    ]


def link_command(compiler: str, objects: list[Path], made: Path, torch: Path, exported: list[str]) -> list[str]:
    """The command that links one library. It names PyTorch's library without a path: the installed one is loaded already."""
    files = [str(path) for path in objects]
    if _WINDOWS:
        exports = [f"/EXPORT:{name}" for name in exported]
        return [compiler, "/nologo", "/LD", *files, f"/Fe{made}", "/link", str(torch / "lib" / "torch_cpu.lib"), *exports]
    return [compiler, "-shared", "-pthread", *files, f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", str(made)]


def compile_tiers(folder: Path, into: Path) -> dict[str, Any]:
    """Compile the sources of a folder for every tier of this kind of machine; what `build.json` says, but for the version.

    Raises RuntimeError with the compiler's words.
    """
    prebuilt = load_tiers(folder)
    tiers = prebuilt.tiers(prebuilt.machine())
    if not tiers:
        raise RuntimeError(f"there are no kernels for {prebuilt.machine()}")
    # PyTorch is not imported: its folder is enough
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise RuntimeError("PyTorch is not installed, whose headers the kernels are compiled with")
    torch = Path(found.origin).parent
    compiler = os.environ.get("CXX") or ("clang-cl" if _WINDOWS else "c++")
    units = [path for path in prebuilt.sources(folder) if path.suffix == ".cpp"]
    into.mkdir(parents=True, exist_ok=True)
    libraries = {}
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(os.cpu_count()) as pool:
        for tier in tiers:
            objects = [Path(work) / f"{tier.name}-{unit.stem}.o" for unit in units]
            options = (*prebuilt.OPTIONS, *tier.flags)
            commands = [object_command(compiler, unit, made, options, torch) for unit, made in zip(units, objects, strict=True)]
            list(pool.map(_run, commands))
            library = into / f"kernels-{tier.name}{_SUFFIX}"
            _run(link_command(compiler, objects, library, torch, prebuilt.interface(folder)))
            libraries[tier.name] = library.name
    for leftover in (*into.glob("kernels-*.lib"), *into.glob("kernels-*.exp")):
        leftover.unlink()
    return {
        "sources": prebuilt.sources_hash(folder),
        "machine": prebuilt.machine(),
        "compiler": subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, check=True, encoding="utf-8"
        ).stdout.splitlines()[0],
        "torch": importlib.metadata.version("torch"),
        "libraries": libraries,
    }


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8")
    except OSError as error:
        raise RuntimeError(f"no C++ compiler: {command[0]!r} does not run") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


class KernelsBuildHook(BuildHookInterface):
    """Adds the libraries and `build.json` to a wheel, and the sources to a source distribution."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        folder = sources_folder(root)
        licence = next(path for path in (root / "LICENSE", root.parent / "LICENSE") if path.is_file())
        if self.target_name == "sdist":
            files = [*load_tiers(folder).sources(folder), folder / "prebuilt.py"]
            build_data["force_include"] |= {str(path): f"sources/{path.name}" for path in files} | {str(licence): "LICENSE"}
            return
        if version == "editable":
            raise RuntimeError("bessemer-kernels has no editable installation: a checkout compiles its kernels itself")
        self._made = tempfile.TemporaryDirectory()
        made = Path(self._made.name)
        about = {"version": self.metadata.version} | compile_tiers(folder, made)
        (made / "build.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        inside = {str(path): f"{_PACKAGE}/{path.name}" for path in sorted(made.iterdir())}
        build_data["force_include"] |= inside | {str(licence): f"{_PACKAGE}/LICENSE"} | _licence_of_headers()
        # any Python's, this platform's
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        if hasattr(self, "_made"):
            self._made.cleanup()


def _platform() -> str:
    """The platform's tag. A Mac's is that of the oldest system that the libraries run on."""
    name = sysconfig.get_platform()
    oldest = os.environ.get("MACOSX_DEPLOYMENT_TARGET")
    if sys.platform == "darwin" and oldest:
        name = f"macosx-{oldest}-{name.rpartition('-')[2]}"
    return name.replace("-", "_").replace(".", "_")


def _licence_of_headers() -> dict[str, str]:
    """PyTorch's licence, whose headers are compiled in."""
    files = importlib.metadata.files("torch") or []
    found = [path for path in files if path.name == "LICENSE" and ".dist-info" in str(path.parts[0])]
    return {str(found[0].locate()): f"{_PACKAGE}/LICENSE-pytorch"} if found else {}
