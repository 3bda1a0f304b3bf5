"""`bessemer quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bessemer.cli.options import Device, Model, Runs

if TYPE_CHECKING:
    from bessemer.model.quantisation.config import QuantizeConfig

#: Relative loss in bits per byte from which advice is printed.
_NOTABLE_LOSS = 0.01


def quantize(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Argument(help="Folder of the quantised model.")],
    scheme: Annotated[str, typer.Option(help="int8, int4 or w8a8.")] = "int8",
    method: Annotated[str, typer.Option(help="rtn (round to nearest), gptq or awq.")] = "rtn",
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale: 32, 64 or 128 (default 128 for int4, a whole row for int8).")
    ] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="int4: a zero point for each group.")] = False,
    search_clip: Annotated[bool, typer.Option("--search-clip", help="rtn: choose each scale by its squared error.")] = False,
    head: Annotated[str | None, typer.Option(help="Embedding and head: int8, int4 or none; int8, of nf4 none.")] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="Text for gptq and awq: a run, its tokens, a folder of documents or a text file.")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of calibration text.", min=256)] = 65_536,
    evaluate: Annotated[
        Path | None,
        typer.Option(
            help="Held-out text to compare both models on, as for --calibrate (default: the held-out part of that text)."
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check", help="If no text is given, compare both models on a small text that comes with Bessemer."
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of the choice of calibration text.")] = 0,
    device: Device = "auto",
    runs: Runs = Path("runs"),
) -> None:
    """Write a model with weights of 8 or 4 bits, and what that costs in quality."""
    from contextlib import ExitStack

    from rich.console import Console

    from bessemer.cli.named import as_folder, find_model, given_options
    from bessemer.core.progress import progress_for_terminal
    from bessemer.core.store import new_folder
    from bessemer.evaluation.quantisation import Tokens, opened_tokens, quantise_folder
    from bessemer.model.quantisation.config import QuantizeConfig
    from bessemer.tokenization.tokenizer import load_tokenizer
    from bessemer.views.terminal import show_quality

    given = given_options(context, "scheme", "method", "group_size", "search_clip", "head", "calibration_tokens")
    config = QuantizeConfig.parse(given | {"symmetric": not asymmetric}, "quantize")
    place = find_model(model, runs)
    with ExitStack() as stack:
        folder = stack.enter_context(as_folder(place, out))
        text = held_out = Tokens(None, None)
        if calibrate is not None:
            text = held_out = stack.enter_context(opened_tokens(calibrate, load_tokenizer(folder)))
        if evaluate is not None:
            held_out = stack.enter_context(opened_tokens(evaluate, load_tokenizer(folder)))
        unfinished = stack.enter_context(new_folder(out))
        quality = quantise_folder(
            config,
            folder,
            unfinished,
            calibration=text.train,
            # a text of --evaluate without a held-out part is used whole
            held_out=held_out.held_out or (held_out.train if evaluate is not None else None),
            sample=check,
            seed=seed,
            device=device,
            progress=progress_for_terminal(),
        )
    Console().print(show_quality(quality))
    if (advice := _advice(quality, config)) is not None:
        print(advice)
    print(f"{out}: written")


def _advice(quality: dict[str, Any], config: QuantizeConfig) -> str | None:
    """A line on a notable loss, with settings that lose less; None for a small loss, or where none was measured."""
    from bessemer.model.quantisation.config import scheme_plugin

    if "loss" not in quality or quality["loss"] < _NOTABLE_LOSS:
        return None
    better = []
    if config.scheme != "int8":
        better.append("--scheme int8")
    if not config.is_calibrated and scheme_plugin(config.scheme).is_calibrated:
        better.append("--method gptq --calibrate TEXT (or awq)")
    if config.head == "int4":
        better.append("--head int8")
    elif config.head != "none" and config.scheme == "int8":
        better.append("--head none")
    lost = f"{config.scheme} by {config.method} loses {quality['loss']:.1%} of bits per byte"
    return f"{lost}; what loses less: {', or '.join(better)}" if better else lost
