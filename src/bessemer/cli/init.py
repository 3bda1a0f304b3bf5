"""`bessemer init`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_RECIPE = """\
# Your own recipe: what the quickstart does until its model answers questions, on your own text.
#   bessemer run recipe.yaml --dry-run      what would run, and why
#   bessemer run recipe.yaml                make it
# What is not written here is inherited; `bessemer recipes show chat` prints it.
format: 1
name: {name}
extends: chat
collect:
  - {{source: files, paths: data}}            # .txt, .md, .jsonl with a "text" field; also .gz and .zst
  - {{source: wheels, lock: quickstart}}      # and the documentation that the quickstart uses, of which sft asks questions
pretrain: {{minutes: 4, threads: auto}}       # measured once on this machine, kept in the run's recipe.lock.yaml
# sft: null                                  # without wheels there is no chat model, or: sft: {{data: [chats.jsonl]}}
"""

_NOTES = """\
# {name}

`recipe.yaml` says what to make, `data/` holds your own text.

    bessemer run recipe.yaml
    bessemer chat {name}
    bessemer serve {name}
    bessemer show {name}

Results are in `runs/{name}/`: `report.html`, `model`, `tokenizer`, `corpus`.
"""

_EXAMPLE = """\
Put your own text files into this folder and delete this one. Each .txt or .md file becomes one document, each line of
a .jsonl file one document with a "text" field. Documents are cleaned, deduplicated and filtered before anything is
trained on them, and the report shows what was dropped and why.
"""


def init(
    folder: Annotated[Path, typer.Argument(help="The folder to make.")],
) -> None:
    """Start a folder of your own: a recipe, a place for data, notes. Nothing that exists is overwritten."""
    import re

    from bessemer.core.errors import ConfigError
    from bessemer.core.store import write_text

    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._") or "my-model"
    files = {
        "recipe.yaml": _RECIPE.format(name=name),
        "README.md": _NOTES.format(name=name),
        "data/about.txt": _EXAMPLE,
        ".gitignore": "runs/\n.venv/\n",
    }
    taken = [file for file in files if (folder / file).exists()]
    if taken:
        raise ConfigError(f"{folder / taken[0]}: exists already; name another folder")
    try:
        for file, text in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            write_text(folder / file, text)
    except OSError:
        # all of them or none: the same command refuses what exists
        for file in files:
            (folder / file).unlink(missing_ok=True)
        raise
    print(f"made {folder}; next:\n  cd {folder}\n  bessemer run recipe.yaml --dry-run")
