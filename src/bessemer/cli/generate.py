"""`bessemer generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def generate(
    model: Annotated[str, typer.Argument(help="A model: a folder, a GGUF file, a run, or a pulled one.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    suffix: Annotated[
        str | None,
        typer.Option(help="Fill in what stands between the prompt and this text (a model trained with pretrain.fim_rate)."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="At most this many tokens.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.", min=0)] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Folder of a low-rank adapter of the model.")] = None,
    speculate: Annotated[
        str | None, typer.Option(help="Speculative decoding: ngram, mtp, or the folder of a draft model.")
    ] = None,
    parallel: Annotated[
        list[str] | None,
        typer.Option(help="tensor=N or expert=N: share the model between processes; may be repeated."),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="At most this many tokens of prompt and answer together; the model's context.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
) -> None:
    """Continue a prompt, or fill in what stands between it and a suffix, printing as it comes."""
    from bessemer.cli.named import find_model, named_numbers, option_of, speculation
    from bessemer.inference.engine import Engine, EngineConfig
    from bessemer.inference.sampling.sampler import SamplingParams
    from bessemer.tokenization.infill import infill_prompt

    given = speculation(speculate, runs) | named_numbers("parallel", parallel) | {"max_model_len": max_model_len}
    config = EngineConfig.parse(given, option_of("generate"))
    params = SamplingParams.parse(
        {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
            "stop": stop or [],
        },
        "generate",
    )
    with Engine(find_model(model, runs), device=device, config=config) as engine:
        if adapter is not None:
            engine.load_adapter(adapter, adapter)
        asked = prompt if suffix is None else infill_prompt(engine.tokenizer, prompt, suffix)
        for chunk in engine.stream(asked, params, adapter=adapter):
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    print()
