"""`bessemer extend`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def extend(
    folder: Annotated[Path, typer.Argument(help="A tokenizer's folder, or a model's.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    token: Annotated[list[str] | None, typer.Option(help="A token that is found in any text; may be repeated.")] = None,
    special: Annotated[
        list[str] | None, typer.Option(help="A control token, which only templates write; may be repeated.")
    ] = None,
    init: Annotated[
        str, typer.Option(help="A model's new rows: mean, of all, or subtokens, of what wrote it before.")
    ] = "mean",
) -> None:
    """Add tokens to a tokenizer, or to a model and its tokenizer. Ids that exist keep their tokens and their weights."""
    from bessemer.core.errors import ArtefactError, ConfigError
    from bessemer.core.new_folder import new_folder
    from bessemer.core.store import follow
    from bessemer.model.formats.hub import import_advice

    advice = import_advice(str(folder))
    if advice:
        raise ArtefactError(f"there is no folder {str(folder)!r}{advice}")
    source = follow(folder)
    if not token and not special:
        raise ConfigError("nothing to add: give --token or --special")
    if (source / "config.json").exists():
        if init not in ("mean", "subtokens"):
            raise ConfigError(f"--init: {init!r} is not one of mean, subtokens")
        from bessemer.model.resize import extend_model

        extension = extend_model(source, out, token or [], special or [], init="mean" if init == "mean" else "subtokens")
    else:
        from bessemer.tokenization.extend import add_tokens

        with new_folder(out) as folder:
            extension = add_tokens(source, folder, token or [], special or [])
    for known, id in extension.skipped.items():
        print(f"skipped {known!r}: it is one token already, id {id}")
    for id, added in extension.added.items():
        print(f"{id}  {added!r}")
    print(f"{out}: {extension.size + len(extension.added):,} tokens, {len(extension.added):,} of them new")
