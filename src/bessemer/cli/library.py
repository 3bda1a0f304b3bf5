"""`bessemer pull`, `list` and `rm` for the library of models; `bessemer clean` for the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bessemer.cli.options import print_view


def pull(
    source: Annotated[str, typer.Argument(help="A GGUF file, a Hugging Face folder, a hub id (ORG/NAME), or smollm2.")],
    name: Annotated[str | None, typer.Option(help="The name to keep it under (default: the source's).")] = None,
) -> None:
    """Keep a model in the folder models/ (or BESSEMER_MODELS), where every command finds it by its name."""
    from bessemer.core.metrics import size
    from bessemer.model.formats.pull import pull as keep

    kept, notes = keep(source, name)
    for note in notes:
        print(f"note: {note}")
    print(f"{kept.name}: {kept.place}, {size(kept.size)}; bessemer chat {kept.name}, or bessemer serve {kept.name}")


def list_models() -> None:
    """List the models that were pulled."""
    from datetime import datetime

    from bessemer.core.metrics import size
    from bessemer.core.report import Column, Table
    from bessemer.model.storage.library import kept_models, library_folder
    from bessemer.views.parts_terminal import show_parts

    kept = kept_models()
    if not kept:
        print(f"there is no model in {library_folder()}; bessemer pull smollm2")
        return
    rows = [
        (model.name, model.kind, size(model.size), datetime.fromtimestamp(model.changed).strftime("%Y-%m-%d %H:%M"))
        for model in kept
    ]
    columns = [Column("Name"), Column("Kind"), Column("Size", True), Column("Changed", True)]
    print_view(*show_parts([Table(columns, rows)]), soft_wrap=True)


def rm(names: Annotated[list[str], typer.Argument(help="Models that were pulled.")]) -> None:
    """Remove pulled models."""
    from bessemer.core.metrics import size
    from bessemer.model.storage.library import remove

    for name in names:
        print(f"removed {name}, {size(remove(name).size)}")


def clean(
    runs: Annotated[Path, typer.Option(help="Folder of the runs and their store.")] = Path("runs"),
    downloads: Annotated[bool, typer.Option("--downloads", help="Remove downloaded files too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be removed; remove nothing.")] = False,
) -> None:
    """Remove from the store what no run links to. What another process is making stays."""
    import shutil
    from contextlib import nullcontext

    from bessemer.core.errors import ArtefactError
    from bessemer.core.metrics import size
    from bessemer.core.store import Store, folder_bytes, key_of_folder
    from bessemer.data.corpus.remote import address_of
    from bessemer.pipeline.run_folder import linked_keys

    if not runs.is_dir():
        raise ArtefactError(f"{runs}: there are no runs here")
    store = Store(runs / ".store")
    kept = linked_keys(runs)
    freed = 0
    for folder in store.folders():
        key = key_of_folder(folder)
        if folder in kept:
            continue
        with nullcontext(not store.is_locked(key)) if dry_run else store.try_lock(key) as free:
            # a run links an artefact, made or reused, before it releases the key's lock
            if not free or not (store.root / folder).is_dir() or folder in linked_keys(runs):
                continue
            amount, address = folder_bytes(store.root / folder), address_of(store.root / folder)
            stays = f"; what it put at {address} stays there" if address else ""
            print(f"{'would remove' if dry_run else 'removed'} {folder} ({size(amount)}){stays}")
            freed += amount
            if not dry_run:
                store.remove(folder)
    cache = runs / ".cache"
    if downloads and cache.exists():
        freed += folder_bytes(cache)
        print(f"{'would remove' if dry_run else 'removed'} the downloads ({size(folder_bytes(cache))})")
        if not dry_run:
            shutil.rmtree(cache)
    print(f"{size(freed)} {'would be' if dry_run else ''} freed".replace("  ", " "))
