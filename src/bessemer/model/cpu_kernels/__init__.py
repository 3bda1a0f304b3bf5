"""Compiled CPU kernels in C++: packed matmuls, paged attention, whole decode steps.

The C++ of this folder is one library with a plain C interface. An installed `bessemer-kernels` has it compiled
(`prebuilt.py`); else it is built on first use, and kept in PyTorch's folder for extensions under a hash of the sources, the
compiler, its options and the processor's features. What was built from other sources or for another processor is never loaded.

operators.cpp registers the kernels as PyTorch operators from C++, so that a call costs about as much as one of PyTorch's own.
None has a derivative: products and attention serve, and `cross_entropy_` computes the gradient itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from torch import Tensor

from bessemer.core.environment import can_write_below, own_temporary_folder
from bessemer.core.hashing import hash_value
from bessemer.core.progress import PlainLines, Progress
from bessemer.model.cpu_kernels import prebuilt

# Shapes: M rows, N outputs, K inputs, H query heads, V channels of a value.

_LIBRARY = torch.library.Library("bessemer", "DEF")
_BATCH = "Tensor starts, Tensor positions, Tensor tables"

for _schema in (
    "packed_linear(Tensor x, Tensor codes, Tensor? scales, Tensor? zeros, Tensor? offsets, Tensor? parts, Tensor? bias, "
    "int kind, int outputs, int inputs, int group, int threads, int activation_bits=8) -> Tensor",
    f"paged_attention(Tensor query, Tensor keys, Tensor values, Tensor? key_scales, Tensor? value_scales, {_BATCH}, "
    "Tensor? sinks, float scale, float softcap, int window, int threads) -> Tensor",
    "write_pages(Tensor(a!) keys, Tensor(b!)? values, Tensor(c!)? key_scales, Tensor(d!)? value_scales, "
    f"{_BATCH}, Tensor key, Tensor? value) -> ()",
    "cross_entropy_(Tensor(a!) logits, Tensor targets, float z_loss, bool wants_gradient, int threads) -> (Tensor, Tensor)",
    "norm_rows(Tensor x, Tensor weight, Tensor? bias, float eps, bool centres, int threads) -> Tensor",
    "rotate_rows_(Tensor(a!) heads, Tensor cosines, Tensor signed_sines, bool interleaved, int threads) -> ()",
    "pointwise(Tensor x, int function, int threads) -> Tensor",
    "target_log_probs(Tensor logits, Tensor targets, float temperature, int threads) -> Tensor",
):
    _LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)


@torch.library.register_fake("bessemer::packed_linear", lib=_LIBRARY)
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    offsets: Tensor | None,
    parts: Tensor | None,
    bias: Tensor | None,
    *how: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], how[1])


@torch.library.register_fake("bessemer::paged_attention", lib=_LIBRARY)
def _(query: Tensor, keys: Tensor, values: Tensor, *others: object) -> Tensor:
    return query.new_empty(*query.shape[:-1], values.shape[-1], dtype=torch.float32)


@torch.library.register_fake("bessemer::write_pages", lib=_LIBRARY)
def _(*arguments: object) -> None:
    return None


@torch.library.register_fake("bessemer::cross_entropy_", lib=_LIBRARY)
def _(logits: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    return logits.new_empty(len(logits), dtype=torch.float32), logits.new_empty(len(logits), dtype=torch.float32)


@torch.library.register_fake("bessemer::norm_rows", lib=_LIBRARY)
@torch.library.register_fake("bessemer::pointwise", lib=_LIBRARY)
def _(x: Tensor, *others: object) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("bessemer::rotate_rows_", lib=_LIBRARY)
def _(*arguments: object) -> None:
    return None


@torch.library.register_fake("bessemer::target_log_probs", lib=_LIBRARY)
def _(logits: Tensor, *others: object) -> Tensor:
    return logits.new_empty(len(logits))


packed_linear = torch.ops.bessemer.packed_linear.default
paged_attention = torch.ops.bessemer.paged_attention.default
write_pages = torch.ops.bessemer.write_pages.default
cross_entropy_ = torch.ops.bessemer.cross_entropy_.default
norm_rows = torch.ops.bessemer.norm_rows.default
rotate_rows_ = torch.ops.bessemer.rotate_rows_.default
pointwise = torch.ops.bessemer.pointwise.default
target_log_probs = torch.ops.bessemer.target_log_probs.default


def thrown(error: RuntimeError) -> Exception:
    """ValueError or MemoryError of an operator's C++, which some builds of PyTorch turn into a RuntimeError."""
    return (MemoryError if "bad_alloc" in str(error) else ValueError)(str(error))


