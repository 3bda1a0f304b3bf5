"""`bessemer label`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.options import Model


def label(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The folder of the labels. The same command goes on where it was stopped.")],
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts: CSV, JSON lines, JSON or Parquet; those that the run's SFT held out.")
    ] = None,
    limit: Annotated[int, typer.Option(help="The first prompts only.", min=1)] = 50,
    answers: Annotated[int, typer.Option(help="Answers to each prompt.", min=2, max=16)] = 4,
    temperature: Annotated[float, typer.Option(help="Of the answers; higher makes them differ more.", min=0.01)] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="At most this many tokens an answer.", min=1)] = 128,
    seed: Annotated[int, typer.Option(help="Of the answers.")] = 7,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8001,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A name that browsers may call the page by; * is any; may be repeated."),
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in the browser.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
) -> None:
    """Rank a model's answers on a page, and get pairs to train on."""
    from bessemer.cli.named import find_model, option_of
    from bessemer.core.errors import ConfigError, writing_to
    from bessemer.core.new_folder import alone_in
    from bessemer.core.progress import progress_for_terminal
    from bessemer.inference.engine import Engine
    from bessemer.inference.sampling.params import SamplingParams
    from bessemer.posttraining.labelling.sampling import read_prompts, sample_answers
    from bessemer.serving.labelling import serve_labels

    folder = find_model(model, runs)
    held_out = folder.parent / "conversations" / "validation.jsonl"
    if prompts is None and not held_out.exists():
        raise ConfigError(f"--prompts: {model} has no held-out conversations of its own; name a file of prompts")
    params = SamplingParams.parse({"max_tokens": max_tokens, "temperature": temperature}, option_of("label"))
    asked = read_prompts(held_out if prompts is None else prompts, limit)
    with writing_to(out), alone_in(out), Engine(folder, device=device) as engine:
        labels = sample_answers(engine, asked, out, count=answers, params=params, seed=seed, progress=progress_for_terminal())
    hosts = [name.lower() for name in allow_host or ()]
    serve_labels(labels, out, host=host, port=port, hosts=hosts, browser=browser)
