"""The distribution `bessemer-kernels`: what is loaded, what is not, and what is said of it."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from ruamel.yaml import YAML

import bessemer
from bessemer.core.environment import cxx_compiler
from bessemer.core.version import of_checkout
from bessemer.model import cpu_kernels as builds
from bessemer.model.cpu_kernels import prebuilt
from bessemer.model.cpu_kernels.packed import PackedMatrix
from tests.model.test_cpu_kernels import LAYERS, rows

ROOT = Path(__file__).parents[2]
FOLDER = Path(builds.__file__).parent
V2, V3, V4, VNNI = prebuilt._V2, prebuilt._V3, prebuilt._V4, prebuilt._V4 | {"avx512_vnni"}


def distribution(sources=None, tiers=tuple(tier.name for tier in prebuilt.TIERS)):
    libraries = dict.fromkeys(tiers, FOLDER / "parts.h")
    return prebuilt.Prebuilt("1.2", sources or prebuilt.sources_hash(FOLDER), libraries)


@pytest.mark.parametrize(
    ("kind", "features", "arithmetic", "tier"),
    [
        ("x86_64", VNNI | {"amx_int8"}, "native", "avx512"),
        ("x86_64", V4, "native", "avx2"),
        ("x86_64", V3, "native", "avx2"),
        ("x86_64", V3 | {"avx_vnni"}, "native", "avx_vnni"),
        ("x86_64", V3 - {"fma3"}, "native", "portable"),
        ("x86_64", VNNI, "avx2", "avx2"),
        ("x86_64", VNNI, "portable", "portable"),
        ("aarch64", {"neon", "dot", "i8mm", "sve"}, "native", "neon_i8mm"),
        ("aarch64", {"neon", "dot"}, "native", "neon_dotprod"),
        ("aarch64", {"neon"}, "native", "neon"),
        ("aarch64", {"neon", "dot"}, "portable", "portable"),
    ],
)
def test_the_best_library_whose_instructions_the_processor_has_is_chosen(kind, features, arithmetic, tier):
    assert prebuilt.choose(distribution(), FOLDER, arithmetic, features, kind)[0].name == tier


@pytest.mark.parametrize(
    ("kind", "features", "arithmetic", "line"),
    [
        ("x86_64", V2 - {"popcnt"}, "native", "no library of this processor"),
        ("x86_64", V2, "avx2", "no library of the arithmetic 'avx2'"),
        ("riscv64", set(), "native", "no library of this processor"),
        ("aarch64", {"neon"}, "avx2", "no library of the arithmetic 'avx2'"),
    ],
)
def test_where_no_library_fits_a_line_says_so(kind, features, arithmetic, line):
    with pytest.raises(prebuilt.PrebuiltError, match=line):
        prebuilt.choose(distribution(), FOLDER, arithmetic, features, kind)


def test_the_hash_of_the_sources_is_that_of_their_text(tmp_path, monkeypatch):
    for path in prebuilt.sources(FOLDER):
        shutil.copy(path, tmp_path)
    before = prebuilt.sources_hash(FOLDER)
    changed = tmp_path / "parts.cpp"
    # as a checkout on Windows has it
    changed.write_bytes(changed.read_bytes().replace(b"\n", b"\r\n"))
    assert prebuilt.sources_hash(tmp_path) == before
    changed.write_bytes(changed.read_bytes() + b"//")
    assert prebuilt.sources_hash(tmp_path) != before
    monkeypatch.setattr(prebuilt, "OPTIONS", (*prebuilt.OPTIONS, "-ffast-math"))
    assert prebuilt.sources_hash(FOLDER) != before


def test_windows_exports_every_function_that_is_called():
    class Recorder:
        def __getattr__(self, name):
            self.__dict__[name] = found = type("Function", (), {})()
            return found

    recorder = Recorder()
    builds._declare(recorder)
    assert set(vars(recorder)) <= set(prebuilt.interface(FOLDER))
    # what `_declare` does not name
    assert {"bessemer_multiply", "bessemer_paged_attention"} <= set(prebuilt.interface(FOLDER))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No library is known, none was ever compiled, there is no compiler; afterwards all is as it was."""
    before = builds.library()
    monkeypatch.setenv("CXX", "no-such-compiler")
    # the library of this processor, whatever the suite is held to
    monkeypatch.delenv("BESSEMER_ARITHMETIC", raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.delitem(sys.modules, prebuilt.MODULE, raising=False)
    builds._outcome.cache_clear()
    yield
    sys.modules.pop(prebuilt.MODULE, None)
    builds._outcome.cache_clear()
    if before is not None:
        builds.compute_by(before)


def install(monkeypatch, folder, sources, libraries):
    """A distribution in a folder, as pip installs it."""
    package = folder / "site" / prebuilt.MODULE
    package.mkdir(parents=True)
    shutil.copy(ROOT / "kernels" / "src" / prebuilt.MODULE / "__init__.py", package)
    names = {name: Path(path).name for name, path in libraries.items()}
    for path in libraries.values():
        if Path(path).is_file():
            shutil.copy(path, package)
    about = {"version": "1.2", "sources": sources, "libraries": names}
    (package / "build.json").write_text(json.dumps(about), encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder / "site"))


