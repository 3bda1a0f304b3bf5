"""`bessemer memorisation`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bessemer.cli.options import Device, Model, Runs, print_view

#: Formats of weights, as an option that is a list after commas.
Formats = Annotated[
    str | None,
    typer.Option(
        help="Formats of the weights, after commas: original, int8, int4, … (default: these three; of a GGUF file original)."
    ),
]


def memorisation(
    model: Model,
    canaries: Annotated[
        Path,
        typer.Option(help="JSON lines of prefix, suffix and repetitions; a run's stage memorisation writes canaries.jsonl."),
    ],
    formats: Formats = None,
    attempts: Annotated[int, typer.Option(help="Sampled answers within which a text counts as extracted.", min=1)] = 100,
    out: Annotated[Path | None, typer.Option(help="Write the ledger as JSON.")] = None,
    device: Device = "auto",
    runs: Runs = Path("runs"),
) -> None:
    """Test what a model has memorised of canaries, also in rounded weights; exit code 1 where extraction succeeds."""
    from bessemer.cli.named import find_model
    from bessemer.core.progress import progress_for_terminal
    from bessemer.core.store import write_json
    from bessemer.data.sources.canaries import read_canaries
    from bessemer.safety.memorisation.config import MemorisationConfig
    from bessemer.safety.memorisation.ledger import ledger_of
    from bessemer.safety.memorisation.verdict import parts_of, unsafe
    from bessemer.views.parts_terminal import show_parts

    every = read_canaries(canaries)
    planted, unseen = ([one for one in every if bool(one.repetitions) == wanted] for wanted in (True, False))
    place = find_model(model, runs)
    config = MemorisationConfig.parse({"formats": formats_of(formats, place), "attempts": attempts}, "--formats")
    ledger = ledger_of({model: place}, planted, unseen, config, device=device, progress=progress_for_terminal())
    print_view(*show_parts(parts_of(ledger)))
    if out is not None:
        write_json(out, ledger)
        print(f"written: {out}")
    if succeeds := unsafe(ledger):
        print(f"Extraction succeeds: {'; '.join(succeeds)}.")
        raise typer.Exit(1)
    print("Nothing is extracted.")


def formats_of(given: str | None, model: Path) -> list[Any]:
    """The formats of an option, or those that suit a model: a GGUF file is taken as it is."""
    from bessemer.safety.memorisation.config import ORIGINAL, ExtractionConfig

    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    return [ORIGINAL] if model.suffix == ".gguf" else ExtractionConfig().formats
