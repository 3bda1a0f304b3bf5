"""`bessemer extend`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def extend(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER", help="A tokenizer's folder, or a model: a folder, a GGUF file, a run, or a pulled one."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    token: Annotated[list[str] | None, typer.Option(help="A token that is found in any text; may be repeated.")] = None,
    special: Annotated[
        list[str] | None, typer.Option(help="A control token, which only templates write; may be repeated.")
    ] = None,
    init: Annotated[
        str, typer.Option(help="A model's new rows: mean, of all, or subtokens, of what wrote it before.")
    ] = "mean",
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs"),
) -> None:
    """Add tokens to a tokenizer, or to a model and its tokenizer. Ids that exist keep their tokens and their weights."""
    from bessemer.cli.named import as_folder, find_model
    from bessemer.core.errors import ConfigError
    from bessemer.core.new_folder import new_folder
    from bessemer.core.store import follow

    if not token and not special:
        raise ConfigError("nothing to add: give --token or --special")
    if init not in ("mean", "subtokens"):
        raise ConfigError(f"--init: {init!r} is not one of mean, subtokens")
    folder = follow(Path(source))
    if (folder / "tokenizer.json").exists() and not (folder / "config.json").exists():
        from bessemer.tokenization.extend import add_tokens

        with new_folder(out) as written:
            extension = add_tokens(folder, written, token or [], special or [])
    else:
        from bessemer.model.resize import extend_model

        with as_folder(find_model(source, runs), out) as model:
            extension = extend_model(model, out, token or [], special or [], init="mean" if init == "mean" else "subtokens")
    for known, id in extension.skipped.items():
        print(f"skipped {known!r}: it is one token already, id {id}")
    for id, added in extension.added.items():
        print(f"{id}  {added!r}")
    print(f"{out}: {extension.size + len(extension.added):,} tokens, {len(extension.added):,} of them new")
