"""`bessemer inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.options import Device, Model, Runs, print_view

#: Most tokens of an inspected text: the page holds a picture of tokens × tokens for every head.
_LONGEST = 512


def inspect(
    model: Model,
    text: Annotated[str, typer.Argument(help="The text that it reads.")],
    out: Annotated[Path | None, typer.Option(help="Write everything as one HTML page.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the chosen head to a .png, .svg or .pdf.")] = None,
    arrays: Annotated[Path | None, typer.Option(help="Write all numbers to a .npz.")] = None,
    layer: Annotated[int | None, typer.Option(help="Layer of the head that is opened, from 0.", min=0)] = None,
    head: Annotated[int | None, typer.Option(help="Head that is opened, from 0; needs --layer.", min=0)] = None,
    query: Annotated[str, typer.Option(help="The token that looks: its text or position; -1 is the last.")] = "-1",
    key: Annotated[
        str | None, typer.Option(help="A token that is looked at: lists the heads that do, and opens the one that does most.")
    ] = None,
    neighbours: Annotated[
        list[str] | None, typer.Option(help="A token whose nearest in the embedding are listed; may be repeated.")
    ] = None,
    analogy: Annotated[list[str] | None, typer.Option(help='"king - man + woman"; may be repeated.')] = None,
    ablate: Annotated[bool, typer.Option(help="Also read the text without each head.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the random sequences on which heads' roles are scored.")] = 0,
    device: Device = "auto",
    runs: Runs = Path("runs"),
) -> None:
    """Look inside a model while it reads: attention, what each layer predicts, heads, experts, embeddings."""
    from bessemer.cli.named import find_model
    from bessemer.core.errors import RequestError
    from bessemer.core.store import write_text
    from bessemer.inspection.inspect import inspect as look
    from bessemer.inspection.inspect import save_arrays
    from bessemer.model.device import choose_device
    from bessemer.model.storage.folder import load_model
    from bessemer.tokenization.tokenizer import load_tokenizer
    from bessemer.views.inspection import inspection_page
    from bessemer.views.inspection_terminal import show_inspection

    if picture is not None:
        from bessemer.views.head_picture import check_suffix, save_head_picture

        check_suffix(picture)
    folder = find_model(model, runs)
    tokenizer = load_tokenizer(folder)
    length = len(tokenizer.encode(text))
    if length > _LONGEST:
        raise RequestError(f"the text has {length:,} tokens, and pictures are drawn of at most {_LONGEST}: give a shorter one")
    inspection = look(
        load_model(folder, choose_device(device)),
        tokenizer,
        text,
        layer=layer,
        head=head,
        query=query,
        key=key,
        neighbours_of=neighbours or (),
        analogies=analogy or (),
        ablate=ablate,
        seed=seed,
    )
    print_view(show_inspection(inspection))
    if picture is not None:
        save_head_picture(inspection, picture)
    if arrays is not None:
        save_arrays(inspection, arrays)
    if out is not None:
        write_text(out, inspection_page(inspection, model))
    for path in (out, picture, arrays):
        if path is not None:
            print(f"written: {path}")