@pytest.fixture
def compiled():
    """The path of the library that was compiled for this processor."""
    if builds.library() is None:
        pytest.skip(builds.unavailable())
    return Path(builds.library()._name)


#: A tier of this machine that this processor has, so that a library of this processor stands for it.
HERE = next((tier for tier in prebuilt.tiers(prebuilt.machine()) if tier.needs <= prebuilt.features()), None)


def test_an_installed_library_of_these_sources_computes_without_a_compiler(compiled, monkeypatch, tmp_path, fresh):
    install(monkeypatch, tmp_path, prebuilt.sources_hash(FOLDER), {HERE.name: compiled})
    assert builds.expected_origin() == (True, f"of the installed bessemer-kernels 1.2, for {HERE.name}")
    assert builds.library() is not None and builds.unavailable() is None
    assert builds.origin() == f"kernels of the installed bessemer-kernels 1.2, for {HERE.name}"
    assert Path(builds.library()._name).parent == tmp_path / "site" / prebuilt.MODULE
    matrix, x_MK = PackedMatrix.of(LAYERS["Q4_K"]()), rows(3, 256)
    assert matrix.multiply(x_MK).shape == (3, 80)


@pytest.mark.parametrize(
    ("sources", "library", "line"),
    [
        ("0" * 32, "parts.h", "was built from other sources and is not used"),
        (None, "missing.so", "is damaged: missing.so is not there"),
        (None, "parts.h", "cannot be loaded"),
    ],
)
def test_an_installed_library_that_is_not_of_these_sources_or_damaged_is_not_loaded_and_said(
    sources, library, line, monkeypatch, tmp_path, fresh
):
    install(monkeypatch, tmp_path, sources or prebuilt.sources_hash(FOLDER), {HERE.name: FOLDER / library})
    assert builds.library() is None
    assert line in builds.unavailable() and "no C++ compiler" in builds.unavailable()
    assert builds.origin().startswith("no compiled kernels") and line in builds.origin() and "\n" not in builds.origin()


def test_beside_a_compiler_too_it_is_said_that_an_installed_one_is_not_used(monkeypatch, tmp_path, fresh):
    install(monkeypatch, tmp_path, "0" * 32, {HERE.name: FOLDER / "parts.h"})
    monkeypatch.setattr(builds, "build", lambda **how: object())
    monkeypatch.setattr(builds, "compute_by", lambda kernels: None)
    monkeypatch.setattr(builds, "_compiler", lambda: "c++")
    line = "the installed bessemer-kernels 1.2 was built from other sources and is not used"
    assert builds.origin() == f"kernels compiled on this machine; {line}"
    assert builds.expected_origin() == (True, f"compiled on this machine at the first use; {line}")