_computing: list[ctypes.CDLL] = []


def compute_by(kernels: ctypes.CDLL) -> None:
    """Register these kernels for the operators."""
    for before in _computing:
        before.bessemer_operators(0)
    _computing[:] = [kernels]
    kernels.bessemer_operators(1)


_FOLDER = Path(__file__).parent
_OPTIONS = (*prebuilt.OPTIONS, "-march=native", "-pthread")
#: Further compiler flags of each arithmetic: instructions that a processor has besides are not used.
_ARITHMETICS = {
    "native": (),
    "avx2": ("-march=x86-64-v3",),
    "portable": ("-DBESSEMER_PORTABLE",),
}
#: Environment variable that chooses the arithmetic of `library`, or `none`, so that one machine can test what others have.
ARITHMETIC_VARIABLE = "BESSEMER_ARITHMETIC"
# as in guards.h
_OUT_OF_MEMORY = b"out of memory"
_MACHINES = ("x86_64", "amd64", "aarch64", "arm64")


class KernelsError(Exception):
    """Why there are no compiled kernels on this machine, in one line."""


def library() -> ctypes.CDLL | None:
    """The compiled kernels: those of an installed `bessemer-kernels` that fits, or else built here. None where neither can be,
    and `unavailable()` says why. The first build on a machine takes about ten seconds and says so on stderr."""
    return _outcome().kernels


def unavailable() -> str | None:
    """Why `library()` is None, in one line; None when it is not."""
    return _outcome().reason


def origin() -> str:
    """Where the kernels are from, in one line: an installed distribution, a compiler here, or why there are none and what
    would help."""
    return _outcome().origin


def raise_failure(line: bytes | None) -> None:
    """Raise what a function of the library returned: ValueError for what it was given, MemoryError; nothing for None."""
    if line is not None:
        raise (MemoryError if line == _OUT_OF_MEMORY else ValueError)(line.decode())


def arithmetic() -> str:
    """What multiplies quantised weights on this processor: `avx512`, `avx_vnni`, `avx2`, `neon_i8mm`, `neon_dotprod`, `neon`,
    `portable` (plain C++), or `modules` where there are no kernels."""
    kernels = library()
    return "modules" if kernels is None else kernels.bessemer_arithmetic().decode()


class _Outcome(NamedTuple):
    """The kernels or the reason why there are none, and where they are from."""

    kernels: ctypes.CDLL | None
    reason: str | None
    origin: str


@cache
def _outcome() -> _Outcome:
    arithmetic_name = os.environ.get(ARITHMETIC_VARIABLE, "native")
    if arithmetic_name == "none":
        reason = f"{ARITHMETIC_VARIABLE} asks for none"
        return _Outcome(None, reason, f"no compiled kernels: {reason}")
    not_used = ""
    try:
        if (found := prebuilt.installed()) is not None:
            tier, path = prebuilt.choose(found, _FOLDER, arithmetic_name, prebuilt.features())
            kernels = load_prebuilt(path)
            compute_by(kernels)
            return _Outcome(kernels, None, f"kernels of the installed {found}, for {tier.name}")
    except prebuilt.PrebuiltError as error:
        not_used = f"; {error}"
    try:
        kernels = build(arithmetic=arithmetic_name, progress=PlainLines())
    except KernelsError as error:
        return _Outcome(None, f"{error}{not_used}", f"no compiled kernels, PyTorch computes: {error}{not_used}{_remedy()}")
    compute_by(kernels)
    return _Outcome(kernels, None, f"kernels compiled on this machine{not_used}")


