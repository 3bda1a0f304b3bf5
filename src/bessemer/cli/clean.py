"""`bessemer clean`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def clean(
    runs: Annotated[Path, typer.Option(help="Folder of the runs and their store.")] = Path("runs"),
    downloads: Annotated[bool, typer.Option("--downloads", help="Remove downloaded files too.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
) -> None:
    """Remove from the store what no run links to. What another process is making stays."""
    import shutil
    from contextlib import nullcontext

    from bessemer.core.errors import ArtefactError
    from bessemer.core.figures import size
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
            # a run links what it has made, or found, before it lets go of the key's lock
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
