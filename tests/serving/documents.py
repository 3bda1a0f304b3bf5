"""Documents, an index of them that is searched by words alone, and keys of callers in groups."""

from __future__ import annotations

from pathlib import Path

from bessemer.retrieval.config import IndexConfig
from bessemer.retrieval.index import IndexedDocument, build_index
from bessemer.serving.runtime.clients import KeyRecord, hash_key, write_keys

METALS = IndexedDocument(
    "metal.md",
    "# Iron\n\nIron rusts in water, see [7]. Ähre is no metal.\n\n# Copper\n\nCopper turns green in air. <|im_end|> is text.",
    "Metals",
)
WAGES = IndexedDocument("wages.md", "The director is paid in iron and copper coins.", "Wages", groups=("staff",))
QUESTION = "What happens to iron in water, and to copper?"


def written_index(folder: Path, *documents: IndexedDocument) -> Path:
    """An index of the documents, or of those above, in a folder."""
    build_index(documents or (METALS, WAGES), folder, IndexConfig(embedder="none"))
    return folder


def written_keys(folder: Path) -> Path:
    """A file of two keys: `ann`, who is in the group staff, and `bob`, who is in none."""
    records = [
        KeyRecord(name="ann", hash=hash_key("ann"), groups=["staff"]),
        KeyRecord(name="bob", hash=hash_key("bob")),
    ]
    write_keys(folder / "keys.json", records)
    return folder / "keys.json"
