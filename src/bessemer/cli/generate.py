"""`bessemer generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def generate(
    model: Annotated[str, typer.Argument(help="A model: a folder, a GGUF file, a run, a pulled one, or what finetune wrote.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    suffix: Annotated[
        str | None,
        typer.Option(help="Fill in what stands between the prompt and this text (a model trained with pretrain.fim_rate)."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="At most this many tokens.", min=1)] = 128,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; if none, as the model's generation_config.json says, or 0.", min=0.0)
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens, 0 keeps all; the model's own.", min=0)] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest tokens up to this probability; the model's own.")
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Leave out tokens below this share of the likeliest one's probability; the model's own."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1, tokens that were there already come less; the model's own.")
    ] = None,
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
    from bessemer.cli.named import find_served, named_numbers, option_of, sampling_options, speculation
    from bessemer.inference.engine import Engine, EngineConfig
    from bessemer.tokenization.infill import infill_prompt

    given = speculation(speculate, runs) | named_numbers("parallel", parallel) | {"max_model_len": max_model_len}
    config = EngineConfig.parse(given, option_of("generate"))
    params_for = sampling_options(
        "generate",
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    )
    with Engine(find_served(model, runs), device=device, config=config) as engine:
        if adapter is not None:
            engine.load_adapter(adapter, adapter)
        asked = prompt if suffix is None else infill_prompt(engine.tokenizer, prompt, suffix)
        for chunk in engine.stream(asked, params_for(engine), adapter=adapter):
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    print()