def _remedy() -> str:
    command = prebuilt.advice()
    return "" if command is None else f"; {prebuilt.DISTRIBUTION} needs no compiler: {command}"


def expected_origin() -> tuple[bool, str]:
    """Whether there will be kernels, and where they will be from, as `origin` says it; nothing is loaded or compiled."""
    not_used = ""
    try:
        if (found := prebuilt.installed()) is not None:
            tier, _ = prebuilt.choose(found, _FOLDER, "native", prebuilt.features())
            return True, f"of the installed {found}, for {tier.name}"
    except prebuilt.PrebuiltError as error:
        not_used = f"; {error}"
    try:
        _check_platform()
        _compiler()
    except KernelsError as error:
        return False, f"none, PyTorch computes: {error}{not_used}{_remedy()}"
    return True, f"compiled on this machine at the first use{not_used}"


def load_prebuilt(path: Path) -> ctypes.CDLL:
    """A library of an installed distribution. Raises PrebuiltError for one that cannot be loaded."""
    try:
        return _declare(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        raise prebuilt.PrebuiltError(f"the installed {path.name} cannot be loaded: {error}") from error


def build(*, arithmetic: str = "native", progress: Progress | None = None) -> ctypes.CDLL:
    """Compile the library, or load what is there already.

    arithmetic: `native`, the best of this processor; `avx2`, or `portable`, plain C++ without instructions of one kind of
    processor. All give the same bits. Two processes that need it at once compile it once. Raises KernelsError.
    """
    _check_platform()
    if arithmetic not in _ARITHMETICS:
        raise KernelsError(
            f"{ARITHMETIC_VARIABLE} is {arithmetic!r}: no kernels of that name; known: {', '.join(_ARITHMETICS)}"
        )
    options = [*_OPTIONS, *_ARITHMETICS[arithmetic]]
    sources = prebuilt.sources(_FOLDER)
    name = "bessemer_kernels_" + hash_value(
        [[path.name, path.read_text(encoding="utf-8")] for path in sources] + [options, _compiler(), _processor_features()],
        bits=64,
    )
    try:
        folder = _extensions_folder() / name
        folder.mkdir(parents=True, exist_ok=True)
        finished = folder / "kernels.so"
        if not finished.exists():
            with FileLock(folder / "building"):
                if not finished.exists():
                    if progress is not None:
                        progress.say("compiling the kernels for this processor, once (about ten seconds)")
                    _compile(name, [str(path) for path in sources if path.suffix == ".cpp"], options, folder, finished)
        return _declare(ctypes.CDLL(str(finished)))
    except OSError as error:
        raise KernelsError(f"the compiled kernels cannot be kept or loaded: {error}") from error


def _check_platform() -> None:
    """Raise KernelsError where the sources are not compiled."""
    if platform.machine().lower() not in _MACHINES or sys.platform == "win32":
        raise KernelsError(
            f"kernels are compiled on 64-bit x86 and ARM with Linux or macOS, not on {platform.machine()} {platform.system()}"
        )


def _compile(name: str, sources: list[str], options: list[str], folder: Path, finished: Path) -> None:
    from torch.utils import cpp_extension

    # a killed build leaves files, and a lock
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    search, libraries = os.environ.get("PATH", os.defpath), cpp_extension.TORCH_LIB_PATH
    try:
        # ninja is installed beside this Python, whose folder of programs may not be on PATH
        os.environ["PATH"] = os.pathsep.join((sysconfig.get_path("scripts"), search))
        # given to the shell as it is: an environment's path may have spaces
        cpp_extension.TORCH_LIB_PATH = shlex.quote(libraries)
        with contextlib.redirect_stdout(io.StringIO()):
            cpp_extension.load(
                name,
                sources,
                extra_cflags=options,
                extra_ldflags=["-pthread"],
                build_directory=str(work),
                is_python_module=False,
            )
    except (RuntimeError, subprocess.SubprocessError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "error" in line.lower()] or [str(error).strip()]
        raise KernelsError(f"the kernels do not compile: {lines[-1]}") from error
    finally:
        os.environ["PATH"], cpp_extension.TORCH_LIB_PATH = search, libraries
    # renamed when complete, so that nobody loads a part of it
    (work / f"{name}.so").replace(finished)
    shutil.rmtree(work, ignore_errors=True)


def _compiler() -> str:
    """The compiler's name and version, as it gives them."""
    # the same as in `torch.utils.cpp_extension`, whose import takes a fifth of a second
    command = os.environ.get("CXX", "c++")
    try:
        done = subprocess.run(
            [command, "--version"], capture_output=True, encoding="utf-8", errors="replace", timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelsError(f"no C++ compiler: {command!r} does not run (on Debian: apt-get install g++)") from error
    return f"{command} {done.stdout}"


def _processor_features() -> list[str]:
    """The processor's instruction sets, as the system names them."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("flags", "features")):
                return sorted(line.split(":", 1)[1].split())
    return sorted(name for name, has in torch.cpu.get_capabilities().items() if has)


def _extensions_folder() -> Path:
    """Where PyTorch keeps what it compiles: TORCH_EXTENSIONS_DIR, or its place in the user's cache; where that cannot be
    written to, a temporary folder of the user's. Raises OSError where there is none."""
    from torch._appdirs import user_cache_dir

    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or user_cache_dir(appname="torch_extensions")).resolve()
    return folder if can_write_below(folder) else own_temporary_folder() / "torch_extensions"


def _declare(kernels: ctypes.CDLL) -> ctypes.CDLL:
    """The types of what Python calls."""
    pointer, size, count, failure = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_char_p
    kernels.bessemer_arithmetic.restype = ctypes.c_char_p
    kernels.bessemer_operators.argtypes, kernels.bessemer_operators.restype = [count], None
    kernels.bessemer_matrix_size.restype = size
    kernels.bessemer_encode_blocks.argtypes = [count, pointer, size, pointer, pointer, count]
    kernels.bessemer_encode_blocks.restype = count
    kernels.bessemer_split_blocks.argtypes = [count, pointer, size, pointer, pointer, pointer, count]
    kernels.bessemer_split_blocks.restype = count
    kernels.bessemer_pack_codes.argtypes = [count, pointer, size, size, count, pointer, count]
    kernels.bessemer_pack_codes.restype = None
    kernels.bessemer_pack_floats.argtypes = [count, pointer, size, size, pointer, count]
    kernels.bessemer_pack_floats.restype = None
    kernels.bessemer_pack_blocks.argtypes, kernels.bessemer_pack_blocks.restype = [count, pointer, pointer, count], count
    kernels.bessemer_unpack_blocks.argtypes = [count, pointer, pointer, size, pointer]
    kernels.bessemer_unpack_blocks.restype = count
    kernels.bessemer_read_row.argtypes, kernels.bessemer_read_row.restype = [pointer, size, pointer], None
    kernels.bessemer_step_sizes.argtypes, kernels.bessemer_step_sizes.restype = [pointer], None
    kernels.bessemer_step_new.argtypes, kernels.bessemer_step_new.restype = [pointer, count], pointer
    kernels.bessemer_step_free.argtypes, kernels.bessemer_step_free.restype = [pointer], None
    kernels.bessemer_step_run.argtypes, kernels.bessemer_step_run.restype = [pointer, pointer], failure
    kernels.bessemer_step_generate.argtypes = [pointer, pointer, pointer]
    kernels.bessemer_step_generate.restype = failure
    kernels.bessemer_draw.argtypes, kernels.bessemer_draw.restype = [pointer, count], failure
    return kernels


_NAMES = {
    "avx512": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx2": "AVX2",
    "neon_i8mm": "NEON with i8mm",
    "neon_dotprod": "NEON with dotprod",
    "neon": "NEON",
    "portable": "portable C++",
}


def kernels_arithmetic() -> str:
    """What the compiled kernels compute with. They are there: ask `library` first."""
    return _NAMES[arithmetic()]
