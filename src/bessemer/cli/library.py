"""`bessemer pull`, `list` and `rm`."""

from __future__ import annotations

from typing import Annotated

import typer


def pull(
    source: Annotated[str, typer.Argument(help="A GGUF file, a Hugging Face folder, a hub id (ORG/NAME), or smollm2.")],
    name: Annotated[str | None, typer.Option(help="The name to keep it under; the source's.")] = None,
) -> None:
    """Keep a model in the folder models/ (or BESSEMER_MODELS), where every command finds it by its name."""
    from bessemer.core.figures import size
    from bessemer.model.library import pull as keep

    kept, notes = keep(source, name)
    for note in notes:
        print(f"note: {note}")
    print(f"{kept.name}: {kept.place}, {size(kept.size)}; bessemer chat {kept.name}, or bessemer serve {kept.name}")


def list_models() -> None:
    """List the models that were pulled."""
    from datetime import datetime

    from rich.console import Console

    from bessemer.core.figures import size
    from bessemer.core.report import Column, Table
    from bessemer.model.library import kept_models, library_folder
    from bessemer.views.parts_terminal import show_parts

    kept = kept_models()
    if not kept:
        print(f"there is no model in {library_folder()}; bessemer pull smollm2")
        return
    rows = [
        (one.name, one.kind, size(one.size), datetime.fromtimestamp(one.changed).strftime("%Y-%m-%d %H:%M")) for one in kept
    ]
    columns = [Column("Name"), Column("Kind"), Column("Size", True), Column("Changed", True)]
    console = Console(highlight=False, soft_wrap=True)
    for drawn in show_parts([Table(columns, rows)]):
        console.print(drawn)


def rm(names: Annotated[list[str], typer.Argument(help="Models that were pulled.")]) -> None:
    """Remove pulled models."""
    from bessemer.core.figures import size
    from bessemer.model.library import remove

    for name in names:
        print(f"removed {name}, {size(remove(name).size)}")