def test_a_module_of_that_name_that_breaks_is_said(monkeypatch, tmp_path, fresh):
    (tmp_path / f"{prebuilt.MODULE}.py").write_text("VERSION = 1 / 0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert builds.library() is None
    assert "bessemer-kernels is damaged: division by zero" in builds.unavailable()


def test_without_a_compiler_and_an_installed_library_the_command_that_helps_is_said(fresh):
    command = f"pip install --no-index --find-links FOLDER bessemer-kernels=={bessemer.__version__}"
    assert "no C++ compiler" in builds.origin() and command in builds.origin()
    are_there, words = builds.expected_origin()
    assert not are_there and command in words


def test_a_source_distribution_has_the_sources_and_says_the_package_s_version(tmp_path):
    (path,) = SdistBuilder(str(ROOT / "kernels")).build(directory=str(tmp_path))
    with tarfile.open(path) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"bessemer_kernels-{of_checkout()}"
    assert prebuilt.sources_hash(unpacked / "sources") == prebuilt.sources_hash(FOLDER)
    assert {"LICENSE", "PKG-INFO", "build_hook.py", "pyproject.toml"} <= {path.name for path in unpacked.iterdir()}
    assert WheelBuilder(str(unpacked)).metadata.version == of_checkout()


def test_wheels_are_built_for_every_kind_of_machine_that_has_tiers():
    settings = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["cibuildwheel"]
    archs = {one for system in ("linux", "macos", "windows") for one in settings[system]["archs"]}
    assert {{"AMD64": "x86_64", "arm64": "aarch64"}.get(one, one) for one in archs} == {tier.machine for tier in prebuilt.TIERS}
    workflow = YAML(typ="safe").load(ROOT / ".github" / "workflows" / "kernels.yml")
    images = {one["os"] for one in workflow["jobs"]["wheels"]["strategy"]["matrix"]["include"]}
    assert {image.rpartition("-")[0].removesuffix("-24.04") or image for image in images} >= {"macos", "windows"}
    assert len(images) == 4


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built by this compiler from a source distribution."""
    if cxx_compiler() is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("wheel")
    (packed,) = SdistBuilder(str(ROOT / "kernels")).build(directory=str(folder))
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    (path,) = WheelBuilder(packed.removesuffix(".tar.gz")).build(directory=str(folder))
    return Path(path)


#: Bits of products and of attention's neighbours, by the kernels that a process finds.
PROGRAM = """
import json, sys, torch
from bessemer.model import cpu_kernels
from bessemer.model.cpu_kernels.packed import PackedMatrix
from tests.model.test_cpu_kernels import LAYERS, rows
assert cpu_kernels.library() is not None, cpu_kernels.unavailable()
found = {name: PackedMatrix.of(make(bias=True)).multiply(rows(5, 256)).detach() for name, make in LAYERS.items()}
found["SiLU"] = cpu_kernels.pointwise(rows(5, 256), 0, 1)
torch.save(found, sys.argv[1])
print(json.dumps([cpu_kernels.origin(), cpu_kernels.arithmetic()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("arithmetic", ["native", "avx2", "portable"])
def test_a_wheel_computes_the_bits_of_the_compiled_kernels_where_there_is_no_compiler(arithmetic, wheel, compiled, tmp_path):
    if arithmetic == "avx2" and not prebuilt.features() >= V3:
        pytest.skip("this processor has no AVX2")
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    assert wheel.name.startswith(f"bessemer_kernels-{of_checkout()}-py3-none-")
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {
        "PATH": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(map(str, (target, ROOT / "src", ROOT))),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "BESSEMER_ARITHMETIC": arithmetic,
    }
    made = tmp_path / "products.pt"
    command = [sys.executable, "-c", PROGRAM, str(made)]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert "kernels of the installed bessemer-kernels" in done.stdout and "compiling" not in done.stderr
    assert not (tmp_path / "extensions").exists()
    expected = {name: PackedMatrix.of(make(bias=True)).multiply(rows(5, 256)).detach() for name, make in LAYERS.items()}
    expected["SiLU"] = builds.pointwise(rows(5, 256), 0, 1)
    found = torch.load(made)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
