"""`bessemer init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    folder: Annotated[Path, typer.Argument(help="The folder to make.")],
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="A file or folder of your text, which stays where it is; again for more."),
    ] = None,
    from_: Annotated[
        str | None,
        typer.Option(
            "--from", help="Go on with an open model instead of a new one: its folder, or what `bessemer import` takes."
        ),
    ] = None,
) -> None:
    """Start a folder of your own: a recipe for your text, a place for it, notes. Nothing that exists is overwritten."""
    import os
    import re
    import shlex

    from bessemer.core.errors import ConfigError
    from bessemer.core.store import write_text
    from bessemer.pipeline.own_text import OwnText, amount, find_text, starting_files
    from bessemer.training.report import too_little_text

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._") or "my-model"
    own = find_text(text, folder) if text else OwnText()
    there = from_ is not None and Path(from_).is_dir()
    model = Path(os.path.relpath(Path(from_).resolve(), folder.resolve())).as_posix() if from_ and there else from_ and "base"
    files = starting_files(name, own, model)
    taken = [file for file in files if (folder / file).exists()]
    if taken:
        raise ConfigError(f"{folder / taken[0]}: exists already; name another folder")
    try:
        for file, content in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            write_text(folder / file, content)
    except OSError:
        # all of them or none: the same command refuses what exists
        for file in files:
            (folder / file).unlink(missing_ok=True)
        raise
    print(f"made {folder}: a recipe for {amount(own) if text else 'the text in ' + str(folder / 'data')}")
    if own.too_little and from_ is None:
        print(f"note: {too_little_text(own.size or 0)}")
    if not text:
        print(f"put your text (.txt, .md, .jsonl) into {folder / 'data'}")
    print(f"next:\n  cd {shlex.quote(str(folder))}")
    if from_ is not None and not there:
        # a file is named from here, and the command is typed there
        source = os.path.relpath(Path(from_).resolve(), folder.resolve()) if Path(from_).exists() else from_
        print(f"  bessemer import {shlex.quote(source)} base")
    print("  bessemer run recipe.yaml --dry-run\n  bessemer run recipe.yaml")
