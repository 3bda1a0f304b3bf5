"""`bessemer demo`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

# one whose answer does not hang on the last bits of an activation: of France the model begins in French as easily
_OPENING = "What is the capital of Japan?"
_EXAMPLES = ["Write two sentences about the sea.", "Why is the sky blue?"]


def demo(
    inspect: Annotated[str | None, typer.Option(metavar="TEXT", help="Look inside the model while it reads a text.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", "--install", help="Fetch the model (98 MB) without asking, where it is missing.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="At most this many tokens an answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
) -> None:
    """Chat with SmolLM2, a real model of 135 million parameters. `bessemer chat smollm2` is the same model."""
    from bessemer.cli.named import find_model

    model = find_model("smollm2", runs, yes=yes)
    if inspect is not None:
        _look(model, inspect, device)
        return
    from bessemer.cli.chat import converse
    from bessemer.inference.engine import Engine
    from bessemer.inference.sampling.sampler import SamplingParams

    engine = Engine(model, device=device)
    params = SamplingParams.parse({"max_tokens": max_tokens, "temperature": temperature, "seed": seed}, "demo")
    if sys.stdin.isatty():
        print(f"SmolLM2-135M-Instruct, {model}")
    converse(engine, params, _EXAMPLES, speed=True, opening=_OPENING)


def _look(model: Path, text: str, device: str) -> None:
    """What `bessemer inspect` prints, but for what takes long."""
    import shlex

    from rich.console import Console

    from bessemer.inspection.inspect import inspect
    from bessemer.model.device import choose_device
    from bessemer.model.folder import load_model
    from bessemer.tokenization.tokenizer import load_tokenizer
    from bessemer.views.inspection_terminal import show_inspection

    found = inspect(load_model(model, choose_device(device)), load_tokenizer(model), text, ablate=False)
    Console(highlight=False).print(show_inspection(found))
    print(f"\nas a page, with every head: bessemer inspect smollm2 {shlex.quote(text)} --out page.html")
