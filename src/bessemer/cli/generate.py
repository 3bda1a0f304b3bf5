"""`bessemer generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.options import (
    ActivationBits,
    Adapter,
    Device,
    MaxModelLen,
    MinP,
    Model,
    RepetitionPenalty,
    Runs,
    Speculate,
    Temperature,
    TopK,
    TopP,
)


def generate(
    context: typer.Context,
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    suffix: Annotated[
        str | None,
        typer.Option(help="Fill in the text between the prompt and this one (a model trained with pretrain.fim_rate)."),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="A picture that the prompt asks about, as a turn of a chat; may be repeated."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="At most this many tokens.", min=1)] = 128,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")] = None,
    adapter: Adapter = None,
    speculate: Speculate = None,
    parallel: Annotated[
        list[str] | None, typer.Option(help="tensor=N or expert=N: share the model between processes; may be repeated.")
    ] = None,
    watermark: Annotated[Path | None, typer.Option(help="Key file of `bessemer watermark`: mark the text with it.")] = None,
    max_model_len: MaxModelLen = None,
    activation_bits: ActivationBits = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
) -> None:
    """Continue a prompt, or fill in what stands between it and a suffix, printing as it comes."""
    from bessemer.cli.named import find_served, given_options, named_numbers, option_of, sampling_options, speculation
    from bessemer.cli.watermark import watermark_of
    from bessemer.core.errors import ConfigError
    from bessemer.inference.engine import Engine, EngineConfig, Prompt
    from bessemer.inference.images import chat_prompt
    from bessemer.tokenization.prompts import infill_prompt

    given = speculation(speculate, runs) | named_numbers("parallel", parallel)
    given |= given_options(context, "max_model_len", "activation_bits")
    if watermark is not None:
        given["watermark"] = watermark_of(watermark)
    config = EngineConfig.parse(given, option_of("generate"))
    params_for = sampling_options(context)
    if image and suffix is not None:
        raise ConfigError("--image: pictures go with a question, and not with --suffix")
    with Engine(find_served(model, runs), device=device, config=config) as engine:
        if adapter is not None:
            engine.load_adapter(adapter, adapter)
        input_text: Prompt = prompt if suffix is None else infill_prompt(engine.tokenizer, prompt, suffix)
        if image:
            parts = [*({"type": "image", "image": path} for path in image), {"type": "text", "text": prompt}]
            input_text = chat_prompt(engine.tokenizer, [{"role": "user", "content": parts}])
        params = params_for(engine)
        if config.watermark is not None and not params.can_carry(config.watermark):
            raise ConfigError("--watermark: gumbel marks what is drawn; give --temperature, or a key of --method green")
        for chunk in engine.stream(input_text, params, adapter=adapter):
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    print()
