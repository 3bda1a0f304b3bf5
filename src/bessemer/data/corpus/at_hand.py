"""The documents that feed a stage, as files: those on object storage are copied into the cache."""

from __future__ import annotations

from pathlib import Path

from bessemer.core.stage import StageContext


def documents_of(context: StageContext) -> Path | None:
    """The documents that feed a stage, as files; None where it has none."""
    folder = context.inputs.get("documents")
    return None if folder is None else documents_at(folder, context.cache)


def documents_at(folder: Path, cache: Path) -> Path:
    """Documents as files; `cache` holds the copies of those on object storage."""
    from bessemer.data.corpus.remote import copies_of, documents_at_hand

    return documents_at_hand(folder, copies_of(cache, folder.parent.name))
